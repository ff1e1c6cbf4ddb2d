"""Trackers of experiments, with stand-ins for their packages: what each of them is told."""

import errno
import shutil
import sys
import types

import pytest

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.metrics import MetricsLog, read_metrics
from empg_jax.report.tracking import open_trackers
from tests import runs

KEYS = ["log.project=agents", "log.entity=team", "log.tags=[first, try]"]


class StandIn(types.SimpleNamespace):
    """A package that remembers how it was called."""

    def __init__(self):
        super().__init__(calls=[])

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return (
                types.SimpleNamespace(
                    log=self.log, finish=self.finish, info=types.SimpleNamespace(run_id="abc123")
                )
                if name in ("init", "start_run")
                else None
            )

        return call

    def named(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def packages(monkeypatch):
    found = {name: StandIn() for name in ("wandb", "mlflow", "trackio")}
    for name, stand_in in found.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    return found


def test_projects_names_tags_and_keys(packages, tmp_path):
    on = ["log.wandb=true", "log.mlflow=true", "log.trackio=true"]
    run = tmp_path / "try-7"
    run.mkdir()
    config = load_config("quickstart", [*on, *KEYS])
    trackers = open_trackers(config, run, resume_at=None)
    ((_, given),) = packages["wandb"].named("init")
    assert (given["project"], given["entity"], given["tags"]) == ("agents", "team", ["first", "try"])
    own = given["id"]
    assert (given["name"], given["resume"]) == ("try-7", None) and len(own) == 8
    assert given["config"]["algorithm"]["empg"]["zeta"] == 0.05
    ((_, given),) = packages["trackio"].named("init")
    assert (given["project"], given["name"], given["resume"]) == ("agents", f"try-7-{own}", "never")
    assert given["config"]["tags"] == ["first", "try"] and given["config"]["seed"] == 0
    mlflow = packages["mlflow"]
    assert mlflow.named("set_experiment") == [(("agents",), {})]
    assert mlflow.named("start_run") == [
        ((), {"run_name": "try-7", "tags": {"first": "true", "try": "true"}})
    ]
    params = [args[0] for args, _ in mlflow.named("log_params")]
    assert all(len(batch) <= 100 for batch in params)
    assert {k: v for batch in params for k, v in batch.items()}["algorithm.empg.zeta"] == "0.05"
    for tracker in trackers:
        tracker.log({"loss/loss": 1.0, "loss/kl": float("nan")}, step=3)
        tracker.finish()
    assert mlflow.named("log_metrics") == [(({"loss/loss": 1.0},), {"step": 3})]
    assert [len(packages[name].named("finish")) for name in ("wandb", "trackio")] == [1, 1]
    assert mlflow.named("end_run") == [((), {})]
    # A resumed run goes on with the same.
    open_trackers(config, run, resume_at=3)
    assert mlflow.named("start_run")[-1] == ((), {"run_id": "abc123"})
    assert packages["wandb"].named("init")[-1][1]["resume"] == "allow"
    assert packages["trackio"].named("init")[-1][1]["resume"] == "allow"


def test_runs_in_folders_of_one_name_are_two_and_go_on_as_themselves(packages, tmp_path):
    config = load_config("quickstart", ["log.wandb=true", "log.trackio=true"])
    folders = [tmp_path / parent / "seed-0" for parent in ("first", "second")]
    for folder in folders:
        folder.mkdir(parents=True)
    for resume_at in (None, 3):
        for folder in folders:
            open_trackers(config, folder, resume_at=resume_at)
    for package, key in (("wandb", "id"), ("trackio", "name")):
        one, other, *resumed = [given[key] for _, given in packages[package].named("init")]
        assert one != other and resumed == [one, other]
    assert {given["name"] for _, given in packages["wandb"].named("init")} == {"seed-0"}


def test_a_copied_run_is_a_new_one_and_a_moved_one_goes_on(packages, tmp_path):
    config = load_config("quickstart", ["log.wandb=true", "log.mlflow=true"])
    original, copy, moved = (tmp_path / name for name in ("original", "copy", "moved"))
    original.mkdir()
    open_trackers(config, original, resume_at=None)
    shutil.copytree(original, copy)
    open_trackers(config, copy, resume_at=3)
    first, second = [given["id"] for _, given in packages["wandb"].named("init")]
    assert first != second
    assert [given.get("run_id") for _, given in packages["mlflow"].named("start_run")] == [None, None]
    original.rename(moved)
    for folder in (moved, copy):
        open_trackers(config, folder, resume_at=3)
    assert [given["id"] for _, given in packages["wandb"].named("init")][2:] == [first, second]
    (moved / "tracked_run_id").write_text(f"{first}\n")  # of an older version, which kept no place
    open_trackers(config, moved, resume_at=3)
    assert packages["wandb"].named("init")[-1][1]["id"] == first


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_told_before_anything_is_opened(packages, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = load_config("quickstart", ["log.wandb=true", f"log.{name}=true"])
    with pytest.raises(ConfigError, match=rf"log\.{name}=true needs {name}; in the clone: pip install -e"):
        open_trackers(config, tmp_path, resume_at=None)
    assert not packages["wandb"].calls
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match=rf"log\.{name}=true needs {name}"):
        trainer.train(runs.configure(run, *runs.HOUSE, f"log.{name}=true"))
    assert not run.exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_does_not_start_is_told_in_a_line(packages, monkeypatch, tmp_path, name):
    opener = "set_experiment" if name == "mlflow" else "init"
    monkeypatch.setattr(packages[name], opener, _refuse, raising=False)
    config = load_config("quickstart", ["log.wandb=true", f"log.{name}=true"])
    with pytest.raises(
        ConfigError, match=rf"^log\.{name}=true, but {name} does not start: RuntimeError: no such address$"
    ):
        open_trackers(config, tmp_path, resume_at=None)
    assert len(packages["wandb"].named("finish")) == len(packages["wandb"].named("init"))


def test_a_tracker_that_fails_costs_its_own_record_only(packages, monkeypatch, tmp_path, capsys):
    packages["trackio"].log = _refuse
    monkeypatch.setattr("tensorboardX.RecordWriter.flush", _find_no_space)
    config = load_config("quickstart", ["log.wandb=true", "log.trackio=true"])
    with MetricsLog(tmp_path, trackers=open_trackers(config, tmp_path, resume_at=None)) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": 0.5})
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == len(packages["wandb"].named("log")) == 3
    told = capsys.readouterr().err
    for name in ("trackio", "tensorboard"):
        assert told.count(f"warning: {name} failed at update 1 and is told nothing more") == 1
    assert not packages["trackio"].named("finish") and packages["wandb"].named("finish")


def _refuse(*_, **__):
    raise RuntimeError("no such address\nand much more")


def _find_no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_run_tells_its_tracker_and_traces_an_update(packages, tmp_path):
    short = ["sft.updates=0", "eval.tasks=2", "train.updates=2"]
    tracked = ["log.trackio=true", "train.profile=2:1"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *short, *tracked)
    trackio = packages["trackio"]
    steps = [(kwargs["step"], args[0]) for args, kwargs in trackio.named("log")]
    assert [step for step, _ in steps] == [1, 2] and len(trackio.named("finish")) == 1
    assert {"loss/loss", "episodes/success_rate", "credit/entropy"} <= steps[0][1].keys()
    assert list((run / "profile").rglob("*.xplane.pb"))  # for XProf
    (perfetto,) = (run / "profile").rglob("perfetto_trace.json.gz")
    assert perfetto.stat().st_size > 1000


def test_a_trace_that_would_never_begin_is_refused():
    with pytest.raises(ConfigError, match=r"train\.profile=9:2 begins after the last update"):
        load_config("quickstart", ["train.updates=5", "train.profile=9:2"])
    assert load_config("quickstart", ["train.profile=3:20"]).train.profile == "3:20"
    with pytest.raises(ConfigError, match=r"train\.profile='3'|train\.profile"):
        load_config("quickstart", ["train.profile=three"])
