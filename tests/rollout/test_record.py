"""Episode records: what training writes is read back; what cannot be used is named by line and field."""

import gzip
import json

import numpy as np
import pytest

from empg_jax.learner.batching import merge_turns
from empg_jax.rollout.record import (
    RecordError,
    as_number,
    describe_episodes,
    make_trajectory,
    read_episodes,
)
from empg_jax.types import Outcome, Status, TurnCredit
from tests.episodes import Episodes

TURN = {"reward": 1.0, "valid": True, "tokens": 2, "entropy": 0.5}


def write(tmp_path, *records, name="episodes.jsonl"):
    path = tmp_path / name
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    return path


def make_credit(trajectories):
    """A table whose numbers tell their place."""
    size = (len(trajectories), 3)
    base = np.arange(size[0] * size[1], dtype=np.float32).reshape(size)
    return TurnCredit(base / 7, base + 0.1, base + 0.2, base + 0.3, base + 0.4, np.ones(size, bool))


def test_the_detail_of_an_outcome_comes_back(tmp_path):
    episodes = Episodes()
    outcome = Outcome(Status.TRAINED, "suspect", "canary: tests/test_a.py::test_b PASSED")
    trajectory = episodes.trajectory(
        [episodes.turn([1], 2)], outcome=outcome, is_success=False, episode_return=0
    )
    (record,) = describe_episodes([trajectory], None, update=1)
    assert (record["reason"], record["detail"]) == ("suspect", outcome.detail)
    (read,) = read_episodes(write(tmp_path, record))
    found = make_trajectory(read, is_transcript=True)
    assert found.outcome == outcome


def test_an_episode_as_the_contract_says():
    episodes = Episodes()
    turns = [
        episodes.turn([1], 2, reward=0.25, anchor=255, version=11, observation="a room", response="go"),
        episodes.turn([1], 1, is_valid=False, finish_reason="length"),
    ]
    trajectory = episodes.trajectory(
        turns,
        group_id=96,
        member=3,
        task=411,
        episode_return=0.25,
        metrics={"score": 2.0, "bad": float("nan")},
    )
    (record,) = describe_episodes([trajectory], make_credit([trajectory]), update=12)
    first, second = record.pop("turns")
    assert record == {
        **{"update": 12, "group_id": 96, "member": 3, "task": 411, "split": "train", "status": "trained"},
        **{"reason": "won", "return": 0.25, "success": True, "terminated": True, "truncated": False},
        "metrics": {"score": 2.0, "bad": None},
    }
    assert first == {
        **{"observation": "a room", "response": "go", "reward": 0.25, "valid": True, "finish_reason": "stop"},
        **{"version": 11, "tokens": 2, "entropy": 0.0, "logprob": -0.0014648438},
        "anchor": "00000000000000ff",
        **{"factor": 0.2, "bonus": 0.3, "advantage_base": 0.1, "advantage": 0.4},
    }
    assert (second["valid"], second["finish_reason"], second["factor"]) == (False, "length", 1.2)
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -1e-30, 12345.678, 7])
def test_a_number_is_short_and_exact(value):
    assert np.float32(as_number(np.float32(value))) == np.float32(value)
    assert len(repr(as_number(np.float32(value)))) <= 14


@pytest.mark.parametrize("name", ["episodes.jsonl", "episodes.jsonl.gz"])
def test_four_fields_of_a_turn_are_enough(tmp_path, name):
    path = write(
        tmp_path, {"turns": [TURN, TURN]}, {"turns": [TURN]}, {"task": 4, "turns": [TURN]}, name=name
    )
    records = read_episodes(path)
    assert [(r["group_id"], r["member"]) for r in records] == [(0, 0), (0, 1), (4, 0)]
    trajectory = make_trajectory(records[0], is_transcript=True)
    assert trajectory.episode_return == 2.0 and trajectory.outcome.status is Status.TRAINED
    assert trajectory.terminated and not trajectory.truncated and not trajectory.is_success
    first, second = trajectory.turns
    assert (len(first.response_tokens), first.entropies.tolist(), first.version) == (2, [0.5, 0.5], 0)
    assert first.anchor != second.anchor  # nothing says that the states are the same
    assert trajectory.last_anchor is None  # as in files of older versions


