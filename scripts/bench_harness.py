"""Measure agents that are programs beside the same agents as environments in the worker's own process.

Every agent takes `--latency` seconds per turn; the policy answers at once, so only the harness is measured.
Print one JSON object: turns per second and CPU milliseconds per turn, both ways (alternating), and the ratio
of the former, once all programs have made their first call; and the seconds until then.

    python scripts/bench_harness.py --envs 64 --latency 0.05
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS.parent / "envs"), str(SCRIPTS)]
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:3])

from empg_envs.adapters.foreign import ForeignEnv, make_sizes
from empg_jax.workers.pool import EnvPool, PoolTimeouts

ENDLESS = 10**6
TIMEOUTS = PoolTimeouts(start=300.0, reset=300.0, step=60.0)


class SlowEnv(ForeignEnv):
    """The same agent as an environment."""

    def __init__(self, latency: float) -> None:
        super().__init__("slow", make_sizes(1024, 1), ENDLESS)
        self._latency = latency

    def _begin(self, split, index):
        return "turn 0", {"task": "", "won": False}

    def _act(self, action):
        time.sleep(self._latency)
        return "turn", 0.0, False, False, {"task": "", "won": False}


def measure(target: str, options: dict, args: argparse.Namespace) -> dict[str, float]:
    """Play `args.seconds` seconds; every agent gets its answer as soon as it has called."""
    with EnvPool(target, options, num_workers=args.workers, timeouts=TIMEOUTS) as pool:
        began = time.perf_counter()
        for handle in range(args.envs):
            pool.reset(handle, seed=0, split="train", index=handle)
        waiting = args.envs
        while waiting:
            for reply in pool.poll(None):
                assert reply.failure is None, reply.failure
                waiting -= 1
        started = time.perf_counter() - began
        for handle in range(args.envs):
            pool.step(handle, "go on")
        turns, cpu, began = 0, busy_seconds(), time.perf_counter()
        while time.perf_counter() - began < args.seconds:
            for reply in pool.poll(0.05):
                assert reply.failure is None, reply.failure
                turns += 1
                pool.step(reply.handle, "go on")
        seconds, cpu = time.perf_counter() - began, busy_seconds() - cpu
    return {"turns_per_s": turns / seconds, "cpu_ms_per_turn": 1e3 * cpu / turns, "start_s": started}


def busy_seconds() -> float:
    """Return the CPU time of this process and all below it that live."""
    total, found = 0.0, {os.getpid()}
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        stats.append((int(path.parent.name), int(fields[1]), int(fields[11]) + int(fields[12])))
    for _ in range(4):  # workers, their programs, and what these start
        found |= {pid for pid, parent, _ in stats if parent in found}
    total = sum(ticks for pid, _, ticks in stats if pid in found)
    return total / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--envs", type=int, default=64, help="episodes in flight")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    program = f"python {SCRIPTS / 'slow_agent.py'} {args.latency} {ENDLESS}"
    sides = {
        "in_process": ("bench_harness:SlowEnv", {"latency": args.latency}),
        "harness": ("harness", {"command": program, "start_timeout": 200.0, "call_timeout": 50.0}),
    }
    rounds = [{name: measure(*side, args) for name, side in sides.items()} for _ in range(args.rounds)]
    ratios = [found["harness"]["turns_per_s"] / found["in_process"]["turns_per_s"] for found in rounds]
    result = {
        "envs": args.envs,
        "latency": args.latency,
        "ratio": round(statistics.median(ratios), 3),
        **{
            name: {key: round(statistics.median(r[name][key] for r in rounds), 3) for key in rounds[0][name]}
            for name in sides
        },
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
