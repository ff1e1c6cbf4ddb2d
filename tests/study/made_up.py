"""Made-up studies: a file, lines of finished runs, and processes where `program.py` stands for training."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from study_line import SERIES
from study_plan import read_study

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("program.py")

FILE = """
preregistration:
  question: Which is better?
  primary: area
  secondary: []
  stop_rule: all seeds  # and no look before
  minimum_detectable_effect: {{points: 4}}
  seeds: {count}

# Comments of other keys are no part of it.
tasks:
  house: quickstart
  shop: {{config: webshop_tiny, overrides: [train.updates=20]}}
overrides: [eval.every=10]
arms:
  plain: [algorithm.name=grpo]
  {other}: [algorithm.name=grpo_aem]
seeds: {seeds}
"""


def make_study(folder, seeds=(3, 4, 5), other="aem", **changes):
    """A study of two tasks and two arms; ``changes`` replace text in its file."""
    folder.mkdir(parents=True, exist_ok=True)
    text = FILE.format(count=len(seeds), seeds=list(seeds), other=other)
    for old, new in changes.get("replace", {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "study.yaml").write_text(text)
    return read_study(folder)


def line(study, triple, curve, **values):
    """The line of a finished run with this curve."""
    points = list(zip(range(0, 10 * len(curve), 10), curve, strict=True))
    return {
        "task": triple.task,
        "arm": triple.arm,
        "seed": triple.seed,
        "status": "finished",
        "settings": study.settings(triple),
        "date": "2026-11-26T10:00:00+00:00",
        "attempts": 1,
        "cpu_seconds": 100.0,
        "wall_seconds": 50.0,
        "commit": "a" * 40,
        "commits": ["a" * 40],
        "changes": [],
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "hardware": {"processor": "abacus", "cpus": 2, "devices": ["cpu:0 cpu"], "platform": "Linux"},
        "updates": points[-1][0],
        "weights_before": f"start of {triple.task} {triple.seed}",
        "eval_tasks": 256,
        "curve": [list(point) for point in points],
        "area": sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / (len(curve) - 1),
        "updates_to_60": next((float(update) for update, success in points if success >= 0.6), None),
        "end_success": curve[-1],
        "end_tasks": 256,
        "series": {"update": [1, 2, 3]} | {name: [0.1, 0.2, 0.4] for name in SERIES},
    } | values


# ----------------------------------------------------------------------------------- instead of training


def command(folder, runs_dir, *words):
    """The command line of `study.py run` with this file in place of ``empg_jax``."""
    code = (
        "import sys, study, study_runs\n"
        f"study_runs.PROGRAM = (sys.executable, {str(PROGRAM)!r})\n"
        "sys.exit(study.main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, "run", folder, "--runs-dir", runs_dir, "--nice", "0", *words]


def environment():
    """The environment of a process that imports the scripts of this checkout."""
    path = os.pathsep.join([str(ROOT / "scripts"), os.environ["PYTHONPATH"]])
    return os.environ | {"PYTHONPATH": path}


def start(folder, runs_dir, *words):
    """Start `study.py run` in a process of its own."""
    words = list(map(str, command(folder, runs_dir, *words)))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, env=environment(), cwd=ROOT, **pipes)


def wait_for(is_there, seconds=120):
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def journal(runs_dir):
    """What the program was asked to do: (name of the run, whether it went on)."""
    path = Path(runs_dir) / "journal"
    return [tuple(json.loads(text)) for text in path.read_text().splitlines()] if path.exists() else []
