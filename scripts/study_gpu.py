"""Train three arms on real text within a time limit: plain GRPO, with EMPG, with AEM; seed by seed.

    python scripts/study_gpu.py OUT                 # SmolLM2-135M-Instruct, 3 seeds x 3 arms within 9 minutes
    python scripts/study_gpu.py OUT --tiny          # the quickstart's small model, one seed: tests the script

Each run is a process that gets a part of what time is left and is stopped with SIGTERM at the end of it. A
run that is stopped counts with the updates that it made. Runs of one seed have the same warm start, tasks and
sampling keys. ``OUT/summary.json`` is written after each run; the table is printed at the end. Compiled
programs are kept in OUT, so that only the first run compiles. Needs the packages of `needed.py`, neither
pydantic nor typer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from needed import check_packages

SCRIPTS = Path(__file__).resolve().parent
SOURCES = (str(SCRIPTS.parent), str(SCRIPTS.parent / "envs"))  # the package may not be installed
ARMS = {
    "grpo": ["algorithm.modulation=none"],
    "empg": ["algorithm.modulation=empg"],
    "aem": ["algorithm.modulation=aem"],
}
SHORTEST = 20.0  # seconds; a run that would get less is not begun
GRACE = 20.0  # seconds from SIGTERM to SIGKILL
LAST = 5  # updates that "last" means
# What is told of every update, by the names of metrics.jsonl.
MEASURED = (
    "success_rate",
    "entropy",
    "response_tokens",
    "mixed_groups",
    "modulation_mean",
    "modulation_std",
    "modulation_min",
    "modulation_p10",
    "modulation_p90",
    "modulation_max",
    "advantage_sign_changed",
    "grad_norm",
    "seconds_cycle",
)
# In place of the quickstart's values, which stand below those of the study's configuration.
RUN = [
    "log.tensorboard=false",
    "log.progress=false",
    "log.rollouts_every=5",
    "log.transcripts=0",
    "eval.every=0",
]
TINY = [
    *("model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=2"),
    *("rollout.tasks_per_update=2", "rollout.group_size=2", "train.updates=2", "train.warmup_updates=0"),
    *("train.num_minibatches=1", "sft.updates=1", "sft.demonstrations=8", "sft.batch_size=4", "eval.tasks=4"),
]

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("out", type=Path, help="folder for runs and summary; made if it is not there")
parser.add_argument("--model", type=Path, help="the model's folder (default: the configuration's)")
parser.add_argument("--seconds", type=float, default=540, help="time for all runs together (default 540)")
parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
parser.add_argument("--tiny", action="store_true", help="a small model and one seed, to test the script")
parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for all arms")


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """List a configuration's values as overrides; options of an environment stay one value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and not key.endswith("options"):
            yield from flatten(value, f"{prefix}{key}.")
            continue
        if isinstance(value, Mapping):
            yield f"{prefix}{key}={{}}"  # else they would be added to the quickstart's
        yield f"{prefix}{key}={json.dumps(value)}"


def settings(options: argparse.Namespace) -> list[str]:
    """Return the overrides of all runs, on top of ``quickstart.resolved.yaml``."""
    common = [*RUN, f"compile_cache={options.out.resolve() / 'xla'}"]
    if options.tiny:
        return [*common, *TINY, *options.set]
    from empg_jax.config.yaml import read_yaml  # it needs no pydantic

    path = [] if options.model is None else [f"model.path={json.dumps(str(options.model.resolve()))}"]
    return [
        *flatten(read_yaml(SCRIPTS.parent / "configs" / "alfworld_smollm2.yaml")),
        *common,
        *path,
        *options.set,
    ]


def command(overrides: Sequence[str]) -> list[str]:
    resolved = SCRIPTS / "quickstart.resolved.yaml"
    return [sys.executable, str(SCRIPTS / "train_resolved.py"), str(resolved), *overrides]


def run(arguments: Sequence[str], log: Path, seconds: float, grace: float = GRACE) -> str:
    """Run a program for at most this long; return ``finished``, ``stopped`` (at the limit) or ``failed``."""
    paths = [*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as file:
        process = subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return "failed" if process.wait(seconds) else "finished"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the run saves its last update
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "stopped"


def read_updates(folder: Path) -> list[dict[str, Any]]:
    """Read the updates that a run has logged; a line that was cut off is left out."""
    path, found = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if "loss" in record:
            found.append(record)
    return found


def summarize(updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average what is measured over the first and the last updates."""
    parts = {"first": updates[:LAST], "last": updates[-LAST:]}
    means = {
        name: {
            key: round(sum(values) / len(values), 5)
            for key in MEASURED
            if (values := [update[key] for update in part if update.get(key) is not None])
        }
        for name, part in parts.items()
    }
    return {"updates": len(updates), **means}


def as_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Format the runs as Markdown."""
    heads = [
        "arm",
        "seed",
        "state",
        "updates",
        "success first",
        "last",
        "entropy",
        "factor std",
        "p10",
        "p90",
    ]
    rows = [heads, ["---"] * len(heads)]
    for each in runs:
        first, last = each["first"], each["last"]
        keys = ("entropy", "modulation_std", "modulation_p10", "modulation_p90")
        numbers = [first.get("success_rate"), last.get("success_rate"), *(last.get(key) for key in keys)]
        told = ["-" if number is None else f"{number:.3f}" for number in numbers]
        rows.append([each["arm"], str(each["seed"]), each["state"], str(each["updates"]), *told])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    options = parser.parse_args()
    sys.path[:0] = SOURCES
    seeds = options.seeds[:1] if options.tiny else options.seeds
    fit = int(options.seconds / (SHORTEST + GRACE / 2) / len(ARMS))
    if fit == 0:
        parser.error(f"--seconds {options.seconds:g}: the arms need {len(ARMS) * (SHORTEST + GRACE / 2):g}")
    if options.out.exists() and any(options.out.glob("*-*.log")):
        parser.error(f"{options.out} has runs already: name another folder")
    check_packages()
    options.out.mkdir(parents=True, exist_ok=True)
    # Whole seeds, so that what was run can be compared.
    cells = [(seed, arm) for seed in seeds[:fit] for arm in ARMS]
    runs = [
        {"arm": arm, "seed": seed, "state": "left out", **summarize([])} for seed in seeds for arm in ARMS
    ]
    common, end = settings(options), time.monotonic() + options.seconds
    for number, (seed, arm) in enumerate(cells):
        share = (end - time.monotonic()) / (len(cells) - number) - GRACE / 2
        folder = options.out / f"{arm}-{seed}"
        own = [f"run_dir={folder.resolve()}", f"seed={seed}", *ARMS[arm]]
        if share >= SHORTEST / 2:  # runs before it may have taken their grace
            state = run(command([*common, *own]), options.out / f"{arm}-{seed}.log", share)
            runs[number] |= {"state": state, **summarize(read_updates(folder))}
        summary = {"settings": common, "seconds": options.seconds, "runs": runs}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(as_table(runs))
    sys.exit(any(each["state"] == "failed" for each in runs))


if __name__ == "__main__":
    main()
