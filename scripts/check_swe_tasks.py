"""Check repair tasks on real packages: each is resolved by its gold patch, and not without a patch.

The script fetches the source distributions by name, version and SHA-256 and makes a virtual environment with
the packages that their tests need. Both are kept in a cache folder, so that a second run needs no network.

    python scripts/check_swe_tasks.py ../shared/data/swe/tasks_dev.jsonl --jobs 2

Some packages' tests compare running times and may fail by chance on a busy machine. A failed task is
therefore tried again, alone, up to ``--tries`` times; the number of the try that counts is printed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import subprocess
import sys
import time
from pathlib import Path

from empg_envs.rows import read_rows
from empg_envs.swe import grading
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.fetch import fetch_sdist
from empg_envs.swe.tasks import Task, broken_tree, default_sources, load_panels

# Imports of the packages' tests besides the packages themselves.
NEEDS = ("pytest==9.*", "hypothesis", "pytest-mock", "text-unidecode", "attrs", "boltons", "face")


def ensure_venv(folder: Path) -> str:
    """Make a virtual environment with `NEEDS`, if it is missing; return its interpreter."""
    home = folder / f"venv-{hashlib.sha256(repr((NEEDS, sys.version_info[:2])).encode()).hexdigest()[:12]}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *NEEDS]
        subprocess.run(install, check=True)
        (home / "complete").touch()
    return str(python)


def check(backend: TreeBackend, task: Task, sources: Path, timeout: float) -> tuple[bool, str]:
    """Check that gold resolves the task and the broken files do not; return the verdict and a line."""
    started = time.monotonic()
    gold = backend.grade(task, task.patch, timeout)
    empty = backend.run_tests(task, broken_tree(task, sources), timeout)
    line = (
        f"{task.instance_id:24} gold {gold.reason} {gold.fail_to_pass} {gold.pass_to_pass}, "
        f"empty {empty.reason} {empty.fail_to_pass} {empty.pass_to_pass}, {time.monotonic() - started:.1f} s"
    )
    if not gold.resolved:
        lost = [
            name
            for name in (*task.fail_to_pass, *task.pass_to_pass)
            if grading.find_status(name, gold.statuses) not in grading.KEPT
        ]
        line += f"\n  lost with gold: {lost[:3]}"
    return gold.resolved and not empty.resolved and empty.fail_to_pass[0] == 0, line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("--sources", type=Path, default=default_sources())
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="tasks whose id holds this text")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--tries", type=int, default=4)
    options = parser.parse_args()
    rows = [row for _, row in read_rows(options.tasks) if options.only in row["instance_id"]]
    python = ensure_venv(options.sources)
    for row in rows:
        name = row["repo"].partition("/")[2]
        fetch_sdist(name, row["version"], row["sdist_sha256"], options.sources, python)
    backend = TreeBackend(python=python, sources=options.sources)
    # Loaded together, because the judge takes its second bugs from tasks over the same files.
    every = [task for panel in load_panels(str(options.tasks)).values() for task in panel]
    tasks = [task for task in every if options.only in task.instance_id]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(check, backend, task, options.sources, options.timeout) for task in tasks]
        verdicts = [job.result() for job in work]
    for number, task in enumerate(tasks):
        is_good, line = verdicts[number]
        print(line, flush=True)
        for attempt in range(2, options.tries + 1):
            if is_good:
                break
            is_good, line = check(backend, task, options.sources, options.timeout)
            print(f"{line} (try {attempt}, alone)", flush=True)
        verdicts[number] = is_good, line
    good = sum(is_good for is_good, _ in verdicts)
    print(f"{good} passed, {len(tasks) - good} failed")
    return int(good != len(tasks) or not tasks)


if __name__ == "__main__":
    sys.exit(main())
