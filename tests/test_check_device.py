"""The device check: a step that fails or hangs costs its own result and no other, and the summary says so."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def check(monkeypatch, tmp_path):
    """The module, with steps that are small programs in a folder of their own."""
    spec = importlib.util.spec_from_file_location("check_device", SCRIPTS / "check_device.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_device", module)
    spec.loader.exec_module(module)
    programs = {
        "good": "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{\"speed\": 7}')",
        "bad": "print('first'); raise SystemExit('no such kernel')",
        "train": "import pathlib, sys; pathlib.Path(sys.argv[1] + '.run').mkdir()",
        "slow": "import time; print('compiling', flush=True); time.sleep(600)",
    }
    for name, text in programs.items():
        (tmp_path / f"{name}.py").write_text(text)
    steps = {name: module.Step(name, 6, f"{name}.py {{json}}", f"{name}.py {{json}}") for name in programs}
    monkeypatch.setattr(module, "SCRIPTS", tmp_path)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)

    def run(*names, options=()):
        monkeypatch.setattr(
            module, "STEPS", dict.fromkeys(("gpu", "tpu"), tuple(steps[name] for name in names))
        )
        monkeypatch.setattr(sys, "argv", ["check_device.py", str(tmp_path / "out"), *options])
        code = module.main()
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        return code, json.loads((tmp_path / "out" / "summary.json").read_text())

    return run


def test_a_failing_and_a_hanging_step_cost_only_themselves(check):
    code, summary = check("bad", "slow", "good")
    steps = summary["steps"]
    assert code == 1
    assert steps["good"]["ok"] and steps["good"]["result"] == {"speed": 7}
    assert not steps["bad"]["ok"] and "no such kernel" in steps["bad"]["output"]
    assert not steps["slow"]["ok"] and "stopped after 6 s" in steps["slow"]["exit"]
    assert "compiling" in steps["slow"]["output"] and steps["slow"]["seconds"] < 60


def test_steps_that_no_longer_fit_are_listed(check):
    code, summary = check("good", "good", options=("--seconds", "1"))
    assert code == 1 and summary["skipped"] == ["good", "good"] and not summary["steps"]


def test_a_second_call_into_the_same_folder_replaces_what_it_runs_again(check, tmp_path):
    assert check("train", "good", "bad")[0] == 1
    (tmp_path / "good.py").write_text("raise SystemExit('no device')")
    code, summary = check("train", "good", "bad", options=("--only", "train", "good"))
    steps = summary["steps"]
    assert steps["train"]["ok"] and "result" not in steps["good"] and "no device" in steps["good"]["output"]
    assert code == 1 and "no such kernel" in steps["bad"]["output"]  # of the first call
    assert check("train", "good", "bad", options=("--only", "train"))[0] == 0


@pytest.mark.parametrize("script", ["check_gpu.sh", "check_tpu.sh", "study_gpu.sh"])
def test_missing_packages_are_named_before_anything_runs(tmp_path, script):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
    python.chmod(0o755)
    done = subprocess.run(
        [SCRIPTS / script, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "lacks packages: pip install jax flax optax" in line
    assert "jaxtyping jinja2" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["check_gpu.sh", "check_tpu.sh"])
def test_an_unknown_step_is_refused_before_anything_runs(tmp_path, script):
    done = subprocess.run(
        [SCRIPTS / script, tmp_path / "out", "--only", "decod"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    assert done.returncode == 2 and "no step is called decod; there are: limit," in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_steps_of_a_tpu_are_its_own():
    done = subprocess.run(
        [SCRIPTS / "check_tpu.sh", "unused", "--list"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[:2] == ["limit", "attention-parity"] and "update-1.5b" not in names
    assert {"update-0.5b", "decode-0.5b", "quickstart", "gap-0.5b", "agent"} <= set(names)
