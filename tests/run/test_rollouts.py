"""Files of training episodes: when they are written, and what a resumed run finds of them."""

import gzip
import json

import pytest

from empg_jax.run.rollouts import drop_rollouts, is_due, rollouts_path, select_samples, write_rollouts
from empg_jax.types import Outcome, Status, Trajectory


@pytest.mark.parametrize(
    ("every", "last", "due"),
    [(10, 25, [1, 10, 20, 25]), (0, 25, []), (1, 3, [1, 2, 3]), (100, 5, [1, 5])],
)
def test_the_first_the_last_and_every_so_many(every, last, due):
    assert [update for update in range(1, last + 1) if is_due(update, every=every, last=last)] == due


def test_records_are_lines_of_utf8_and_equal_episodes_equal_files(tmp_path):
    records = [{"observation": "eine Tür"}, {"observation": "a door"}]
    path = write_rollouts(tmp_path, 12, records)
    assert path == tmp_path / "rollouts" / "update-000012.jsonl.gz"
    content = path.read_bytes()
    assert "Tür" in gzip.decompress(content).decode()
    assert [json.loads(line) for line in gzip.decompress(content).splitlines()] == records
    assert write_rollouts(tmp_path, 12, records).read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    drop_rollouts(tmp_path, after=0)  # there is no folder yet
    for update in (1, 10, 20):
        write_rollouts(tmp_path, update, [])
    (tmp_path / "rollouts" / ".update-000030.jsonl.gz.77.tmp").write_bytes(b"half")
    drop_rollouts(tmp_path, after=10)
    assert sorted((tmp_path / "rollouts").iterdir()) == [rollouts_path(tmp_path, n) for n in (1, 10)]


def _trajectory(task, *, is_success, turns=(None,)):
    outcome = Outcome(Status.TRAINED, "won" if is_success else "turn_limit")
    return Trajectory(
        task=task,
        split="test",
        group_id=task,
        member=0,
        turns=turns,
        outcome=outcome,
        episode_return=1.0,
        is_success=is_success,
        terminated=is_success,
        truncated=not is_success,
    )


def test_samples_are_half_solved_half_not():
    panel = [_trajectory(task, is_success=task in (0, 1, 2, 3, 6)) for task in range(8)]
    panel.append(_trajectory(8, is_success=True, turns=()))
    assert [sample.task for sample in select_samples(panel, 4)] == [0, 1, 4, 5]
    assert [sample.task for sample in select_samples(panel[:4], 3)] == [0, 1, 2]
    assert [sample.task for sample in select_samples(panel[4:6], 3)] == [4, 5]
    assert len(select_samples(panel, 99)) == 8 and select_samples(panel, 0) == []
