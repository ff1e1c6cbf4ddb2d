"""What is told at the end of a run that failed: the first error, whatever fails after it."""

import errno
from types import SimpleNamespace

from empg_jax.parallel.hosts import ALONE
from empg_jax.report import events
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.run.parts import RunState
from empg_jax.run.saving import save_after_error


def test_a_full_disk_does_not_hide_the_first_error(tmp_path, monkeypatch):
    def append(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(events, "append", append)
    log, said = events.EventLog(tmp_path), []
    parts = SimpleNamespace(
        hosts=ALONE,
        checkpoints=SimpleNamespace(wait=lambda: None, steps=[3]),
        events=log,
        progress=SimpleNamespace(message=said.append),
        run_dir=tmp_path,
    )
    with log:
        save_after_error(parts, RunState(state=None), CheckpointError("no space"))
    assert said == [
        f"CheckpointError: the newest checkpoint is 3; go on with: empg-jax train --resume {tmp_path}"
    ]
