"""Measure the judge of tasks in images: with all layers against tampering, and without any.

    python scripts/bench_containers.py --image IMAGE --docker podman --seconds 1 60

IMAGE has Python, pytest, git and patch. The task is made up: its file of tests has two quick ones and one
that sleeps for SECONDS, since what is measured is what the judge adds to a repository's own tests.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from empg_envs.swe import patches
from empg_envs.swe.images import ALL_LAYERS, ImageBackend
from empg_envs.swe.sandbox import Limits
from empg_envs.swe.tasks import Task, parse_row
from empg_envs.swe.tree import File, Tree

NAME = f"localhost/empg-bench-{os.getpid()}"
CODE = """\
def total(prices):
    found = 1
    for price in prices:
        found += price
    return found


def largest(prices):
    best = 0
    for price in prices:
        best = max(best, price)
    return best
"""
TESTS = """\
import time

import shop


def test_total():
    assert shop.total([1, 2]) == 3


def test_largest():
    assert shop.largest([2, 5, 3]) == 5


def test_slow():
    time.sleep({seconds})
"""


def make_task(base: str, docker: str, seconds: float) -> Task:
    """Build the image of a task."""
    files: Tree = {
        "shop.py": File(CODE.encode()),
        "tests/test_shop.py": File(TESTS.format(seconds=seconds).encode()),
    }
    commit = "git init -q && git add -A && git -c user.name=a -c user.email=a@b commit -qm base"
    with tempfile.TemporaryDirectory() as home:
        for path, file in files.items():
            place = Path(home, "testbed", path)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.data)
        recipe = f"FROM {base}\nCOPY testbed /testbed\nRUN cd /testbed && {commit}\n"
        Path(home, "Containerfile").write_text(recipe)
        build = [docker, "build", "--network", "none", "-q", "-t", NAME, "-f", f"{home}/Containerfile", home]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    repaired = File(CODE.replace("found = 1", "found = 0").encode())
    names = [f"tests/test_shop.py::test_{name}" for name in ("total", "largest", "slow")]
    row: dict[str, Any] = {
        **{"instance_id": f"o__shop-{seconds:g}", "repo": "o/shop", "base_commit": "HEAD", "image": NAME},
        **{"problem_statement": "total() is one too much", "test_cmd": "python3 -m pytest --no-header -rA"},
        "patch": patches.diff(files, {**files, "shop.py": repaired})[0],
        "FAIL_TO_PASS": names[:1],
        "PASS_TO_PASS": names[1:],
        "test_patch": "",
    }
    return parse_row(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--image", required=True, help="the image that the task's is built from")
    parser.add_argument("--docker", default="docker", help="the engine's program")
    parser.add_argument("--seconds", type=float, nargs="+", default=[1.0, 60.0], help="time of the slow test")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    limits, result = Limits(memory_mb=512), {}
    backends = {
        name: ImageBackend("docker", limits, docker=options.docker, layers=frozenset(layers))
        for name, layers in (("all", ALL_LAYERS), ("none", ()))
    }
    for seconds in options.seconds:
        task = make_task(options.image, options.docker, seconds)
        try:
            assert backends["all"].second_bugs(task, 600), "no second bug was found"
            times: dict[str, list[float]] = {name: [] for name in backends}
            for _ in range(options.repeats):
                for name, backend in backends.items():
                    started = time.perf_counter()
                    grade = backend.grade(task, task.patch, 600)
                    times[name].append(time.perf_counter() - started)
                    assert grade.resolved, (name, grade.reason, grade.doubts)
        finally:
            subprocess.run([options.docker, "rmi", "--force", NAME], capture_output=True)
        found = {name: round(statistics.median(each), 2) for name, each in times.items()}
        result[f"tests_of_{seconds:g}_s"] = {**found, "ratio": round(found["all"] / found["none"], 2)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
