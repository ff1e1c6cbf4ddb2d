"""Trajectories to rows: nothing lost, nothing doubled, everything where the layout says."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.learner.batching import BatchShape, find_tokens, make_batch, merge_turns
from empg_jax.learner.sharing import Family, pack_families
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes, entropy_of, logprob_of

SHAPE = BatchShape(trajectories=4, turns=3, row_tokens=32, micro_rows=2, max_rows=8, num_minibatches=2)


# ------------------------------------------------------------------------------------------- merging


def test_a_transcript_is_one_segment():
    trajectory = Episodes().transcript([(4, 2), (3, 1), (2, 3)])
    (segment,) = merge_turns(trajectory, 7)
    assert segment.trajectory == 7
    np.testing.assert_array_equal(segment.tokens, np.arange(1, 16))
    np.testing.assert_array_equal(segment.loss_mask, [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(segment.turn_ids, np.repeat([0, 1, 2], [6, 4, 5]))
    np.testing.assert_array_equal(segment.logprobs, segment.loss_mask * logprob_of(segment.tokens))
    np.testing.assert_array_equal(segment.entropies, segment.loss_mask * entropy_of(segment.tokens))


def test_windows_are_one_segment_per_turn():
    segments = merge_turns(Episodes().window([(4, 2), (5, 1), (3, 3)]), 0)
    assert [len(s.tokens) for s in segments] == [6, 6, 6]
    assert [set(s.turn_ids) for s in segments] == [{0}, {1}, {2}]
    assert [s.loss_mask.sum() for s in segments] == [2, 1, 3]


def test_a_broken_prefix_starts_a_segment():
    """One changed token in what the third prompt repeats of the second response."""
    episodes = Episodes()
    trajectory = episodes.transcript([(4, 2), (3, 2), (2, 3)])
    turns = list(trajectory.turns)
    prompt = turns[2].prompt_tokens.copy()
    prompt[10] += 1000
    turns[2] = dataclasses.replace(turns[2], prompt_tokens=prompt)
    first, second = merge_turns(dataclasses.replace(trajectory, turns=tuple(turns)), 0)
    assert len(first.tokens) == 11 and len(second.tokens) == 16
    assert first.loss_mask.sum() == 4
    # What was sampled before is context there, not sampled twice.
    np.testing.assert_array_equal(second.loss_mask, np.arange(16) >= 13)


def test_a_prompt_that_lost_its_end_starts_a_segment():
    episodes = Episodes()
    first = episodes.turn(episodes.draw(3), 3)
    shorter = np.concatenate([first.prompt_tokens, first.response_tokens])[:-1]
    segments = merge_turns(episodes.trajectory([first, episodes.turn(shorter, 1)]), 0)
    assert [len(s.tokens) for s in segments] == [6, 6]


# ------------------------------------------------------------------------------------------- packing


def pack_alone(lengths, capacity):
    """Rows of segments that share nothing."""
    rows = pack_families([Family((item,)) for item in range(len(lengths))], lengths, capacity)
    return [[item for family in row for item in family.items] for row in rows]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=40), st.integers(20, 50))
def test_packing(lengths, capacity):
    rows = pack_alone(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < load <= capacity for load in loads)
    # No two rows would fit into one: at most one row is half empty.
    assert all(a + b > capacity for i, a in enumerate(loads) for b in loads[i + 1 :])
    assert rows == pack_alone(lengths, capacity)


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match=r"segment of 9 tokens does not fit a row of 8"):
        pack_alone([3, 9], 8)


# ------------------------------------------------------------------------------------------- batches

EPISODE = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=3)


def make_trajectories(plans, seed=0):
    """Plans are ``(is transcript, turn lengths)``; two members per group."""
    episodes = Episodes(seed)
    made = []
    for i, (is_transcript, lengths) in enumerate(plans):
        make = episodes.transcript if is_transcript else episodes.window
        made.append(make(lengths, group_id=100 + i // 2, member=i % 2, episode_return=float(i)))
    return made


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), EPISODE), max_size=4), st.integers(1, 3), st.integers(1, 3))
def test_every_sampled_token_appears_exactly_once(plans, micro_rows, num_minibatches):
    shape = dataclasses.replace(SHAPE, micro_rows=micro_rows, num_minibatches=num_minibatches)
    trajectories = make_trajectories(plans)
    batch, layout = make_batch(trajectories, shape, seed=(0, 0))
    wanted = {
        int(token): (i, k)
        for i, trajectory in enumerate(trajectories)
        for k, turn in enumerate(trajectory.turns)
        for token in turn.response_tokens
    }
    places = np.argwhere(batch.loss_mask)
    found = {}
    for b, t in places:
        token = int(batch.tokens[b, t])
        assert token not in found
        found[token] = (int(batch.trajectory_ids[b, t]), int(batch.turn_ids[b, t]))
        assert batch.behavior_logprobs[b, t] == logprob_of(token)
        assert batch.behavior_entropies[b, t] == entropy_of(token)
        assert t > 0 and batch.segment_ids[b, t - 1] == batch.segment_ids[b, t]  # what it was sampled from
        assert batch.minibatch_ids[b] >= 0
    assert found == wanted
    assert layout.num_tokens == np.sum(batch.segment_ids > 0)
    check_segments(batch, layout)
    check_rows(batch, layout, shape, len(trajectories))


def check_segments(batch, layout):
    """Sequence ids are segments, unique in the batch; positions count from 0 inside each."""
    owners = collections.defaultdict(set)
    for b, row in enumerate(batch.segment_ids):
        assert np.all(np.diff(row[row > 0]) >= 0)  # in order, contiguous
        for number in range(1, row.max(initial=0) + 1):
            inside = row == number
            (sequence,) = set(batch.sequence_ids[b, inside])
            owners[sequence].add((b, number))
            np.testing.assert_array_equal(batch.positions[b, inside], np.arange(inside.sum()))
    assert all(len(places) == 1 for places in owners.values())
    assert set(owners) == set(range(layout.num_segments))
    padding = batch.segment_ids == 0
    assert np.all(batch.sequence_ids[padding] == -1)
    for name in ("tokens", "positions", "loss_mask", "trajectory_ids", "turn_ids", "behavior_logprobs"):
        assert not np.any(getattr(batch, name)[padding])


def check_rows(batch, layout, shape, num_trajectories):
    """Mini-batches own contiguous micro-batches and trajectories; row r of micro-batch m is r * M + m."""
    micro_batches = len(batch.tokens) // shape.micro_rows
    ids = batch.minibatch_ids.reshape(shape.micro_rows, micro_batches)
    real = (batch.segment_ids > 0).any(axis=1).reshape(ids.shape)
    np.testing.assert_array_equal(real, ids >= 0)
    assert real.sum() == layout.num_rows
    assert len(layout.bounds) == min(num_trajectories, shape.num_minibatches)
    before = 0
    for j, (start, stop) in enumerate(layout.bounds):
        assert start == before < stop
        assert set(ids[:, start:stop].ravel()) <= {j, -1}
        assert (ids == j).sum() == (ids[:, start:stop] == j).sum()
        before = stop
    assert np.all(ids[:, before:] == -1)
    owned = owners_of_steps(batch)
    sizes = [len(owners) for owners in owned.values()]
    assert sum(sizes) == num_trajectories  # nobody stands in two steps
    assert not sizes or max(sizes) - min(sizes) <= 1


def owners_of_steps(batch):
    """Trajectories by optimizer step."""
    owned = collections.defaultdict(set)
    for b, t in np.argwhere(batch.loss_mask):
        owned[int(batch.minibatch_ids[b])].add(int(batch.trajectory_ids[b, t]))
    return dict(sorted(owned.items()))


@pytest.mark.parametrize("kind", ["transcript", "window"])
def test_short_episodes_make_as_many_steps_as_long_ones(kind):
    """All four would fit in one row of 64."""
    episodes = Episodes()
    made = [getattr(episodes, kind)([(2, 2), (2, 2)], group_id=i // 2, member=i % 2) for i in range(4)]
    batch, layout = make_batch(made, BatchShape(4, 4, 64, 2, 4, num_minibatches=4), seed=(0,))
    assert len(layout.bounds) == 4
    assert [len(owners) for owners in owners_of_steps(batch).values()] == [1, 1, 1, 1]


def test_every_epoch_splits_anew_and_the_same_seed_splits_alike():
    episodes = Episodes()
    made = [episodes.transcript([(2 + i, 2)], group_id=i // 2, member=i % 2) for i in range(8)]
    shape = BatchShape(8, 1, 64, 2, 8, num_minibatches=2)
    splits = [owners_of_steps(make_batch(made, shape, seed=(3, 7, epoch))[0]) for epoch in (0, 0, 1, 2)]
    assert splits[0] == splits[1]
    assert len({str(split) for split in splits}) == 3
    assert all(set.union(*split.values()) == set(range(8)) for split in splits)
    # Lengths grow with the number of the episode; a step is no class of length.
    assert all(abs(np.mean(list(split[0])) - 3.5) < 3 for split in splits)


def test_tokens_are_found_in_another_layout():
    plans = [(True, [(3, 2), (2, 2)]), (False, [(5, 1), (4, 2)]), (True, [(2, 4)]), (False, [(6, 3)])]
    before, after = (make_batch(make_trajectories(plans), SHAPE, seed=(0, epoch))[0] for epoch in (0, 1))
    assert not np.array_equal(before.tokens, after.tokens)
    places = find_tokens(before, after)
    real = after.segment_ids > 0
    np.testing.assert_array_equal(before.tokens.ravel()[places[real]], after.tokens[real])
    np.testing.assert_array_equal(before.loss_mask.ravel()[places[real]], after.loss_mask[real])
    assert len(set(places[real])) == real.sum() and np.all(places[~real] == -1)


def test_the_table_of_trajectories():
    episodes = Episodes()
    turns = [
        episodes.turn(episodes.draw(2), 1, reward=1.0, anchor=77, version=3, is_valid=False),
        episodes.turn(episodes.draw(2), 1, reward=0.0, anchor=-5, version=4),
        episodes.turn(episodes.draw(2), 1, reward=4.0, anchor=77, version=4),
    ]
    first = episodes.trajectory(turns, group_id=900, episode_return=5.0, last_anchor=-5)
    other = episodes.transcript([(2, 1)], group_id=31, episode_return=-1.0)
    again = episodes.transcript([(2, 1)], group_id=900, member=1, episode_return=2.0)
    batch, _ = make_batch([first, other, again], SHAPE, seed=(0,))
    np.testing.assert_array_equal(batch.returns, [5, -1, 2, 0])
    np.testing.assert_array_equal(batch.group_ids, [0, 1, 0, -1])
    np.testing.assert_array_equal(batch.trajectory_mask, [True, True, True, False])
    np.testing.assert_array_equal(batch.turn_rewards[0], [1, 0, 4])
    np.testing.assert_array_equal(batch.turn_valid[0], [False, True, True])
    np.testing.assert_array_equal(batch.versions[0], [3, 4, 4])
    assert batch.anchor_ids[0, 0] == batch.anchor_ids[0, 2] != batch.anchor_ids[0, 1]
    np.testing.assert_array_equal(batch.anchor_ids[1:, 1:], -1)
    np.testing.assert_array_equal(batch.last_anchor_ids, [batch.anchor_ids[0, 1], -1, -1, -1])


def test_more_rows_than_room_double_the_room():
    """Eight rows of 32 hold 8 windows of 17 to 32 tokens; 9 of them need twice the room, 17 four times."""
    shape = dataclasses.replace(SHAPE, trajectories=17)
    sizes = {}
    for count in (8, 9, 16, 17):
        trajectories = [Episodes(i).window([(16, 4)], member=i) for i in range(count)]
        batch, layout = make_batch(trajectories, shape, seed=(0,))
        assert layout.num_rows == count
        sizes[count] = len(batch.tokens)
    assert sizes == {8: 8, 9: 16, 16: 16, 17: 32}


def row_contents(batch):
    """Rows as sets of what does not depend on numbering."""
    names = ("tokens", "loss_mask", "positions", "turn_ids", "behavior_logprobs")
    rows = zip(*(getattr(batch, name).tolist() for name in names), strict=True)
    return sorted(str(row) for row in rows)


def test_the_order_of_trajectories_does_not_matter():
    plans = [(True, [(3, 2), (2, 2)]), (False, [(5, 1), (4, 2)]), (True, [(2, 4)]), (False, [(6, 3)])]
    trajectories = make_trajectories(plans)
    forwards, _ = make_batch(trajectories, SHAPE, seed=(0, 1))
    backwards, _ = make_batch(trajectories[::-1], SHAPE, seed=(0, 1))
    sampled = [np.sort(b.tokens[b.loss_mask]) for b in (forwards, backwards)]
    np.testing.assert_array_equal(*sampled)
    np.testing.assert_array_equal(np.sort(forwards.returns), np.sort(backwards.returns))
    # Equal lengths pack alike, so rows are the same up to the order of their segments.
    totals = [np.sort((b.segment_ids > 0).sum(axis=1)) for b in (forwards, backwards)]
    np.testing.assert_array_equal(*totals)


def test_the_seed_decides_the_order_of_rows_and_nothing_else():
    episodes = Episodes()
    trajectories = [episodes.window([(16, 4)], member=i) for i in range(4)]
    batches = [make_batch(trajectories, SHAPE, seed=seed)[0] for seed in ((0, 1), (0, 1), (0, 2))]
    np.testing.assert_array_equal(batches[0].tokens, batches[1].tokens)
    assert not np.array_equal(batches[0].tokens, batches[2].tokens)
    assert row_contents(batches[0]) == row_contents(batches[2])


def test_an_empty_batch():
    batch, layout = make_batch([], SHAPE, seed=(0,))
    assert layout.bounds == () and layout.num_rows == layout.num_tokens == 0
    assert batch.tokens.shape == (8, 32)
    assert not batch.loss_mask.any() and np.all(batch.minibatch_ids == -1) and np.all(batch.group_ids == -1)


def test_what_does_not_fit_is_refused():
    episodes = Episodes()
    with pytest.raises(ValueError, match="5 trajectories do not fit a batch of 4"):
        make_batch([episodes.window([(2, 1)])] * 5, SHAPE, seed=(0,))
    with pytest.raises(ValueError, match=r"4 turns exceeds env.max_turns=3"):
        make_batch([episodes.window([(2, 1)] * 4)], SHAPE, seed=(0,))
    discarded = episodes.window(
        [(2, 1)], group_id=5, member=1, outcome=Outcome(Status.DISCARDED, "env_error")
    )
    with pytest.raises(ValueError, match="group 5 member 1 was discarded"):
        make_batch([discarded], SHAPE, seed=(0,))


def test_actions_and_milestones_have_their_place():
    """Equal actions have equal numbers over the whole batch; one that is not known is -1."""
    episodes = Episodes()
    told = (("go", False), (None, False), ("", True)), (("", False), ("go", True))
    made = [
        episodes.trajectory(
            [episodes.turn(episodes.draw(2), 1, action=action, milestone=hit) for action, hit in turns],
            is_success=number == 0,
        )
        for number, turns in enumerate(told)
    ]
    batch, _ = make_batch(made, BatchShape(3, 4, 16, 1, 8, 1), seed=(0,))
    assert batch.action_ids.tolist() == [[0, -1, 1, -1], [1, 0, -1, -1], [-1] * 4]
    assert batch.milestones[:2, :3].tolist() == [[False, False, True], [False, True, False]]
    assert batch.success.tolist() == [True, False, False]
