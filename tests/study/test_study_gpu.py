"""The study on one GPU: its settings, its time limits, its summary; and a dry run at sizes for a CPU."""

import json
import sys
import time

import pytest
import study_gpu

from empg_jax.config import load_config
from tests.runs import ROOT


def read(*arguments):
    return study_gpu.settings(study_gpu.parser.parse_args([*map(str, arguments)]))


def test_settings_are_the_configurations(tmp_path):
    overrides = read(tmp_path, "--model", tmp_path / "model", "--set", "train.updates=9")
    found = load_config("quickstart", [*overrides, "env.name=alfworld"])
    wanted = load_config("alfworld_smollm2")
    for section in ("env", "rollout", "sft", "algorithm"):
        assert getattr(found, section) == getattr(wanted, section), section
    assert found.model.path == str(tmp_path / "model") and found.train.updates == 9
    assert found.model.lora == wanted.model.lora and found.train.learning_rate == 2e-4
    for arm, own in study_gpu.ARMS.items():
        assert load_config("quickstart", own).algorithm.modulation == arm.replace("grpo", "none")


def test_a_run_is_stopped_at_its_limit(tmp_path):
    sleeper = [sys.executable, "-c", "import time; print('on', flush=True); time.sleep(600)"]
    began = time.monotonic()
    assert study_gpu.run(sleeper, tmp_path / "log", 3) == "stopped"
    assert time.monotonic() - began < 120
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    assert study_gpu.run([sys.executable, "-c", stubborn], tmp_path / "log", 2, grace=0.5) == "stopped"
    assert study_gpu.run([sys.executable, "-c", "1/0"], tmp_path / "log", 60) == "failed"
    assert "ZeroDivisionError" in (tmp_path / "log").read_text()
    assert study_gpu.run([sys.executable, "-c", ""], tmp_path / "log", 60) == "finished"


def test_what_a_run_has_is_told(tmp_path):
    lines = [
        json.dumps({"update": n, "loss": 0.0, "success_rate": n / 10, "modulation_std": 0.5})
        for n in range(8)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"eval_success": 1}', '{"update": 8, "lo']))
    found = study_gpu.summarize(study_gpu.read_updates(tmp_path))
    assert found["updates"] == 8
    assert found["first"]["success_rate"] == 0.2 and found["last"]["success_rate"] == 0.5
    rows = [{"arm": "aem", "seed": 1, "state": "stopped", **found}]
    rows.append({"arm": "grpo", "seed": 2, "state": "left out", **study_gpu.summarize([])})
    table = study_gpu.as_table(rows).splitlines()
    assert table[2] == "| aem | 1 | stopped | 8 | 0.200 | 0.500 | - | 0.500 | - | - |"
    assert table[3] == "| grpo | 2 | left out | 0 | - | - | - | - | - | - |"


def called(monkeypatch, *arguments):
    """Call the script; the arms that were run, where each takes no time."""
    begun = []

    def run(arguments, log, seconds):
        begun.append(log.stem)
        log.touch()
        return "finished"

    monkeypatch.setattr(study_gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["study_gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        study_gpu.main()
    return begun, ended.value.code


def test_what_does_not_fit_is_left_out_by_whole_seeds(tmp_path, monkeypatch, capsys):
    begun, code = called(monkeypatch, tmp_path / "out", "--seconds", 200)
    assert begun == [f"{arm}-{seed}" for seed in (0, 1) for arm in study_gpu.ARMS] and code == 0
    states = [each["state"] for each in json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]]
    assert states == ["finished"] * 6 + ["left out"] * 3
    assert called(monkeypatch, tmp_path / "out") == ([], 2)
    assert "has runs already" in capsys.readouterr().err
    assert called(monkeypatch, tmp_path / "little", "--seconds", 80) == ([], 2)
    assert "the arms need 90" in capsys.readouterr().err and not (tmp_path / "little").exists()


@pytest.mark.slow
@pytest.mark.long
def test_the_dry_run_trains_every_arm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON", sys.executable)
    call = [str(ROOT / "scripts" / "study_gpu.sh"), str(tmp_path), "--tiny", "--seconds", "1800"]
    assert study_gpu.run(call, tmp_path / "log", 1800) == "finished"
    runs = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [(run["arm"], run["state"], run["updates"]) for run in runs] == [
        (arm, "finished", 2) for arm in study_gpu.ARMS
    ]
