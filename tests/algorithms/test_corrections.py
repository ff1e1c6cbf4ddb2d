"""Importance corrections on every level, by hand."""

import jax
import numpy as np
import pytest

from empg_jax import algorithms as al
from empg_jax.algorithms.anchors import join_alike
from tests.episodes import Episodes

# Two packed sequences in the first row, one in the second; the rest is padding with junk.
IDS = np.int32([[40, 40, 7, 7, -1], [3, 3, 3, -1, -1]])
MASK = np.array([[1, 1, 1, 1, 0], [1, 0, 1, 0, 0]])
RATIOS = np.float32([[1.5, 0.5, 3.0, 2.0, 1], [0.1, 1, 0.4, 1, 1]])
BEHAVIOR = np.full(MASK.shape, -1.0, np.float32)
OLD = np.where(MASK, BEHAVIOR + np.log(RATIOS), np.nan)


@pytest.mark.parametrize(
    "level, expected",
    [
        ("token", [[1.5, 0.5, 2, 2, 0], [0.1, 0, 0.4, 0, 0]]),
        ("sequence", [[0.75, 0.75, 2, 2, 0], [0.04, 0, 0.04, 0, 0]]),
        ("sequence_mean", [[0.75**0.5] * 2 + [2, 2, 0], [0.2, 0, 0.2, 0, 0]]),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_truncated_weights(level, expected, compiled):
    def weights(old):
        return al.tis_weights(old, BEHAVIOR, MASK, level=level, sequence_ids=IDS)

    np.testing.assert_allclose((jax.jit(weights) if compiled else weights)(OLD), expected, rtol=1e-5)


def test_normalized_weights_have_mean_one():
    tokens = np.asarray(al.tis_weights(OLD, BEHAVIOR, MASK, normalize=True))
    np.testing.assert_allclose(tokens[MASK > 0].mean(), 1, rtol=1e-6)
    sequences = np.asarray(
        al.tis_weights(OLD, BEHAVIOR, MASK, level="sequence", sequence_ids=IDS, normalize=True)
    )
    np.testing.assert_allclose((sequences[0, 0] + sequences[0, 2] + sequences[1, 0]) / 3, 1, rtol=1e-6)


@pytest.mark.parametrize(
    "level, expected",
    [
        ("token", [[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]),
        ("sequence", [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
        ("sequence_mean", [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]),
    ],
)
def test_rejection(level, expected):
    kept = al.mis_mask(OLD, BEHAVIOR, MASK, low=0.499, high=2.001, level=level, sequence_ids=IDS)
    np.testing.assert_array_equal(kept, np.array(expected, bool))


def test_rejected_tokens_leave_the_denominator():
    kept = al.mis_mask(OLD, BEHAVIOR, MASK, low=0.499, high=2.001)
    np.testing.assert_allclose(al.loss_weights(kept).max(), 1 / 3)


def test_offpolicy_sequences_are_dropped_only_when_bad():
    new = np.where(MASK, BEHAVIOR - 0.3, np.nan)
    advantages = np.float32([[-1, -1, 1, -0.5, -99], [-1, 50, 0.9, -99, -99]])
    kept = al.offpolicy_sequence_mask(new, BEHAVIOR, advantages, MASK, IDS)
    np.testing.assert_array_equal(kept, np.array([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0]], bool))
    near = al.offpolicy_sequence_mask(new, BEHAVIOR, advantages, MASK, IDS, delta=0.31)
    np.testing.assert_array_equal(near, MASK > 0)


def test_the_samplers_log_probs_see_what_the_learners_hide():
    """Means: sampler −1.0, learner before −1.8, now −1.85: 0.85 nats from the one, 0.05 from the other."""
    now, before, sampler = (np.full((1, 6), x, np.float32) for x in (-1.85, -1.8, -1.0))
    advantages, mask = -np.ones((1, 6), np.float32), np.ones((1, 6), bool)
    assert not al.offpolicy_sequence_mask(now, sampler, advantages, mask, None).any()
    assert al.offpolicy_sequence_mask(now, before, advantages, mask, None).all()


def test_effective_sample_size():
    np.testing.assert_allclose(al.effective_sample_size(BEHAVIOR, BEHAVIOR, MASK), 1)
    ratios = RATIOS[MASK > 0]
    expected = ratios.mean() ** 2 / (ratios**2).mean()
    np.testing.assert_allclose(al.effective_sample_size(OLD, BEHAVIOR, MASK), expected, rtol=1e-5)
    assert al.effective_sample_size(OLD, BEHAVIOR, 0 * MASK) == 0


def test_overlong_penalty():
    result = al.overlong_penalty(np.int32([0, 16384, 18432, 20480]), max_length=20480, cache_length=4096)
    np.testing.assert_allclose(result, [0, 0, -0.5, -1])
    bounded = al.overlong_penalty(np.int32([30, 35, 40, 60, 400]), max_length=40, cache_length=10)
    np.testing.assert_allclose(bounded, [0, -0.5, -1, -1, -1])
    halved = al.overlong_penalty(np.int32([400]), max_length=40, cache_length=10, factor=0.5)
    np.testing.assert_allclose(halved, [-0.5])
    with pytest.raises(ValueError, match="cache_length=9"):
        al.overlong_penalty(np.int32([1]), max_length=8, cache_length=9)


def test_similarity_anchors():
    hall = "You are in the hall. On the table you see an apple."
    texts = [[hall, "A kitchen."], [hall.replace("apple", "apples"), hall], [hall]]
    result = al.similarity_anchors(texts, [0, 0, 1], num_turns=3)
    np.testing.assert_array_equal(result, [[0, 1, -1], [0, 0, -1], [2, -1, -1]])
    exact = al.similarity_anchors(texts, [0, 0, -1], num_turns=3, threshold=1.0)
    np.testing.assert_array_equal(exact, [[0, 1, -1], [2, 0, -1], [-1, -1, -1]])


def test_alike_observations_are_joined_before_the_batch():
    episodes = Episodes()
    hall = "You are in the hall. On the table you see an apple."
    texts = [[hall, "A kitchen."], [hall.replace("apple", "apples"), hall]]
    made = [
        episodes.trajectory(
            [episodes.turn([1], 1, observation=text, anchor=n) for n, text in enumerate(row)],
            group_id=7,
            **end,
        )
        for row, end in zip(texts, [{}, dict(last_anchor=9, last_observation="A kitchen!")], strict=True)
    ]
    joined = join_alike(made, 0.95)
    assert [[turn.anchor for turn in trajectory.turns] for trajectory in joined] == [[0, 1], [0, 0]]
    assert [trajectory.last_anchor for trajectory in joined] == [None, 2]  # 0.9 alike, which is not enough
    assert [trajectory.last_anchor for trajectory in join_alike(made, 0.85)] == [None, 1]
    assert join_alike(made, 1.0) == made


def test_turns_without_a_text_keep_to_their_own_anchors():
    episodes = Episodes()
    made = [
        episodes.trajectory([episodes.turn([1], 1, observation=text, anchor=n) for text, n in row], **end)
        for row, end in [
            ([("", 5), ("", 6), ("A hall.", 6)], {"last_anchor": 5}),
            ([("", 6), ("A hall!", 7)], {"last_anchor": 8}),
        ]
    ]
    first, second = join_alike(made, 0.8)
    a, b, hall = (turn.anchor for turn in first.turns)
    assert len({a, b, hall}) == 3 and first.last_anchor == a
    assert [turn.anchor for turn in second.turns] == [b, hall]
    assert second.last_anchor not in (a, b, hall)
