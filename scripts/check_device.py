"""Check a machine with a GPU or TPU, step by step: limits, attention, update, decode, pages, training.

Every step is a program of its own with a time limit; one that fails or takes too long does not stop the
others. ``OUT/summary.json`` is written again after each step. It holds the step's own JSON, its seconds and,
for a failure, the end of its output. A step that is run again replaces its results; with ``--only`` those of
the other steps stay. The steps are sorted by value: steps that no longer fit into ``--seconds`` are left out
and listed. Needs the packages of `needed.py`; no pydantic, no typer, no matplotlib.

    python scripts/check_device.py OUT
    python scripts/check_device.py OUT --device tpu
    python scripts/check_device.py OUT --tiny      the same steps at sizes for a CPU, to test the script; time
                                                   limits are four times as long, for a CPU that others use
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from needed import check_packages

SCRIPTS = Path(__file__).resolve().parent
SHORTEST = 15  # seconds; a step that has less left is not begun
TINY_PATIENCE = 4  # times as long: a CPU compiles slowly, and others use it, too

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("out", type=Path, help="folder for the results; made if it is not there")
parser.add_argument("--device", default="gpu", choices=("gpu", "tpu"), help="whose steps")
parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
parser.add_argument("--seconds", type=float, help="time for all steps together (default 480; --tiny 1920)")
parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only")
parser.add_argument("--list", action="store_true", help="print the steps and stop")


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the check: a program with a time limit.

    Attributes:
      name: name of the step and of its result.
      seconds: time limit of the step.
      command: script and arguments, separated by blanks; ``{json}`` stands for the path of its JSON.
      tiny: command with sizes for a CPU.
    """

    name: str
    seconds: int
    command: str
    tiny: str


# 16k packed tokens in bfloat16; on a TPU half of them at a time, and less is kept: a small one has 16 GB.
UPDATE = "bench_learner.py --rows 4 --length 4096 --dtype bfloat16 --param-dtype bfloat16 --repeats 4"
LARGE, SMALL = "--micro-rows 4 --remat dots", "--micro-rows 2 --remat full"
TINY_UPDATE = "bench_learner.py --rows 2 --length 128 --repeats 1 --out {json}"
TINY_DECODE = "bench_decode.py --slots 1 2 --context 32 --new 24 --capacity 128 --out {json}"
GAP = "check_parity.py --only model --dtypes bfloat16 --out {json}"
AGENT = "bench_engine.py --only agent --out {json}"
RUN = "train_resolved.py {scripts}/quickstart.resolved.yaml run_dir={json}.run log.tensorboard=false"


def update(name: str, seconds: int, options: str) -> Step:
    """Return the step that measures updates of a model."""
    return Step(
        f"update-{name}", seconds, f"{UPDATE} --preset qwen2.5-{name} {options} --out {{json}}", TINY_UPDATE
    )


def decode(name: str, seconds: int, slots: str) -> Step:
    """Return the step that measures decoding with a model."""
    command = f"bench_decode.py --preset qwen2.5-{name} --slots {slots} --burst 16 --out {{json}}"
    return Step(f"decode-{name}", seconds, command, TINY_DECODE)


LIMIT = Step("limit", 45, "bench_limit.py --out {json}", "bench_limit.py --sizes 256 --out {json}")
ATTENTION = (
    Step(
        "attention-speed",
        60,
        "bench_attention.py --out {json}",
        "bench_attention.py --length 128 --repeats 1 --out {json}",
    ),
    Step(
        "attention-parity",
        60,
        "check_parity.py --only attention --dtypes bfloat16 --out {json}",
        "check_parity.py --only attention --dtypes float32 --out {json}",
    ),
)
# A few episodes and few sizes: a CPU spends its time on compiling.
TINY_RUN = (
    f"{RUN} train.updates=1 train.num_minibatches=1 sft.updates=2 sft.demonstrations=64 sft.batch_size=8 "
    "rollout.tasks_per_update=2 rollout.group_size=4 rollout.prefill_buckets=[32] eval.tasks=8"
)
CACHE = Step(
    "cache-parity",
    60,
    "check_parity.py --only cache --dtypes bfloat16 float32 --out {json}",
    "check_parity.py --only cache --dtypes float32 --out {json}",
)
# The same decoding as without pages, so that both can be compared.
PAGES = Step(
    "pages-decode",
    90,
    "bench_decode.py --preset qwen2.5-0.5b --slots 16 64 --burst 16 --page-tokens 16 --out {json}",
    f"{TINY_DECODE} --page-tokens 16",
)
# An H100 and 16 cores compile for 80 seconds before it trains.
QUICKSTART = Step("quickstart", 180, f"{RUN} train.updates=20", TINY_RUN)
# Everything that changes what the programs compute, at once: heads of a size that the kernels take.
OPTIONS = (
    "model.hidden_size=256 model.dtype=bfloat16 rollout.page_tokens=16 rollout.kv_tokens=6144 "
    "rollout.prefill_chunk=16 rollout.prefill_buckets=[16] rollout.top_p=0.95 rollout.top_k=20 "
    "rollout.release=true train.share_prefix=true log.drift_every=2"
)
ALL_OPTIONS = Step(
    "options",
    120,
    f"{RUN} train.updates=4 sft.updates=40 sft.demonstrations=400 eval.every=0 eval.tasks=32 {OPTIONS}",
    f"{TINY_RUN} {OPTIONS} model.hidden_size=32 model.num_layers=1 rollout.kv_tokens=2048",
)
REST = (
    Step("gap-0.5b", 90, f"{GAP} --preset qwen2.5-0.5b", GAP),
    Step("agent", 120, f"{AGENT} --dtype bfloat16 --repeats 3", f"{AGENT} --slots 2 --turns 2 --repeats 1"),
)
# By value. The kernels of TPUs have never run: their numbers come before their speed.
STEPS = {
    "gpu": (
        LIMIT,
        update("1.5b", 100, LARGE),
        decode("1.5b", 130, "1 16 64 256"),
        *ATTENTION,
        QUICKSTART,
        CACHE,
        PAGES,
        ALL_OPTIONS,
        update("0.5b", 80, LARGE),
        *REST,
    ),
    "tpu": (
        LIMIT,
        *reversed(ATTENTION),
        CACHE,
        update("0.5b", 120, SMALL),
        decode("0.5b", 130, "1 16 64"),
        QUICKSTART,
        PAGES,
        ALL_OPTIONS,
        *REST,
    ),
}


