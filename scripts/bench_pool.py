"""Measure the environment pool's transport and check that no step is lost or doubled.

Print one JSON object: round trip of a single environment in microseconds, steps per second of
2 workers x 32 environments, counts of a long checked run. The environment answers at once with about
600 bytes, so the time is that of the transport alone. Run it from the repository root, where the
workers find ``tests.fakes``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

from empg_jax.workers.pool import EnvPool, PoolStats

ENDLESS = {"length": 10**9, "pad": 550}
ACTION = "go to countertop 1 and look now"


def open_pool(num_workers: int) -> EnvPool:
    return EnvPool("tests.fakes:CountingEnv", ENDLESS, num_workers=num_workers)


def measure_round_trips(count: int) -> dict[str, float]:
    """Measure one environment in one worker, one step at a time."""
    with open_pool(1) as pool:
        pool.reset(0, seed=0, split="train", index=0)
        pool.poll(None)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            pool.step(0, ACTION)
            (reply,) = pool.poll(None)
            times.append((time.perf_counter() - start) * 1e6)
            assert reply.failure is None, reply.failure
    cuts = statistics.quantiles(times, n=100)
    return {"p10": round(cuts[9], 1), "median": round(statistics.median(times), 1), "p99": round(cuts[98], 1)}


def run_checked(num_workers: int, num_envs: int, steps: int) -> tuple[dict[str, float], PoolStats]:
    """Step many environments, each as soon as it has answered; count lost and doubled steps."""
    with open_pool(num_workers) as pool:
        handles = range(num_workers * num_envs)
        for handle in handles:
            pool.reset(handle, seed=0, split="train", index=handle)
        waiting = len(handles)
        while waiting:
            waiting -= len(pool.poll(None))
        counts = dict.fromkeys(handles, 0)
        sent = wrong = 0
        cpu, start = time.process_time(), time.perf_counter()
        for handle in handles:
            pool.step(handle, ACTION)
            sent += 1
        received = 0
        while received < steps:
            for reply in pool.poll(None):
                received += 1
                counts[reply.handle] += 1
                wrong += not reply.observation.startswith(
                    f"train/{reply.handle}/0 step {counts[reply.handle]} "
                )
                if sent < steps:
                    pool.step(reply.handle, ACTION)
                    sent += 1
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        extra = len(pool.poll(0.2))
        figures = {
            "steps": received,
            "lost": steps - received,
            "doubled": extra,
            "out_of_order": wrong,
            "steps_per_s": round(received / seconds),
            "steps_per_parent_cpu_s": round(received / cpu),
        }
        return figures, pool.stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--round-trips", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--envs", type=int, default=32, help="environments per worker")
    args = parser.parse_args()
    load = os.getloadavg()[0]
    start = time.perf_counter()
    open_pool(1).close()
    start_seconds = time.perf_counter() - start
    round_trip = measure_round_trips(args.round_trips)
    checked, stats = run_checked(args.workers, args.envs, args.steps)
    result = {
        "round_trip_us": round_trip,
        "worker_start_s": round(start_seconds, 3),
        "workers": args.workers,
        "envs_per_worker": args.envs,
        "checked": checked,
        "pool": stats.as_dict(),
        "load_before": round(load, 2),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
