"""Compiling ahead: a program that cannot be lowered costs its own numbers and no others."""

import importlib.util
import json
import sys

import jax

from tests.runs import ROOT


def test_a_program_that_does_not_lower_leaves_the_others_their_numbers(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_ahead.py", "v5e:1x1", "--programs", "update", "prefill"])
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY"):
        monkeypatch.setenv(name, "cpu")  # the script sets them
    spec = importlib.util.spec_from_file_location("compile_ahead", ROOT / "scripts" / "compile_ahead.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def refuse(model, devices):
        raise RuntimeError("No supported GPU devices found\nplease specify an abstract one")

    monkeypatch.setattr(script, "find_devices", jax.devices)
    monkeypatch.setattr(script, "lower_update", refuse)
    monkeypatch.setattr(script, "lower_prefill", lambda model, devices: jax.jit(lambda x: x + 1).lower(1.0))
    assert script.main() == 1
    found = json.loads(capsys.readouterr().out)
    assert found["update"] == {"error": "No supported GPU devices found"}
    assert found["prefill"]["kernel_calls"] == 0
