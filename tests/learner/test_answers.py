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
WORDS = {"oslo": [300, 301], "": [], "long": [9] * 30}


def encode(lead, answer):
    return [7], WORDS[answer]


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
    found = score_answers(trajectories, encode, SHAPE, score)
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


def test_an_answer_without_room_is_not_scored_and_gains_nothing():
    calls = []

    def score(batch, layout):
        calls.append(int(batch.loss_mask.sum()))
        return np.full(batch.tokens.shape, -np.inf, np.float32)

    narrow = dataclasses.replace(SHAPE, row_tokens=12)
    (found,) = score_answers([known()[1]], encode, narrow, score)  # prompts grow
    fits = [len(turn.prompt_tokens) + 3 <= 12 for turn in found.turns]
    assert fits[0] and not fits[-1] and calls == [2 * sum(fits)]
    # A token that a filter excludes has a finite log-prob.
    assert [turn.answer_logprob for turn in found.turns] == [-1e4 if fit else None for fit in fits]
    (found,) = score_answers([known("long")[0]], encode, narrow, score)
    assert {turn.answer_logprob for turn in found.turns} == {None}


@pytest.mark.parametrize(
    ("scored", "row"),
    [
        ([-2.0, None, -1.0], [-2.0, -2.0, -1.0]),
        ([None, -2.0, None], [-2.0, -2.0, -2.0]),
        ([None] * 3, [0.0] * 3),
    ],
)
def test_a_turn_that_was_not_scored_has_the_value_of_another(scored, row):
    """Not 0, which would be certainty."""
    episode = next(each for each in known() if len(each.turns) == 3)
    turns = [
        dataclasses.replace(t, answer_logprob=value) for t, value in zip(episode.turns, scored, strict=True)
    ]
    batch, _ = make_batch([dataclasses.replace(episode, turns=tuple(turns))], SHAPE, seed=(0,))
    assert batch.answer_logprobs[0].tolist() == row and not batch.answer_logprobs[1:].any()


@pytest.mark.parametrize("trajectories", [make_trajectories(), known("")], ids=["unknown", "no tokens"])
def test_without_an_answer_nothing_is_scored(trajectories):
    found = score_answers(trajectories, encode, SHAPE, lambda *_: pytest.fail("scored"))
    assert {turn.answer_logprob for each in found for turn in each.turns} == {None}
