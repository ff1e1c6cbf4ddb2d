"""Known answers after every prompt: what is scored, in which batches, and what has no room."""

import dataclasses

import jax
import numpy as np
import pytest

from empg_jax.learner.answers import score_answers
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.learner.passes import Scorer
from tests.learner.problems import MODEL, TEMPERATURE, make_tiny_learner, make_trajectories, start

SHAPE = BatchShape(trajectories=16, turns=3, row_tokens=24, micro_rows=8, max_rows=16, num_minibatches=2)
WORDS = {"<answer>": [7], "oslo": [300, 301], "": [], "long": [9] * 30}


def known(answer="oslo"):
    return [dataclasses.replace(t, answer=("<answer>", answer)) for t in make_trajectories()]


def test_every_prompt_has_the_mean_logprob_of_the_answer_behind_it():
    """With the learner's programs and packed rows; against one row by itself for each prompt."""
    learner = make_tiny_learner(micro_rows=8)
    params = start(learner).params
    scorer = Scorer(learner, is_source=False, drift_every=0, is_on_policy=True)
    scores = []

    def score(batch, layout):
        scores.append(batch.tokens.shape)
        return scorer.read_logprobs(params, None, batch, layout)

    trajectories = known()
    found = score_answers(trajectories, WORDS.__getitem__, SHAPE, score)
    assert set(scores) == {(16, 24)} and len(scores) > 1  # the shape of training, several times
    single = jax.jit(compute_logprobs, static_argnums=(1,), static_argnames="temperature")
    for before, after in zip(trajectories, found, strict=True):
        for turn, scored in zip(before.turns, after.turns, strict=True):
            row = np.zeros((1, 32), np.int32)
            tokens = [*turn.prompt_tokens, 7, 300, 301]
            row[0, : len(tokens)] = tokens
            places, segments = np.arange(32, dtype=np.int32)[None], (np.arange(32) < len(tokens))[None] * 1
            logprobs, _ = single(
                params, MODEL, row, places, segments.astype(np.int32), temperature=TEMPERATURE
            )
            expected = np.asarray(logprobs)[0, len(tokens) - 2 : len(tokens)].mean()
            np.testing.assert_allclose(scored.answer_logprob, expected, atol=2e-6)
            assert dataclasses.replace(scored, answer_logprob=None) == dataclasses.replace(turn)
    batch, _ = make_batch(found, dataclasses.replace(SHAPE, row_tokens=20), seed=(0,))
    assert batch.answer_logprobs[3, 1] == np.float32(found[3].turns[1].answer_logprob)


def test_an_answer_without_room_gains_nothing():
    """Prompts grow: where the answer fits no more, the value of the turn before stands for it."""
    calls = []

    def score(batch, layout):
        calls.append(int(batch.loss_mask.sum()))
        return np.full(batch.tokens.shape, -np.inf, np.float32)

    narrow = dataclasses.replace(SHAPE, row_tokens=12)
    (found,) = score_answers([known()[1]], WORDS.__getitem__, narrow, score)
    lengths = [len(turn.prompt_tokens) + 3 for turn in found.turns]
    assert lengths[0] <= 12 < lengths[-1] and calls == [2 * sum(length <= 12 for length in lengths)]
    # A token that a filter excludes has a finite log-prob.
    assert {turn.answer_logprob for turn in found.turns} == {-1e4}
    (found,) = score_answers([known("long")[0]], WORDS.__getitem__, narrow, score)
    assert {turn.answer_logprob for turn in found.turns} == {None}


@pytest.mark.parametrize("trajectories", [make_trajectories(), known("")], ids=["unknown", "no tokens"])
def test_without_an_answer_nothing_is_scored(trajectories):
    found = score_answers(trajectories, WORDS.__getitem__, SHAPE, lambda *_: pytest.fail("scored"))
    assert {turn.answer_logprob for each in found for turn in each.turns} == {None}
