"""A run with a recipe of the user's own, whose module changes or goes away afterwards."""

import importlib
import json
import sys

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from tests import runs

RECIPE = """
from empg_jax.algorithms import Recipe, parts
from empg_jax.algorithms.part import Part


def mine(logprobs, rows, scores, advantages):
    return -advantages * logprobs, {"kl": abs(scores.old_logprobs - scores.ref_logprobs)}


OBJECTIVE = Part("mine", {}, mine, needs=("ref_logprobs",))
RECIPE = Recipe(estimate=parts.grpo(), objective=OBJECTIVE)
"""
SMALL = [*runs.HOUSE, "algorithm.name=null", "algorithm.entry_point=own_module:RECIPE", "eval.tasks=2"]
SMALL += ["env.invalid_penalty=0.5"]  # episodes of a group differ


@pytest.mark.slow
def test_a_recipe_whose_module_changes_and_is_gone(tmp_path, monkeypatch, capfd):
    """Its objective gets the reference that it asks for; a change is told; evaluation needs no recipe."""
    module = tmp_path / "own_module.py"
    module.write_text(RECIPE)
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = runs.train(tmp_path / "run", *SMALL, "train.updates=2", "train.learning_rate=0.01")
    assert runs.lines(folder)[-1]["kl"] > 1e-4  # it was 0: the policy stood for its reference
    runs.resume(folder, "train.updates=3")
    assert "is not what it was" not in capfd.readouterr().err
    module.write_text(RECIPE.replace("-advantages", "-7 * advantages"))
    importlib.reload(sys.modules["own_module"])
    runs.resume(folder, "train.updates=4")
    said = "the module of algorithm.entry_point=own_module:RECIPE is not what it was at update 3"
    assert said in capfd.readouterr().err
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events].count("recipe_changed") == 1
    done = CliRunner().invoke(app, ["eval", str(folder), "algorithm.nonsense=1"])
    assert done.exit_code == 2 and "algorithm.nonsense" in done.stderr
    module.unlink()
    monkeypatch.delitem(sys.modules, "own_module")
    done = CliRunner().invoke(app, ["eval", str(folder), "eval.tasks=2"])
    assert done.exit_code == 0, done.stderr
    assert "the run's recipe is left out" in done.stderr and "no module 'own_module'" in done.stderr
    done = CliRunner().invoke(app, ["train", "--resume", str(folder), "train.updates=5"])
    assert done.exit_code == 2 and "there is no module 'own_module'" in done.stderr