def test_context_decides_the_rows(tmp_path):
    (record,) = read_episodes(write(tmp_path, {"turns": [TURN] * 3}))
    transcript, window = (make_trajectory(record, is_transcript=flag) for flag in (True, False))
    assert [segment.loss_mask.sum() for segment in merge_turns(transcript, 0)] == [6]
    assert [segment.loss_mask.sum() for segment in merge_turns(window, 0)] == [2, 2, 2]


def test_what_training_wrote_is_read_back(tmp_path):
    episodes = Episodes()
    made = episodes.trajectory(
        [episodes.turn([1], 2, reward=0.5, anchor=3, version=2), episodes.turn([1], 2, anchor=3)],
        group_id=7,
        member=1,
        episode_return=0.5,
        truncated=True,
        terminated=False,
        outcome=Outcome(Status.SCORED_ZERO, "context_limit"),
        group="pick",
        last_anchor=3,
        last_observation="a wall",
    )
    path = write(tmp_path, *describe_episodes([made], make_credit([made]), update=1))
    found = make_trajectory(read_episodes(path)[0], is_transcript=False)
    assert found.outcome == made.outcome and found.truncated and not found.terminated
    assert (found.group_id, found.member, found.episode_return) == (7, 1, 0.5)
    assert found.group == "pick"
    assert found.turns[0].anchor == found.turns[1].anchor == found.last_anchor
    assert found.last_observation == "a wall"
    assert [turn.version for turn in found.turns] == [2, 0]


def without(name):
    return {key: value for key, value in TURN.items() if key != name}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"turns": [TURN, without("entropy")]}, r"line 2, turns\[1\]\.entropy: missing; expected a number"),
        ({"turns": [TURN | {"reward": "1"}]}, r'turns\[0\]\.reward: expected a number, got "1"'),
        ({"turns": [TURN | {"entropy": None}]}, r"turns\[0\]\.entropy: missing; expected a number"),
        ({"turns": [TURN | {"valid": 1}]}, r"turns\[0\]\.valid: expected true or false, got 1"),
        ({"turns": [TURN | {"tokens": True}]}, r"turns\[0\]\.tokens: expected an integer, got true"),
        ({"turns": [TURN | {"tokens": 0}]}, r"turns\[0\]\.tokens: expected 1 to 1048576, got 0"),
        ({"turns": [TURN | {"token_entropies": [0.1]}]}, r"token_entropies: 1 values for 2 tokens"),
        ({"turns": [TURN | {"token_ids": [1, 2**31]}]}, r"token_ids: expected .* 32 bits, got 2147483648"),
        ({"turns": [TURN | {"version": 2**31}]}, r"version: expected .* 32 bits, got 2147483648"),
        (
            {"turns": [TURN | {"token_ids": [1, None]}]},
            r"token_ids: expected .* integers of 32 bits, got null among",
        ),
        ({"turns": [7]}, r"turns\[0\]: expected an object"),
        ({"turns": []}, r"turns: expected at least one turn"),
        ({}, r"turns: missing; expected a list of turns"),
        ([TURN], r"expected one JSON object"),
        ({"turns": [TURN], "group_id": 1.5}, r"group_id: expected an integer, got 1\.5"),
        (
            {"turns": [TURN], "status": "discarded"},
            r"status: expected trained or scored_zero, got 'discarded'",
        ),
        ({"turns": [TURN], "return": 5.0}, r"return: 5 is not the sum of the turns' rewards, 1"),
        ({"turns": [TURN], "group_id": 0, "member": 0}, r"member 0 of group 0 occurs twice"),
    ],
)
def test_bad_records_are_named_by_line_and_field(tmp_path, record, says):
    path = write(tmp_path, {"turns": [TURN], "group_id": 0, "member": 0}, record)
    with pytest.raises(RecordError, match=says) as caught:
        read_episodes(path)
    assert str(caught.value).startswith(f"{path}, line 2")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no episodes"),
        (b'{"turns": [\n', "line 1: not JSON"),
        (b"[" * 100_000, "line 1: not JSON"),
        (b"\xff\xfe\n", "cannot be read"),
    ],
)
def test_files_that_hold_no_records(tmp_path, content, says):
    path = tmp_path / "episodes.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=says):
        read_episodes(path)


