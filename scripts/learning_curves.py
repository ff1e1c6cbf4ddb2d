"""Train a configuration over seeds and algorithms; write the table and the plot of the measured numbers.

Every run is ``empg-jax train quickstart`` (or ``--config``) in a process of its own. A control run beside the
RL runs spends about the same CPU time on supervised fine-tuning alone, on three times the demonstrations.

    python scripts/learning_curves.py --out curves --seeds 0 1 2 --algorithms grpo grpo_empg grpo_aem
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from empg_jax.metrics import read_metrics


def run(out: Path, config: str, name: str, overrides: list[str]) -> dict:
    """Make one run, unless its folder already holds a finished one; return its summary."""
    folder = out / name
    if not (folder / "summary.json").exists():
        command = [sys.executable, "-m", "empg_jax", "train", config, f"run_dir={folder}", *overrides]
        with (out / f"{name}.log").open("w") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log)
            _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{name} failed: see {out / name}.log")
        cpu = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
        (folder / "cpu.json").write_text(json.dumps(cpu) + "\n")
        print(f"{name}: {cpu}", file=sys.stderr)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= json.loads((folder / "cpu.json").read_text())
    summary["curve"] = [line["success_rate"] for line in read_metrics(folder / "metrics.jsonl")]
    return summary


def plot(path: Path, curves: dict[str, list[list[float]]], width: int = 10) -> None:
    """Plot training success over updates: the mean over seeds in bold, single seeds thin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (name, seeds) in enumerate(curves.items()):
        smooth = [np.convolve(seed, np.ones(width) / width, mode="valid") for seed in seeds]
        updates = np.arange(len(smooth[0])) + width
        for seed in smooth:
            axes.plot(updates, seed, color=f"C{number}", alpha=0.3, linewidth=1)
        axes.plot(updates, np.mean(smooth, axis=0), color=f"C{number}", linewidth=2, label=name)
    axes.set(xlabel="update", ylabel=f"success in training, mean of {width} updates", ylim=(0, 1))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Parse the command line, run, and write ``curves.json``, ``curves.md`` and ``curves.png``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and the results")
    parser.add_argument("--config", default="quickstart", help="a packaged configuration, or a path")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "grpo_empg", "grpo_aem"], metavar="NAME")
    parser.add_argument(
        "--control-updates", type=int, default=0, help="warm-start updates of the control; 0: none"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at one time")
    parser.add_argument(
        "overrides", nargs="*", help="further overrides of every run, for example train.updates=50"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = {
        f"{name}-{seed}": [f"algorithm.name={name}", f"seed={seed}", *args.overrides]
        for seed in args.seeds
        for name in args.algorithms
    }
    if args.control_updates:
        for seed in args.seeds:
            control = [
                "train.updates=0",
                "train.warmup_updates=0",
                "sft.demonstrations=12000",
                f"seed={seed}",
            ]
            control.append(f"sft.updates={args.control_updates}")
            jobs[f"sft-{seed}"] = [*args.overrides, *control]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(lambda item: run(args.out, args.config, *item), jobs.items())
        summaries = dict(zip(jobs, results, strict=True))
    report(args.out, summaries)


def report(out: Path, summaries: dict[str, dict]) -> None:
    """Write the results of all runs, grouped by method."""
    methods = list(dict.fromkeys(name.rpartition("-")[0] for name in summaries))
    rows, curves = [], {}
    for method in methods:
        runs = [summary for name, summary in summaries.items() if name.rpartition("-")[0] == method]
        before = [r["eval_success_before"] for r in runs]
        after = [r["eval_success_after"] for r in runs]
        wall = [r["wall_seconds"]["total"] for r in runs]
        cpu = [r["cpu_seconds"] for r in runs]
        each = ", ".join(f"{value:.1%}" for value in after)
        rows.append(
            f"| {method} | {np.mean(before):.1%} | **{np.mean(after):.1%}** ({each}) "
            f"| {np.mean(wall):.0f} | {np.mean(cpu):.0f} |"
        )
        if any(r["curve"] for r in runs):
            curves[method] = [r["curve"] for r in runs]
    tasks = next(iter(summaries.values()))["eval_tasks"]
    table = [f"| method | before RL | after, mean of seeds (each), {tasks} held-out tasks | wall s | CPU s |"]
    table += ["| --- | --- | --- | --- | --- |", *rows]
    (out / "curves.md").write_text("\n".join(table) + "\n")
    (out / "curves.json").write_text(json.dumps(summaries, indent=1) + "\n")
    if curves:
        plot(out / "curves.png", curves)
    print("\n".join(table))


if __name__ == "__main__":
    main()
