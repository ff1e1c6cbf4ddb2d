"""Measure the sandboxes of the repair environment: start, reset, command, judgment, eight judgments at once.

python scripts/bench_swe.py
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import time
from collections.abc import Callable

from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.bubblewrap import find_interpreter
from empg_envs.swe.caged import BubblewrapSandbox
from empg_envs.swe.tasks import broken_tree, load_panels
from empg_envs.swe.tree import File


def milliseconds(work: Callable[[], object], repeats: int) -> dict[str, float]:
    """Measure the median, 95th percentile and minimum over repeats, after a warm-up."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - started))
    times.sort()
    return {
        "p50": round(statistics.median(times), 2),
        "p95": round(times[int(0.95 * len(times))], 2),
        "min": round(times[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    tasks = load_panels("tiny")["train"][:16]
    tree = broken_tree(tasks[0])
    package = {f"pkg/m{number}.py": File(b"x = 1\n" * 600) for number in range(200)}  # 0.7 MB in 200 files
    sandbox, backend = BubblewrapSandbox(find_interpreter()), TreeBackend()
    plain = TreeBackend(layers=frozenset())
    result: dict[str, object] = {}

    def start() -> None:
        sandbox.close()
        sandbox._start()

    result["start_ms"] = milliseconds(start, options.repeats)
    result["reset_tiny_ms"] = milliseconds(lambda: sandbox.reset(tree), options.repeats)
    result["reset_200_files_ms"] = milliseconds(lambda: sandbox.reset(package), options.repeats)
    result["command_ms"] = milliseconds(lambda: sandbox.exec("true", 10), options.repeats)
    result["snapshot_200_files_ms"] = milliseconds(sandbox.snapshot, options.repeats)
    sandbox.close()
    result["judge_tiny_ms"] = milliseconds(
        lambda: backend.grade(tasks[0], tasks[0].patch, 60), options.repeats // 5
    )
    # The same without the layers against tampering.
    result["judge_tiny_plain_ms"] = milliseconds(
        lambda: plain.grade(tasks[0], tasks[0].patch, 60), options.repeats // 5
    )

    # Every second task gets a patch that is not its own.
    def judge(number: int) -> bool:
        return backend.grade(tasks[number], tasks[number - number % 2].patch, 60).resolved

    for jobs in (1, 8):
        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            verdicts = list(pool.map(judge, range(len(tasks))))
        right = sum(verdict == (number % 2 == 0) for number, verdict in enumerate(verdicts))
        seconds = round(time.perf_counter() - started, 2)
        result[f"jobs_{jobs}"] = {"right": right, "of": len(tasks), "seconds": seconds}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
