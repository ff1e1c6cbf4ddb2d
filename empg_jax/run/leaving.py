"""The end of a run that did not come to a stopping point in time: what it says, and what is left of it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from empg_jax.report.events import EventLog


def leave(run_dir: Path, directory: Path, events: EventLog, signum: int, why: str) -> None:
    """Name the newest complete checkpoint and the way on, before the process ends without unwinding.

    A checkpoint that is just being written does not count: it gets its name when it is complete.

    Args:
      run_dir: the run's folder.
      directory: the folder of its checkpoints.
      events: the run's event log.
      signum: the signal that asked for the stop.
      why: why the run does not end in its own way.
    """
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    newest = max(steps, default=None)
    left = "there is no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
    with contextlib.suppress(OSError, ValueError):
        events.tell("stop_forced", signal=signum, reason=why, checkpoint=newest)
    # Not by a stream or the display: the main thread may hold their locks for ever.
    line = f"stopped by signal {signum} ({why}): {left}; go on with: empg-jax train --resume {run_dir}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())
