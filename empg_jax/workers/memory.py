"""The memory of this machine, and the share of it that a worker may take."""

from __future__ import annotations

import os
from pathlib import Path

SHARE = 0.5  # of the memory for all workers together; the rest is the trainer's
LEAST_MB = 512  # an automatic limit must never be what keeps an ordinary environment from starting
# What a container may take, in cgroups of version 2 and 1.
GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def limit_memory(num_workers: int) -> int:
    """Return the default limit of a worker's resident memory in MiB."""
    return max(LEAST_MB, int(SHARE * machine_mb() / num_workers))


def machine_mb() -> float:
    """Return the memory in MiB that this process and its children may take."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in GROUPS:
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return min(found) / 2**20
