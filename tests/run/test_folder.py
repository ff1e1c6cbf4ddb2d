"""The run's folder: never two runs in one, files whole or absent, and enough to repeat the run."""

import json
import subprocess

import pytest

from empg_jax.config import Config, load_config
from empg_jax.errors import ConfigError, RefusedCheckpoint
from empg_jax.files import write_json_atomic, write_text_atomic
from empg_jax.parallel.hosts import ALONE
from empg_jax.report import environment
from empg_jax.run import folder as runinfo
from empg_jax.run.keeping import keep_places
from empg_jax.run.lock import RunLocked
from empg_jax.run.together import check_store, lock_files


def test_run_folders_are_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [runinfo.create_run_dir(Config(name="toy")) for _ in range(3)]
    assert len(set(folders)) == 3 and all(f.is_dir() and f.name.startswith("toy-") for f in folders)


def test_a_chosen_folder_must_not_hold_a_run(tmp_path):
    config = Config(run_dir=str(tmp_path / "mine"))
    run_dir = runinfo.create_run_dir(config)
    assert runinfo.create_run_dir(config) == run_dir  # nothing was run in it yet
    runinfo.write_run_info(run_dir, config)
    with pytest.raises(ConfigError, match="already holds a run: go on with --resume"):
        runinfo.create_run_dir(config)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        runinfo.create_run_dir(Config(run_dir=str(tmp_path / "file")))


@pytest.mark.parametrize("text", [None, "{", "[3]", "\xff", '{"updates": 2}'])
def test_a_run_whose_summary_cannot_be_read_is_not_finished(tmp_path, text):
    config = load_config("quickstart", ["train.updates=3"])
    if text is not None:
        (tmp_path / "summary.json").write_bytes(text.encode("latin-1"))
    assert not runinfo.is_finished(tmp_path, config)
    (tmp_path / "summary.json").write_text('{"updates": 3}')
    assert runinfo.is_finished(tmp_path, config)


def test_a_chosen_folder_of_checkpoints_is_kept_by_its_absolute_path(tmp_path, monkeypatch):
    """A run may go on from another folder than the one that it was started in."""
    monkeypatch.chdir(tmp_path)
    for chosen, kept in [
        ("place/of it", f"{tmp_path}/place/of it"),
        (None, None),
        ("/somewhere", "/somewhere"),
        ("~/somewhere", "~/somewhere"),
        ("gs://bucket/folder", "gs://bucket/folder"),
    ]:
        config = Config(checkpoint={"dir": chosen})
        assert keep_places(config, ALONE).checkpoint.dir == kept
        assert config.checkpoint.dir == chosen


def test_what_a_run_reads_is_kept_by_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "chats.jsonl", "bytes"):
        (tmp_path / name).mkdir()
    config = Config(
        model={"path": "model", "tokenizer": "bytes", "chat_template": "qwen3_training"},
        sft={"data": ["chats.jsonl", "/elsewhere/chats.jsonl"], "updates": 1},
    )
    kept = keep_places(config, ALONE)
    assert kept.model.path == f"{tmp_path}/model" and kept.model.tokenizer == "bytes"
    assert kept.model.chat_template == "qwen3_training" and kept.rollout.stored is None
    assert kept.sft.data == (f"{tmp_path}/chats.jsonl", "/elsewhere/chats.jsonl")
    hub = Config(model={"path": "owner/name"})  # no folder here: a name of the hub
    assert keep_places(hub, ALONE).model.path == "owner/name"


def test_files_of_the_environment_are_kept_by_their_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("q.jsonl", "c.jsonl", "tiny"):
        (tmp_path / "data" / name).write_text("")
    monkeypatch.chdir(tmp_path / "data")
    options = {
        "level": "tiny",  # a file has this name, too
        "questions": {"train": ["q.jsonl", "owner/questions"], "test": "q.jsonl"},
        "corpus": "c.jsonl",
        "retriever_options": {"index_dir": "../data", "k1": 0.9},
    }
    kept = keep_places(Config(env={"name": "deepsearch", "options": options}), ALONE).env.options
    place = f"{tmp_path}/data"
    assert kept["level"] == "tiny" and kept["corpus"] == f"{place}/c.jsonl"
    assert kept["questions"] == {"train": [f"{place}/q.jsonl", "owner/questions"], "test": f"{place}/q.jsonl"}
    assert kept["retriever_options"] == {"index_dir": f"{place}/../data", "k1": 0.9}


def test_two_runs_never_share_a_folder_of_checkpoints(tmp_path):
    place = tmp_path / "checkpoints"
    config = load_config("quickstart", [f"checkpoint.dir={place}"])
    runs = [tmp_path / "first", tmp_path / "second"]
    for run in runs:
        run.mkdir()
    check_store(config, ALONE, is_new=True)
    with (
        lock_files(config, runs[0], ALONE),  # before either has written a step
        pytest.raises(RunLocked, match=f"{place} is being trained by"),
        lock_files(config, runs[1], ALONE),
    ):
        pass
    (place / "3").mkdir()
    with pytest.raises(
        RefusedCheckpoint, match=rf"{place} holds checkpoints of another run \(\[3\]\).*--resume"
    ):
        check_store(config, ALONE, is_new=True)
    check_store(config, ALONE, is_new=False)
    inside = load_config("quickstart", [f"checkpoint.dir={runs[0]}"])
    with lock_files(inside, runs[0], ALONE):  # one folder, one lock
        pass


def test_a_run_may_be_called_like_a_step(tmp_path):
    named, step = tmp_path / "checkpoints" / "7", tmp_path / "run" / "checkpoints" / "7"
    named.mkdir(parents=True)
    (named / "config.yaml").touch()
    assert runinfo.split_checkpoint(named) == (named, None)
    assert runinfo.split_checkpoint(step) == (tmp_path / "run", 7)


def test_the_run_can_be_repeated_from_its_folder(tmp_path):
    config = load_config("quickstart", ["seed=7"])
    runinfo.write_run_info(tmp_path, config)
    assert load_config(tmp_path / "config.yaml") == config
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["seed"] == 7 and environment["packages"]["jax"] and environment["devices"]
    runinfo.write_run_info(tmp_path, config, resumed=True)
    runinfo.write_run_info(tmp_path, config, resumed=True)
    assert sorted(f.name for f in tmp_path.glob("environment*")) == [
        "environment.1.json",
        "environment.2.json",
        "environment.json",
    ]


def test_git_state_knows_commit_and_dirt(tmp_path):
    assert environment.git_state(tmp_path) is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = environment.git_state(tmp_path)
    assert len(state["commit"]) == 40 and state["dirty"] is False
    (tmp_path / "new").write_text("")
    assert environment.git_state(tmp_path)["dirty"] is True


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_json_has_null_where_a_number_is_not_finite(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": float("nan"), "b": {"c": [1.5, float("inf")]}, "d": (2, "x")})
    assert json.loads(path.read_text()) == {"a": None, "b": {"c": [1.5, None]}, "d": [2, "x"]}
