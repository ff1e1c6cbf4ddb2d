"""Measure the environments of the table: steps per second, load time and memory of a task.

One core, one process, no worker. Commands are chosen at random from the admissible ones (one in ten is the
expert's, where there is one), so episodes go on to their limits. Prints a table, or JSON with ``--json``. CPU
time, so that other load on the machine hardly matters.

    python scripts/bench_envs.py --alfworld ../data/alfworld --seconds 5 --json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import time
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

from empg_envs import ENVS, make_env

# Name in the table: environment and options. WebShop has a benchmark of its own (bench_webshop.py).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "household tiny": ("household", {"level": "tiny"}),
    "household hard": ("household", {"level": "hard", "style": "alfworld"}),
    "alfworld generated": ("alfworld", {"source": "generated", "level": "rooms"}),
    "deepsearch hard": ("deepsearch", {"level": "hard", "style": "search_r1"}),
}


def measure(name: str, options: dict[str, Any], seconds: float, num_tasks: int) -> dict[str, float]:
    """Load tasks, measure their time and memory, then step through episodes of them.

    Returns:
      ``load_ms`` (reset to a task never seen before, mean and worst), ``reset_ms`` (to one seen before),
      ``kib_per_task``, ``steps_per_second``, ``steps``.
    """
    env, rng = make_env(name, **options), random.Random(0)
    split = env.list_splits()[0]
    count = min(num_tasks, env.num_tasks(split))
    env.reset(split=split, index=count % env.num_tasks(split))  # one-time costs of the first task
    loads = []
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for index in range(count):
        env.reset(split=split, index=index)
    kib = (tracemalloc.get_traced_memory()[0] - before) / count / 1024
    tracemalloc.stop()
    env = make_env(name, **options)
    for index in range(count, min(2 * count, env.num_tasks(split))) or range(count):
        started = time.process_time()
        env.reset(split=split, index=index)
        loads.append(1000 * (time.process_time() - started))
    steps = resets = 0
    reset_time = 0.0
    began = time.process_time()
    while time.process_time() - began < seconds:
        started = time.process_time()
        _, info = env.reset(split=split, index=resets % count)
        reset_time += time.process_time() - started
        resets += 1
        is_done = False
        while not is_done:
            action = choose(rng, env, info)
            _, _, terminated, truncated, info = env.step(action)
            steps += 1
            is_done = terminated or truncated
    stepping = time.process_time() - began - reset_time
    return {
        "load_ms": round(sum(loads) / len(loads), 3),
        "load_ms_max": round(max(loads), 3),
        "reset_ms": round(1000 * reset_time / resets, 3),
        "kib_per_task": round(kib, 1),
        "steps_per_second": round(steps / stepping),
        "steps": steps,
    }


def choose(rng: random.Random, env: Any, info: dict[str, Any]) -> str:
    """Choose a command that keeps the episode going."""
    if hasattr(env, "expert_action") and rng.random() < 0.1:
        return env.expert_action()
    return rng.choice(info.get("admissible") or ["look"])


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--alfworld", help="folder of official ALFWorld games, measured beside the others")
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds of steps per environment")
    parser.add_argument("--tasks", type=int, default=60, help="tasks loaded per environment")
    parser.add_argument("--only", nargs="*", help="cases by the beginning of their name")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = {name: case for name, case in CASES.items() if case[0] in ENVS}
    if args.alfworld:
        for release in ("2.1.2", "2.1.1"):
            cases[f"alfworld official {release}"] = (
                "alfworld",
                {"source": "official", "data": args.alfworld, "release": release},
            )
    chosen = {
        name: case for name, case in cases.items() if not args.only or name.startswith(tuple(args.only))
    }
    # A process of its own each, so that what one has cached is not another's gain.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        runs = {name: pool.submit(measure, *case, args.seconds, args.tasks) for name, case in chosen.items()}
        found = {name: run.result() for name, run in runs.items()}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    print("| environment | steps/s | load ms | reset ms | KiB per task |\n| --- | --- | --- | --- | --- |")
    for name, row in found.items():
        cells = [row[key] for key in ("steps_per_second", "load_ms", "reset_ms", "kib_per_task")]
        print(f"| {name} | {cells[0]:,} | {cells[1]:.2f} | {cells[2]:.2f} | {cells[3]:.0f} |")


if __name__ == "__main__":
    main()
