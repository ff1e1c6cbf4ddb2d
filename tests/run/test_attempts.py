"""The file of an evaluation in progress."""

import errno

import pytest

from empg_jax import files
from empg_jax.errors import RunError
from empg_jax.report.pairing import EPISODES
from empg_jax.run import attempts
from empg_jax.run.attempts import Attempts
from empg_jax.types import Outcome, Status
from tests.episodes import Episodes

FILES = sorted([EPISODES, "eval.json", "eval.md"])
OUTCOME = Outcome(Status.TRAINED, "won")
DETAIL = "one\u2028two\x85three\x0bfour"  # Python splits lines at these characters, JSON does not


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def append(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(attempts, "append", append)
    episode = Episodes(0).window([(3, 2)], group_id=0, outcome=Outcome(Status.TRAINED, "won"))
    with Attempts(tmp_path, "id") as kept, pytest.raises(RunError, match="cannot be written: No space left"):
        kept.keep(episode)


def test_only_damaged_lines_are_run_again_whatever_texts_hold(tmp_path):
    outcome = Outcome(Status.TRAINED, "won", DETAIL)
    episodes = [Episodes(k).window([(3, 2)], group_id=k, outcome=outcome) for k in range(5)]
    with Attempts(tmp_path, "id") as kept:
        for episode in episodes:
            kept.keep(episode)
    (path,) = tmp_path.iterdir()
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:40]
    path.write_bytes(b"\n".join(lines[:-1]) + b'\n{"group_id": 7')
    for _ in range(2):  # the file is written anew
        with Attempts(tmp_path, "id") as kept:
            assert [episode.group_id for episode in kept.done] == [0, 1, 3, 4]
            assert {episode.outcome.detail for episode in kept.done} == {DETAIL}
    with Attempts(tmp_path, "id") as kept:
        kept.keep(episodes[2])
        kept.finish([*kept.done, episodes[2]], {})
    assert sorted(each.name for each in tmp_path.iterdir()) == FILES
    assert (tmp_path / EPISODES).read_bytes().count(b"\n") == 5


def test_the_same_evaluation_a_second_time_is_refused_until_the_first_ends(tmp_path):
    episode = Episodes(0).window([(3, 2)], group_id=0, outcome=Outcome(Status.TRAINED, "won"))
    with Attempts(tmp_path, "id") as first:
        first.keep(episode)
        with pytest.raises(RunError, match=r"the same evaluation is in progress in .*: wait .*--out"):
            Attempts(tmp_path, "id")
        with Attempts(tmp_path, "other") as other:  # of another policy, for example
            other.finish([], {})
    with Attempts(tmp_path, "id") as again:
        assert len(again.done) == 1
        again.finish(again.done, {})
    assert sorted(each.name for each in tmp_path.iterdir()) == FILES


def test_an_evaluation_without_room_replaces_no_file_of_an_older_one(tmp_path, monkeypatch):
    episodes = [Episodes(k).window([(3, 2)], group_id=k, outcome=OUTCOME) for k in range(2)]
    with Attempts(tmp_path, "old") as kept:
        kept.finish(episodes[:1], {"step": 1})
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    with Attempts(tmp_path, "new") as kept:
        kept.keep(episodes[1])
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", _find_no_space)
            with pytest.raises(RunError, match=r"cannot take its files: No space left .* the same command"):
                kept.finish(episodes, {"step": 2})
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    with Attempts(tmp_path, "new") as kept:
        assert len(kept.done) == 1


def _find_no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