def test_a_missing_and_a_damaged_file(tmp_path):
    with pytest.raises(RecordError, match="no such file"):
        read_episodes(tmp_path / "none.jsonl")
    path = write(tmp_path, *[{"turns": [TURN]}] * 50, name="cut.jsonl.gz")
    whole = path.read_bytes()
    for damaged in (whole[:-12], whole[:12] + b"\xff" * 20 + whole[32:]):  # cut; other bytes in its middle
        path.write_bytes(damaged)
        with pytest.raises(RecordError, match=r"cut\.jsonl\.gz: cannot be read"):
            read_episodes(path)


def test_tasks_of_one_number_in_two_splits_are_two_groups(tmp_path):
    places = [("train", 0), ("test", 0), ("train", 1), ("test", 0), ("test", 1), ("train", 0)]
    records = [{"turns": [TURN], "split": split, "task": task} for split, task in places]
    found = read_episodes(write(tmp_path, *records))
    assert [(r["group_id"], r["member"]) for r in found] == [(0, 0), (2, 0), (1, 0), (2, 1), (3, 0), (0, 1)]


def test_records_without_a_number_take_free_ones(tmp_path):
    """A group that is given holds no others; a member that is given keeps its number."""
    given = [
        {"group_id": 0, "task": 7, "member": 1},
        {"task": 0},
        {"group_id": 0, "task": 7},
        {"group_id": 0, "task": 7},
        {"task": 0, "member": 0},
        {"task": 3},
    ]
    found = read_episodes(write(tmp_path, *[record | {"turns": [TURN]} for record in given]))
    assert [(r["group_id"], r["member"]) for r in found] == [(0, 1), (8, 1), (0, 0), (0, 2), (8, 0), (3, 0)]


def test_a_number_too_large_for_float32_is_none():
    assert as_number(1e40) is as_number(-1e39) is as_number(float("nan")) is None and as_number(3e38) == 3e38


def test_not_a_number_is_no_number(tmp_path):
    path = tmp_path / "episodes.jsonl"
    path.write_text('{"turns": [{"reward": NaN, "valid": true, "tokens": 2, "entropy": 0.5}]}\n')
    with pytest.raises(RecordError, match=r"turns\[0\]\.reward: expected a number, got NaN"):
        read_episodes(path)


def test_action_and_milestone_come_back():
    """Without an action the response stands for it; without both it is not known."""
    episodes = Episodes()
    told = [{"action": "go", "milestone": True, "answer_logprob": -0.5}, {"action": "", "response": "hm"}]
    turns = [episodes.turn([1], 1, **fields) for fields in told]
    trajectory = episodes.trajectory(turns, episode_return=0.0)
    (record,) = describe_episodes([trajectory], make_credit([trajectory]), update=1)
    found = make_trajectory(record, is_transcript=True).turns
    assert [(turn.action, turn.milestone) for turn in found] == [("go", True), ("", False)]
    assert [turn.answer_logprob for turn in found] == [-0.5, None]
    for turn in record["turns"]:
        del turn["action"]
    again = make_trajectory(record, is_transcript=True).turns
    assert [turn.action for turn in again] == ["", "hm"]
    del record["turns"][0]["response"]
    assert make_trajectory(record, is_transcript=True).turns[0].action is None
