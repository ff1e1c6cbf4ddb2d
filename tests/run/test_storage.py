"""Trajectories survive storage exactly."""

import dataclasses
import json

import numpy as np

from empg_jax.run.storage import pack_trajectories, unpack_trajectories
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes


def assert_same(one, other):
    for field in dataclasses.fields(one):
        if field.name != "turns":
            assert getattr(one, field.name) == getattr(other, field.name), field.name
    assert len(one.turns) == len(other.turns)
    for turn, again in zip(one.turns, other.turns, strict=True):
        for field in dataclasses.fields(turn):
            value, restored = getattr(turn, field.name), getattr(again, field.name)
            if isinstance(value, np.ndarray):
                assert restored.dtype == value.dtype
                np.testing.assert_array_equal(restored, value)
            else:
                assert restored == value, field.name


def test_round_trip():
    episodes = Episodes()
    odd = episodes.turn(
        episodes.draw(3), 2, reward=0.1, version=7, anchor=2**62, is_valid=False, finish_reason="length"
    )
    odd = dataclasses.replace(
        odd,
        action="",
        milestone=True,
        answer_logprob=-1.25,
        observation='You see\n"a" 苹果',
        response="",
        behavior_logprobs=np.float32([-1e-30, -np.pi]),
    )
    trajectories = [
        episodes.transcript(
            [(4, 2), (3, 1)], task=5, group_id=2**40, member=3, metrics={"goals": 0.25}, group="pick"
        ),
        episodes.trajectory(
            [odd],
            split="valid",
            outcome=Outcome(Status.SCORED_ZERO, "turn_limit", "too long"),
            is_success=False,
            terminated=False,
            truncated=True,
            episode_return=0.0,
            last_anchor=2**63 + 1,
            last_observation="Nothing happens.",
            answer=("<answer>", "Norwich"),
        ),
        episodes.window([(1, 1)]),
    ]
    header, arrays = pack_trajectories(trajectories)
    assert all(isinstance(a, np.ndarray) and a.ndim == 1 for a in arrays.values())
    for one, other in zip(trajectories, unpack_trajectories(header, arrays), strict=True):
        assert_same(one, other)


def test_a_long_episode_takes_no_more_room_than_its_tokens():
    episode = Episodes().transcript([(60, 60)] * 50)
    header, arrays = pack_trajectories([episode])
    assert len(arrays["prompt_tokens"]) == 50 * 60
    (found,) = unpack_trajectories(header, arrays)
    assert_same(found, episode)
    assert len({id(turn.prompt_tokens.base) for turn in found.turns[:-1]}) == 1  # all are views of one array


def test_a_prompt_that_leaves_out_what_was_said_comes_back_whole():
    episodes = Episodes()
    first = episodes.turn([1, 2, 3], 2)
    response = first.response_tokens
    others = [[1, 2, 3, *response, 9], [1, 2, 3, *response[:1]], [1, 2], [], [1, 2, 3, *response, 9, 8]]
    episode = episodes.trajectory([first, *(episodes.turn(each, 1) for each in others)])
    header, arrays = pack_trajectories([episode])
    assert arrays["prompt_tokens"].tolist() == [1, 2, 3, 9, 1, 2, 3, *response, 9, 8]
    assert_same(unpack_trajectories(header, arrays)[0], episode)


def test_files_of_versions_with_whole_prompts_are_read():
    episode = Episodes().transcript([(4, 2), (3, 1)])
    header, arrays = pack_trajectories([episode])
    older = json.loads(header)
    for told, turn in zip(older[0]["turns"], episode.turns, strict=True):
        del told["repeated"]
        told["lengths"][0] = len(turn.prompt_tokens)
    arrays["prompt_tokens"] = np.concatenate([turn.prompt_tokens for turn in episode.turns])
    assert_same(unpack_trajectories(json.dumps(older), arrays)[0], episode)


def test_files_of_versions_without_groups_and_ends_are_read():
    header, arrays = pack_trajectories([Episodes().transcript([(2, 1)])])
    later = ("group", "last_anchor", "last_observation", "answer")
    older = [{key: value for key, value in each.items() if key not in later} for each in json.loads(header)]
    (found,) = unpack_trajectories(json.dumps(older), arrays)
    assert found.group == "" and found.last_anchor is None


def test_files_of_versions_without_actions_are_read():
    header, arrays = pack_trajectories([Episodes().transcript([(2, 1)])])
    older = json.loads(header)
    for turn in older[0]["turns"]:
        del turn["action"], turn["milestone"], turn["answer_logprob"]
    (turn,) = unpack_trajectories(json.dumps(older), arrays)[0].turns
    assert turn.action is None and turn.milestone is False


def test_nothing_at_all():
    assert unpack_trajectories(*pack_trajectories([])) == []