def run_step(step: Step, arguments: str, out: Path, seconds: float) -> dict[str, Any]:
    """Run one program in a process group of its own, which is killed as a whole when its time is over."""
    json_path = out / f"{step.name}.json"
    run_dir = Path(f"{json_path}.run")
    # What an earlier call left is not this step's result, and a run does not begin in a folder that is there.
    json_path.unlink(missing_ok=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    words = [word.format(json=json_path, scripts=SCRIPTS) for word in arguments.split()]
    command = [sys.executable, str(SCRIPTS / words[0]), *words[1:]]
    log_path = out / f"{step.name}.log"
    paths = [str(SCRIPTS.parent), str(SCRIPTS.parent / "envs"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code: int | str = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
        finally:
            # Environment workers of the quickstart, too; the group may be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = {"ok": code == 0, "exit": code, "seconds": round(time.monotonic() - start, 1)}
    for path in (json_path, run_dir / "summary.json"):
        try:
            found["result"] = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
    if code != 0:
        found["output"] = log_path.read_text(errors="replace")[-4000:]
    return found


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Replace the summary in one step, so that a reader never sees half of it."""
    path = out / "summary.json.part"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    path.replace(out / "summary.json")


def main() -> int:
    """Run the steps that fit; exit code 1 when one failed or none ran."""
    args = parser.parse_args()
    steps = STEPS[args.device]
    names = [step.name for step in steps]
    if unknown := sorted(set(args.only or ()) - set(names)):
        parser.error(f"no step is called {', '.join(unknown)}; there are: {', '.join(names)}")
    if args.list:
        print("\n".join(f"{step.name:18}{step.seconds:4} s at most" for step in steps))
        return 0
    check_packages()
    args.out.mkdir(parents=True, exist_ok=True)
    # Programs that two steps share compile once.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.out / "compiled").resolve()))
    out, start, patience = args.out.resolve(), time.monotonic(), TINY_PATIENCE if args.tiny else 1
    together = 480.0 * patience if args.seconds is None else args.seconds
    summary: dict[str, Any] = {"device": args.device, "is_tiny": args.tiny, "steps": {}, "skipped": []}
    written, is_ok = out / "summary.json", []
    if args.only and written.exists():
        summary["steps"] = json.loads(written.read_text())["steps"]
    for step in steps:
        if args.only and step.name not in args.only:
            continue
        left = together - (time.monotonic() - start)
        if left < SHORTEST:
            summary["skipped"].append(step.name)
            print(f"{step.name:18}skipped: {max(left, 0):.0f} s left", flush=True)
        else:
            arguments = step.tiny if args.tiny else step.command
            result = run_step(step, arguments, out, min(patience * step.seconds, left))
            summary["steps"][step.name] = result
            is_ok.append(result["ok"])
            verdict = "ok" if result["ok"] else f"FAILED ({result['exit']})"
            print(f"{step.name:18}{verdict:10}{result['seconds']:7.1f} s", flush=True)
        summary["seconds"] = round(time.monotonic() - start, 1)
        write_summary(out, summary)
    return 0 if is_ok and all(is_ok) else 1


if __name__ == "__main__":
    sys.exit(main())
