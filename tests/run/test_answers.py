"""Information gain from the configuration to the credit: answers are scored, recorded, and pay the turns."""

import gzip
import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax import algorithms as al
from empg_jax.cli import app
from empg_jax.errors import ConfigError
from tests import runs

ENV = ["env.name=deepsearch", "env.options={level: tiny, style: terse}", "sft.updates=0", "eval.tasks=2"]
IGPO = ["algorithm.name=igpo", "algorithm.modulation=none", "rollout.group_size=4", "train.updates=1"]


def by_gain(scored, returns, mask, groups):
    """A2TGPO's advantages from the scored answers."""
    return al.a2tgpo(al.information_gains(scored, mask), returns, mask, groups)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "credit_of"), [("igpo", al.igpo), pytest.param("a2tgpo", by_gain, marks=pytest.mark.long)]
)
def test_a_run_pays_turns_by_what_they_tell_about_the_answer(tmp_path, name, credit_of):
    run = runs.train(tmp_path / "run", *ENV, *IGPO, f"algorithm.name={name}", "env.max_turns=3")
    (line,) = [line for line in runs.lines(run) if "loss" in line]
    assert line["recompiles"] == 0
    (file,) = (run / "rollouts").iterdir()
    records = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    scored, paid = np.zeros((len(records), 4)), np.zeros((len(records), 3))
    mask = np.zeros((len(records), 3), bool)
    for i, record in enumerate(records):
        for t, turn in enumerate(record["turns"]):
            scored[i, t], paid[i, t], mask[i, t] = turn["answer_logprob"], turn["advantage"], True
    assert (scored[:, :3][mask] < 0).all() and np.ptp(scored[:, :3][mask]) > 1e-3
    returns = np.array([record["return"] for record in records])
    groups = np.array([record["group_id"] for record in records])
    groups = np.int32(groups - groups.min())
    expected = jax.jit(credit_of)(np.float32(scored), np.float32(returns), mask, groups)
    np.testing.assert_allclose(paid, expected, atol=2e-3)
    # The file alone gives the same credit.
    again = CliRunner().invoke(app, ["credit", str(run / "config.yaml"), str(file)])
    assert again.exit_code == 0 and "answer" not in again.stderr
    turns = [turn for text in again.stdout.splitlines() for turn in json.loads(text)["turns"]]
    np.testing.assert_allclose([turn["advantage"] for turn in turns], paid[mask], atol=1e-5)


def test_episodes_whose_answers_were_not_scored_are_credited_with_a_note(tmp_path):
    turn = {"reward": 0.0, "valid": True, "tokens": 3, "entropy": 0.5}
    path = tmp_path / "e.jsonl"
    path.write_text("".join(json.dumps({"turns": [turn, turn | {"reward": r}]}) + "\n" for r in (0.0, 1.0)))
    found = CliRunner().invoke(app, ["credit", "deepsearch_tiny", str(path), *IGPO[:2]])
    assert found.exit_code == 0 and "turns without answer_logprob gain nothing" in found.stderr


@pytest.mark.slow
def test_an_environment_without_answers_is_refused(tmp_path):
    """Ours before a folder is made, a user's own at its first episodes."""
    folder = tmp_path / "run"
    with pytest.raises(
        ConfigError, match=r"algorithm.name=igpo .* env.name=household has none; deepsearch has"
    ):
        runs.train(folder, *IGPO, "sft.updates=0", "eval.tasks=2")
    assert not folder.exists()
    with pytest.raises(ConfigError, match=r"env.entry_point=tests.houses:HOUSE has none"):
        runs.train(folder, *runs.HOUSE, *IGPO, "sft.updates=0", "eval.tasks=2")
