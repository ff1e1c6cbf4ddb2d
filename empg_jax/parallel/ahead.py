"""Compilation of many programs side by side, before any of them runs.

`warm_up` gets a function of ``call`` that says ``call(program, *args)`` for every program, with what those
before it return. It is used twice. First nothing runs: programs are traced one after the other, and threads
compile them meanwhile. Then each runs once, for whatever else the first call of a program makes ready. A
compiler keeps one or two cores busy, and a GPU's waits for the kernels that it tries out, so a machine of
many cores has all programs in little more time than the longest one takes.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

Call = Callable[..., Any]

MOST_THREADS = 16  # a compiler of large programs takes gigabytes
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's share of CPU time, and the period that it is of


def warm_up(call_all: Callable[[Call], None], check: Callable[[], None]) -> None:
    """Compile all jitted programs that a function calls, side by side, then run each of them.

    Args:
      call_all: calls its argument with every program and its arguments. While nothing runs, it gets the
        shapes, types and shardings of the program's results; None where the program is a plain function.
      check: called for each program when its compilation is waited for; it may raise to end the warm-up.
    """
    _compile_all(call_all, check)
    call_all(lambda program, *args: program(*args))


def _compile_all(call_all: Callable[[Call], None], check: Callable[[], None]) -> None:
    pool, jobs = ThreadPoolExecutor(min(count_cores(), MOST_THREADS), "compile"), list[Future[Any]]()
    try:
        call_all(functools.partial(_lower, pool, jobs))
        for job in jobs:
            check()
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)  # what compiles now is waited for: it cannot be stopped


def _lower(pool: ThreadPoolExecutor, jobs: list[Future[Any]], program: Any, *args: Any) -> Any:
    """Trace a program here, as its caller's settings are this thread's, and have it compiled in the pool."""
    bound: dict[str, Any] = {}
    if isinstance(program, functools.partial):
        program, args, bound = program.func, (*program.args, *args), program.keywords
    if not hasattr(program, "trace"):
        return None
    traced = program.trace(*args, **bound)
    jobs.append(pool.submit(traced.lower().compile))
    return traced.out_info


def count_cores() -> int:
    """Count the cores that this process may use, where the system tells; else those of the machine."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # there is no such file, or no limit ("max")
        time, period = map(int, QUOTA.read_text().split())
        cores = min(cores, -(-time // period))
    return cores
