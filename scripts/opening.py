"""What it takes to build something once and to open it from several processes: seconds, CPU, memory, disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def measure_building(command: Sequence[str], folder: Path, **variables: str) -> dict[str, float]:
    """Run a command that builds something in a folder; tell its time, memory and files."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **variables})
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {child.returncode}")
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "largest_rss_mb": round(used.ru_maxrss / 1024),
        "disk_mb": round(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20),
    }


def measure_opening(command: Sequence[str], processes: int) -> dict[str, Any]:
    """Let several processes open the same thing at the same moment.

    Args:
      command: a program that calls `open_when_told`.
      processes: how many of them there are.
    """
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for child in children:
        _read(child)  # its imports are done
    began = time.perf_counter()
    for child in children:
        _tell(child)
    opened = [_read(child) for child in children]
    everyone = time.perf_counter() - began
    memory = sum(read_pss(child.pid) for child in children)
    for child in children:
        child.communicate()
    return {
        "processes": processes,
        "all_open_seconds": round(everyone, 2),
        "slowest_seconds": round(max(seconds for seconds, _ in opened), 2),
        "cpu_seconds_each": round(sum(cpu for _, cpu in opened) / processes, 3),
        "pss_mb": round(memory),
    }


def open_when_told(do: Callable[[], object]) -> None:
    """Be one of the processes of `measure_opening`: wait for a line, open, tell what it took, wait again."""
    print("[0, 0]", flush=True)
    sys.stdin.readline()
    began, cpu = time.perf_counter(), time.process_time()
    kept = do()
    print(json.dumps([time.perf_counter() - began, time.process_time() - cpu]), flush=True)
    sys.stdin.read()
    del kept


def read_pss(pid: int) -> float:
    """Read the proportional set size of a process in MB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss in /proc/{pid}/smaps_rollup")


def _read(child: subprocess.Popen[str]) -> tuple[float, float]:
    assert child.stdout
    seconds, cpu = json.loads(child.stdout.readline())
    return seconds, cpu


def _tell(child: subprocess.Popen[str]) -> None:
    assert child.stdin
    child.stdin.write("\n")
    child.stdin.flush()
