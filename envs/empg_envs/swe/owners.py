"""Which process a container or an image belongs to, and the removal of what ended processes left.

Several machines, or containers with process numbers of their own, may share one engine. So an owner is named
with the place where its number means something, and each place clears up after its own processes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

from empg_envs.swe.fixed import numbering

LABEL = "empg-jax.owner"
FROZEN = "empg-jax-judge"  # name of the images made of a container's files; the tag begins with the owner
SECONDS = 60.0


def owner(pid: int | None = None) -> str:
    """Name a process, by default the present one, by its place, its number and its start time."""
    pid = os.getpid() if pid is None else pid
    start = ""
    with contextlib.suppress(OSError):  # the system uses numbers again
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{_place()}.{pid}.{start}"


def is_gone(name: str) -> bool:
    """Whether an owner is a process of this place that no longer exists."""
    place, _, rest = name.partition(".")
    pid = rest.partition(".")[0]
    return place == _place() and pid.isdigit() and owner(int(pid)) != name


def remove_orphans(docker: str = "docker") -> list[str]:
    """Remove the containers whose owner processes no longer exist; return their ids."""
    shown = ["ps", "--all", "--filter", f"label={LABEL}", "--format", f'{{{{.ID}}}} {{{{.Label "{LABEL}"}}}}']
    removed = []
    for line in _list(docker, *shown):
        number, _, name = line.partition(" ")
        if is_gone(name):
            command = [docker, "rm", "--force", "--volumes", number]
            subprocess.run(command, capture_output=True, timeout=SECONDS)
            removed.append(number)
    return removed


def remove_frozen(docker: str = "docker") -> list[str]:
    """Remove the images that ended processes made of containers; return their names."""
    removed = []
    for name in _list(docker, "images", FROZEN, "--format", "{{.Repository}}:{{.Tag}}"):
        if is_gone(name.rpartition(":")[2].partition("-")[0]):
            subprocess.run([docker, "rmi", "--force", name], capture_output=True, timeout=SECONDS)
            removed.append(name)
    return removed


def _place() -> str:
    """Name the start of this machine and its namespace of process numbers."""
    boot = os.uname().nodename
    with contextlib.suppress(OSError):
        boot += Path("/proc/sys/kernel/random/boot_id").read_text()
    return hashlib.sha256(f"{boot} {numbering()}".encode()).hexdigest()[:16]


def _list(docker: str, *arguments: str) -> list[str]:
    """Return the lines of an answer of the engine; none if it does not answer."""
    try:
        found = subprocess.run([docker, *arguments], capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]
