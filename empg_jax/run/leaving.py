"""The end of a run that did not come to a stopping point in time: what it says, and what is left of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from empg_jax.report.events import EventLog
from empg_jax.run.step_folders import is_object_store, open_step_folders


def leave(run_dir: Path, directory: Path | str, events: EventLog, signum: int, why: str) -> None:
    """Name the newest complete checkpoint and the way on, before the process ends without unwinding.

    A checkpoint that is just being written does not count: it gets its name when it is complete.

    Args:
      run_dir: the run's folder.
      directory: the folder of its checkpoints, or the URL of an object store.
      events: the run's event log.
      signum: the signal that asked for the stop.
      why: why the run does not end in its own way.
    """
    newest = None
    if is_object_store(directory):
        left = f"the checkpoints are in {directory}"  # which may not answer, and nothing waits any more
    else:
        newest = max(open_step_folders(directory).steps, default=None)
        left = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
    with contextlib.suppress(OSError, ValueError):
        events.tell("stop_forced", signal=signum, reason=why, checkpoint=newest)
    # Not by a stream or the display: the main thread may hold their locks for ever.
    line = f"stopped by signal {signum} ({why}): {left}; go on with: empg-jax train --resume {run_dir}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
