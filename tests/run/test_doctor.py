"""`empg-jax doctor`: what it looks at, what it says to do, and that one failure hides no other finding."""

import json
import subprocess

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.run import doctor


@pytest.fixture
def only(monkeypatch):
    """Leaves these checks."""

    def leave(*names):
        monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})

    return leave


def call(*arguments):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, result.stdout


def test_this_installation_is_healthy(only):
    only(*(name for name in doctor.CHECKS if name not in ("arithmetic", "training")))
    code, out = call()
    assert code == 0 and "failed" not in out and "ok     worker: household started and stopped" in out


@pytest.mark.slow
def test_all_is_looked_at_and_told_as_json():
    code, out = call("--json")
    report = json.loads(out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert [finding for finding in report["findings"] if finding["status"] == "failed"] == []
    assert code == 0 and report["ok"]
    assert found.keys() == doctor.CHECKS.keys()
    assert all(finding["todo"] for finding in report["findings"] if finding["status"] != "ok")
    assert "jaxlib" in found["packages"]["said"] and found["devices"]["said"].startswith("cpu, ")
    assert "learner: tiles (XLA), sampler: dense products (cuda: triton" in found["attention"]["said"]
    assert "empg-jax/xla/" in found["compile cache"]["said"]
    assert "household started and stopped" in found["worker"]["said"]
    assert "a checkpoint was written and restored" in found["training"]["said"]
    assert "an optimizer step was compiled and made" in found["training"]["said"]


def test_a_broken_worker_is_told_with_a_remedy_and_fails(only, monkeypatch):
    only("memory", "worker", "packages")
    broken = subprocess.CompletedProcess([], 1, stdout="", stderr="No module named empg_envs")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *args, **kwargs: broken)
    code, out = call()
    assert code == 1 and "failed worker: RuntimeError: No module named empg_envs" in out
    assert "→ python -m empg_envs.worker must start: install the project again" in out
    assert "ok     packages: python" in out  # behind the failure


def test_what_is_missing_but_not_needed_is_a_note(only, monkeypatch):
    only("extras", "compile cache", "devices")
    monkeypatch.setitem(doctor.EXTRAS, "tracking", (("no_such_module",), "log.tracking=true"))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    monkeypatch.setattr(doctor, "ACCELERATORS", {"cuda": (("/dev/null",), "an NVIDIA GPU", "install it")})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    code, out = call()
    assert code == 0 and out.count("note ") == 3
    assert "tracking (log.tracking=true)" in out and "pip install -e" in out
    assert "every start compiles anew" in out and "compile_cache=FOLDER names another" in out
    assert "an NVIDIA GPU is here, but not used" in out and "→ install it" in out


def test_versions_outside_the_bounds_are_named(only, monkeypatch):
    only("packages")
    lines = ["jax<0.2", "no-such-package>=1", "wandb; extra == 'wandb'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: lines)
    code, out = call()
    assert code == 1 and " is not <0.2; no-such-package is missing" in out and "wandb" not in out


def test_the_flags_of_xla_are_told(only, monkeypatch):
    only("XLA flags")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x")
    assert "ok     XLA flags: XLA_FLAGS=--xla_dump_to=/tmp/x" in call()[1]
    monkeypatch.delenv("XLA_FLAGS")
    assert "XLA flags: none set (on a CPU, or a single GPU, none is of use)" in call()[1]
