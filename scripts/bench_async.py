"""Measure what overlap of rollouts and updates brings: the same small run at several ``train.max_lag``.

Runs alternate, so that a busy machine slows all of them alike. Print one JSON object: seconds per update
(median over updates and repeats), its ratio to lag 0, and the share of time in which each side waited. Run it
from the repository root, where the workers find ``tests.houses``.

  python scripts/bench_async.py --latency 0.05
  python scripts/bench_async.py --latency 0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.metrics import read_metrics

WARM_UP = 3  # updates that are not counted
KEYS = ("rollout_idle", "learner_idle", "publish_pause", "lag", "tokens_wasted", "recompiles")
SETTINGS = [
    "env.name=null",
    "env.entry_point=tests.houses:HOUSE",
    "algorithm.entropy_source=learner",
    "rollout.tasks_per_update=8",
    "rollout.group_size=4",
    "sft.updates=0",
    "eval.tasks=1",
    "eval.every=0",
    "checkpoint.every=1000",
    "log.rollouts_every=0",
    "log.tensorboard=false",
    "log.progress=false",
    "log.transcripts=0",
]


def measure(lag: int, latency: float, updates: int, overrides: list[str]) -> list[dict[str, float]]:
    """Run once; return the metrics of the updates that count."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        options = [f"run_dir={folder}/run", f"train.max_lag={lag}", f"train.updates={updates + WARM_UP}"]
        options += [f"env.options.latency={latency}", *SETTINGS, *overrides]
        run = trainer.train(load_config("quickstart", options))
        return read_metrics(Path(run) / "metrics.jsonl")[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--latency", type=float, default=0.05, help="seconds that an environment takes to answer"
    )
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="configuration keys, as for empg-jax train")
    args = parser.parse_args()
    found: dict[int, list[dict[str, float]]] = {lag: [] for lag in args.lags}
    for _ in range(args.repeats):
        for lag in args.lags:
            found[lag] += measure(lag, args.latency, args.updates, args.overrides)
    cycle = {lag: statistics.median(line["seconds_cycle"] for line in lines) for lag, lines in found.items()}
    table = {
        lag: {
            "seconds_per_update": round(cycle[lag], 4),
            "ratio": round(cycle[lag] / cycle[args.lags[0]], 3),
            "seconds_learner": round(statistics.median(line["seconds_update"] for line in lines), 4),
            **{key: round(statistics.mean(line[key] for line in lines), 4) for key in KEYS},
        }
        for lag, lines in found.items()
    }
    settings = {"latency": args.latency, "updates": args.updates, "repeats": args.repeats}
    machine = {"cpus": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"lags": table, **settings, "overrides": args.overrides, "machine": machine}, indent=2))


if __name__ == "__main__":
    main()
