"""Shared beginnings: which segments share what, how they are packed, and that nothing is lost."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.learner.batching import BatchShape, find_tokens, make_batch, merge_turns
from empg_jax.learner.sharing import SHORTEST, Family, find_families, pack_families
from tests.episodes import Episodes

ROW = 128
SHAPE = BatchShape(
    trajectories=16, turns=3, row_tokens=ROW, micro_rows=2, max_rows=24, num_minibatches=2, shares_prefix=True
)


def make_group(episodes, rules, task, plans, group):
    """Attempts that begin with the rules and the task; a plan is a transcript or windows of own lengths."""
    made = []
    for member, (is_transcript, own) in enumerate(plans):
        prompt, turns = np.concatenate([rules, task]), []
        for size, response in own:
            prompt = np.concatenate([prompt, episodes.draw(size)])
            turns.append(episodes.turn(prompt, response))
            prompt = np.concatenate([prompt, turns[-1].response_tokens]) if is_transcript else rules
        made.append(episodes.trajectory(turns, group_id=group, member=member, episode_return=float(member)))
    return made


OWN = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=3)
GROUP = st.tuples(st.integers(0, 40), st.lists(st.tuples(st.booleans(), OWN), min_size=1, max_size=4))


@st.composite
def draw_trajectories(draw):
    episodes = Episodes()
    rules = episodes.draw(draw(st.integers(1, 30)))
    groups = draw(st.lists(GROUP, max_size=4))
    return [
        trajectory
        for number, (size, plans) in enumerate(groups)
        for trajectory in make_group(episodes, rules, episodes.draw(size), plans, number)
    ]


# ----------------------------------------------------------------------------------------- families


def tokens(*spans):
    return np.concatenate([np.arange(start, stop) for start, stop in spans]).astype(np.int32)


def test_the_beginning_that_saves_more_is_shared():
    """Two tasks of three attempts each, with common rules: the task's prompt is longer than the rules."""
    rules, first, second = (0, 20), (100, 150), (200, 250)
    begins = [tokens(rules, task) for task in (first, second, first, second, first, second)]
    assert find_families(begins) == [Family((0, 2, 4), 70), Family((1, 3, 5), 70)]
    # With one attempt of most tasks, the rules are what they have in common.
    begins = [tokens(rules, (1000 * n, 1000 * n + 30)) for n in range(1, 5)] + [begins[0]]
    assert find_families(begins) == [Family((4, 0, 1, 2, 3), 20)]


def test_a_few_common_tokens_are_not_shared():
    begins = [tokens((0, SHORTEST - 1), (100, 150)), tokens((0, SHORTEST - 1), (200, 250)), tokens((0, 4))]
    assert sorted(family.items for family in find_families(begins)) == [(0,), (1,), (2,)]
    assert find_families([]) == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), max_size=30), max_size=12))
def test_families_share_what_they_say_and_hold_every_segment(begins):
    begins = [np.repeat(np.array(begin, np.int32), 4) for begin in begins]
    families = find_families(begins)
    assert sorted(item for family in families for item in family.items) == list(range(len(begins)))
    for family in families:
        assert family.length == 0 if len(family.items) == 1 else family.length >= SHORTEST
        assert len({begins[item][: family.length].tobytes() for item in family.items}) == 1
        assert all(len(begins[item]) >= family.length for item in family.items)


def test_a_family_is_divided_where_a_row_is_full():
    """Four of its five segments fit behind one trunk; the fifth stands alone, with all of its tokens."""
    families = [Family((0, 1, 2, 3, 4), 30), Family((5,))]
    rows = pack_families(families, [45, 40, 40, 40, 40, 40], 80)
    assert rows == [[Family((0, 1, 2, 3), 30)], [Family((4,)), Family((5,))]]


# ------------------------------------------------------------------------------------------- batches


def read_back(batch):
    """Every segment of the batch by its number, each field with what its trunk holds before it."""
    found = {}
    for b in range(len(batch.tokens)):
        ids = batch.segment_ids[b]
        assert np.all(np.diff(ids[ids > 0]) >= 0) and np.all(np.diff((ids > 0).astype(int)) <= 0)
        for number in range(1, ids.max(initial=0) + 1):
            own = np.flatnonzero(ids == number)
            (sequence,), (trunk,) = set(batch.sequence_ids[b, own]), set(batch.trunk_ids[b, own])
            if sequence < 0:  # a trunk, and more than one segment continues it
                assert trunk == -1 and not batch.loss_mask[b, own].any()
                assert len(set(ids[batch.trunk_ids[b] == number])) > 1
                continue
            assert trunk < number  # its trunk stands before it
            whole = np.concatenate([np.flatnonzero((ids == trunk) & (trunk > 0)), own])
            assert sequence not in found
            np.testing.assert_array_equal(batch.positions[b, whole], np.arange(len(whole)))
            assert not batch.loss_mask[b, own[0]]  # what is sampled has its predecessor in the same segment
            found[int(sequence)] = batch.tokens[b, whole], batch.loss_mask[b, whole]
    return found


@settings(max_examples=60, deadline=None)
@given(draw_trajectories(), st.integers(0, 2))
def test_every_segment_can_be_read_back(trajectories, seed):
    batch, layout = make_batch(trajectories, SHAPE, seed=(seed,))
    segments = [s for i, trajectory in enumerate(trajectories) for s in merge_turns(trajectory, i)]
    found = read_back(batch)
    assert sorted(found) == list(range(len(segments)))
    for number, segment in enumerate(segments):
        np.testing.assert_array_equal(found[number][0], segment.tokens)
        np.testing.assert_array_equal(found[number][1], segment.loss_mask)
    assert layout.num_tokens == np.sum(batch.segment_ids > 0)
    assert layout.num_tokens + layout.num_shared == sum(len(s.tokens) for s in segments)
    alone, plain = make_batch(trajectories, dataclasses.replace(SHAPE, shares_prefix=False), seed=(seed,))
    assert plain.num_shared == 0 and np.all(alone.trunk_ids == -1)
    assert len(plain.bounds) == len(layout.bounds)
    for step in range(len(plain.bounds)):  # the same episodes in the same optimizer step
        owned = [
            set(b.trajectory_ids[b.loss_mask & (b.minibatch_ids == step)[:, None]]) for b in (alone, batch)
        ]
        assert owned[0] == owned[1]
    # Scores move between layouts, whatever is shared in either.
    for before in (alone, make_batch(trajectories, SHAPE, seed=(seed, 1))[0]):
        places = find_tokens(before, batch)
        moved = np.where(places >= 0, before.tokens.ravel()[places], 0)
        np.testing.assert_array_equal(moved[batch.loss_mask], batch.tokens[batch.loss_mask])
        np.testing.assert_array_equal(moved[places >= 0], batch.tokens[places >= 0])


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_rows_of_several_episodes_need_no_more_room_than_planned(num_rows):
    """A new row is begun only where no other has room for a whole episode of the old length."""
    episodes = Episodes()
    rules = episodes.draw(20)
    plans = [[(True, [(40 - 2 * member, 3 + member)]) for member in range(8)] for _ in range(2)]
    made = [t for n, p in enumerate(plans) for t in make_group(episodes, rules, rules[:0], p, n)]
    shape = dataclasses.replace(SHAPE, row_tokens=64 * num_rows, micro_rows=1, num_minibatches=1)
    _, layout = make_batch(made, shape, seed=(0,))
    assert layout.num_rows <= -(-16 // max(num_rows - 1, 1))
    assert layout.num_shared > 0 or num_rows == 1
