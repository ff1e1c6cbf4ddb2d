"""The list of consumed groups: one line each, cut back to where a run goes on."""

import json

import numpy as np

from empg_jax.run.consumed import drop_consumed, read_consumed, write_consumed
from tests.episodes import Episodes

EPISODES = Episodes()


def batch(*groups):
    return [
        EPISODES.trajectory(
            [EPISODES.turn([1], 1, version=member + turn) for turn in range(2)],
            task=10 + group,
            group_id=group,
            member=member,
        )
        for group in groups
        for member in range(2)
    ]


def test_a_line_per_group_with_its_versions(tmp_path):
    write_consumed(tmp_path, 1, batch(0, 3))
    write_consumed(tmp_path, 2, batch(1))
    lines = [json.loads(line) for line in (tmp_path / "consumed.jsonl").read_text().splitlines()]
    assert lines == list(read_consumed(tmp_path))
    assert [(line["update"], line["group_id"], line["task"]) for line in lines] == [
        (1, 0, 10),
        (1, 3, 13),
        (2, 1, 11),
    ]
    first = {"split": "train", "members": [0, 1], "version_min": 0, "version_max": 2}
    assert first.items() <= lines[0].items()


def test_the_newest_version_is_that_of_any_token(tmp_path):
    """Weights that arrive in the middle of a response are newer than its turn's version."""
    turns = [EPISODES.turn([1], 3, version=4, versions=np.array([4, 4, 6], np.int32)), EPISODES.turn([1], 1)]
    write_consumed(tmp_path, 1, [EPISODES.trajectory(turns)])
    (line,) = read_consumed(tmp_path)
    assert (line["version_min"], line["version_max"]) == (0, 6)


def test_what_will_be_repeated_or_is_not_whole_is_removed(tmp_path):
    drop_consumed(tmp_path, after=0)  # there is none yet
    for update in (1, 2, 3):
        write_consumed(tmp_path, update, batch(update))
    with (tmp_path / "consumed.jsonl").open("ab") as file:
        file.write(b'{"update": 4, "gro')
    drop_consumed(tmp_path, after=2)
    assert [line["update"] for line in read_consumed(tmp_path)] == [1, 2]
    write_consumed(tmp_path, 3, batch(3))
    assert [line["update"] for line in read_consumed(tmp_path)] == [1, 2, 3]
