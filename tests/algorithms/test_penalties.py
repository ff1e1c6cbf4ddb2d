"""Penalties reach the credit of every recipe, and never by a division that scales them up."""

from functools import partial

import jax
import numpy as np
import pytest

import empg_jax.algorithms as al
from empg_jax.algorithms.recipes import RECIPES
from empg_jax.algorithms.trial import _small_batch
from empg_jax.config import load_config
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.run.assembly import make_algorithm_from
from empg_jax.types import Scores
from tests.episodes import Episodes

TURNS = 10
# Two failures of one task, each with one invalid turn, not the first.
LOST = np.zeros((2, TURNS), np.float32)
LOST[0, 3] = LOST[1, 7] = -0.1
MASK, GROUPS = np.ones((2, TURNS), bool), np.zeros(2, np.int32)


@pytest.mark.parametrize(("rows", "valid"), [("mean", 0.01), ("first", 0.0)])
def test_a_penalty_is_not_divided_by_the_spread_of_a_tie(rows, valid):
    """A valid turn has the score 0, an invalid one −0.1; the mean of a trajectory is −0.01, its first 0."""
    expected = np.where(LOST < 0, valid - 0.1, valid)
    found = jax.jit(partial(al.grpo_turn_rows, rows=rows))(LOST, MASK, GROUPS)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    if rows == "mean":
        anchors = np.arange(2 * TURNS, dtype=np.int32).reshape(MASK.shape)
        gigpo = jax.jit(partial(al.gigpo, scale_by_std=True))
        found = gigpo(LOST.sum(1), LOST, anchors, MASK, GROUPS, turn_scores=LOST)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def credit_of(tmp_path, algorithm):
    """The turns' base advantages of the two failures, from a configuration."""
    episodes, path = Episodes(), tmp_path / "own.yaml"
    made = [
        episodes.trajectory(
            [episodes.turn(episodes.draw(2), 1, is_valid=bool(score == 0)) for score in row],
            member=member,
            episode_return=0.0,
        )
        for member, row in enumerate(LOST)
    ]
    path.write_text(
        "env: {invalid_penalty: 0.1}\nrollout: {group_size: 2, tasks_per_update: 1}\n"
        f"train: {{num_minibatches: 1}}\nalgorithm: {algorithm}\n"
    )
    batch, _ = make_batch(made, BatchShape(2, TURNS, 32, 2, 24, 1), seed=(0,))
    scores = Scores(batch.behavior_logprobs, batch.behavior_entropies, batch.behavior_logprobs)
    credit = jax.jit(make_algorithm_from(load_config(path)).credit)(batch, scores)
    return np.asarray(credit.turns.base)


@pytest.mark.parametrize(
    "algorithm",
    ["{name: gigpo, scale_by_std: true, omega: 0}", "{name: grpo_turn_rows, rows: mean}"],
)
def test_nor_by_way_of_a_configuration(tmp_path, algorithm):
    np.testing.assert_allclose(credit_of(tmp_path, algorithm), np.where(LOST < 0, -0.09, 0.01), atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_penalty_changes_credit_or_is_said_to_have_no_effect(name):
    batch, scores = _small_batch()
    if RECIPES[name].critic is None:
        scores = scores.replace(values=None)
    without, with_it = (
        np.asarray(al.make_algorithm(name, **keys).credit(batch, scores).turns.base)
        for keys in ({}, {"invalid_penalty": 0.1})
    )
    overlong = ["algorithm.overlong_length=64", "algorithm.overlong_cache=9"]
    keys = [f"algorithm.name={name}", "env.invalid_penalty=0.1", *overlong]
    notes = [note for note in load_config("quickstart", keys).notes if "has no effect" in note]
    told = [note.partition("=")[0] for note in notes]
    ignored = ["env.invalid_penalty", "algorithm.overlong_length"]
    assert told == (ignored if np.array_equal(without, with_it) else [])
