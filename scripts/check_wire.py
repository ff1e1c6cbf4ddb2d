"""Train a little through every surface on loopback, with the real clients and packages, and see rewards rise.

    python scripts/check_wire.py [--only NAME ...] [--out wire.json]

Prints a line for each surface; exit code 1 where a reward does not rise or sampler and learner differ.
A surface whose package is absent is skipped, and the extra to install is named.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from plain_tinker import OPTIONS
from serving import ROOT, Server, serving

SCRIPTS = ROOT / "scripts"
LARGEST_GAP = 1e-4  # nats between sampler and learner, in float32
PARTS = 4  # first and last reward are means over a quarter of the steps
SECONDS = 600  # of one surface
# A run that learns in seconds: a tiny model, and a response of one token where nothing else is said.
SMALL = [
    "compile_cache=null",
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.intermediate_size=64",
    "rollout.tasks_per_update=8",
    "rollout.group_size=8",
    "rollout.max_tokens=256",
    "rollout.max_response_tokens=1",
    "rollout.prefill_buckets=[32]",
    "workers.num=1",
    "workers.step_timeout=60",
    "workers.reset_timeout=120",
    "train.updates=12",
    "train.num_minibatches=1",
    "train.micro_tokens=2048",
    "train.learning_rate=0.01",
    "train.schedule=constant",
    "train.warmup_updates=0",
    "sft.updates=0",
    "eval.every=0",
    "eval.tasks=2",
    "log.drift_every=1",
    "log.rollouts_every=0",
    "log.progress=false",
    "log.tensorboard=false",
    "checkpoint.every=1000",
    "env.name=null",
    "env.max_turns=6",
]
CART_POLE = {"id": "CartPole-v1", "describe": "wire_envs:describe"}


@dataclasses.dataclass(frozen=True)
class Found:
    """What came of a surface: the reward of every step, and the largest log-prob gap."""

    rewards: list[float]
    gap: float


@dataclasses.dataclass(frozen=True)
class Surface:
    """A way to be trained.

    Attributes:
      package: what the client or the environment comes with; its version is told.
      extra: the extra that brings it.
      rise: smallest rise of the reward.
      play: trains and returns what came of it.
    """

    package: str
    extra: str
    rise: float
    play: Callable[[Kit], Found]


class Kit:
    """A folder, and the server that clients train against, started when it is first needed."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self._server: Server | None = None

    def find_server(self) -> Server:
        """Return the server of the training API."""
        if self._server is None:
            options = [*OPTIONS, f"serve.save_dir={self.folder / 'saved'}"]
            self._server = self._stack.enter_context(
                serving(self.folder, "serve", "quickstart", "--train", *options)
            )
        return self._server

    def call(self, *command: object, **variables: str) -> str:
        """Run Python with our packages and the scripts on its path; return what it prints.

        Raises:
          RuntimeError: it fails; the message is what it wrote last.
        """
        path = os.pathsep.join(map(str, (ROOT, ROOT / "envs", SCRIPTS)))
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=self.folder, capture_output=True, text=True,
            timeout=SECONDS, env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": path, **variables},
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command[:3]))}: {done.stderr.strip()[-500:]}")
        return done.stdout

    def train(self, *overrides: str) -> Found:
        """Train by the command."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            run = Path(folder) / "run"
            command = ["-m", "empg_jax", "train", "quickstart", *SMALL, *overrides, f"run_dir={run}"]
            self.call(*command, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        updates = [line for line in lines if "logprob_gap_max" in line]
        return Found(
            [line["episode_return"] for line in updates], max(line["logprob_gap_max"] for line in updates)
        )

    def train_small(self, name: str, *overrides: str, **options: object) -> Found:
        """Train on an environment of `wire_envs`."""
        return self.train(
            f"env.entry_point=wire_envs:{name}",
            f"env.options={json.dumps(options)}",
            *overrides,
        )


def read_steps(printed: str) -> Found:
    """Read the lines of a client that trains."""
    found = re.findall(r"reward ([\d.]+) of \d+, log-prob gap ([\d.e+-]+)", printed)
    return Found([float(reward) for reward, _ in found], max(float(gap) for _, gap in found))


def play_tinker(kit: Kit) -> Found:
    server = kit.find_server()
    variables = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-none", "HF_HUB_OFFLINE": "1"}
    return read_steps(kit.call(SCRIPTS / "examples" / "tinker_client.py", server.model, **variables))


def play_openai(kit: Kit) -> Found:
    server = kit.find_server()
    return read_steps(kit.call(SCRIPTS / "wire_openai.py", server.url, server.model))


def play_harness(kit: Kit) -> Found:
    return kit.train(
        "env.name=harness",
        f"env.options.command=python {SCRIPTS / 'wire_agent.py'}",
        "env.options.start_timeout=100",
        "env.options.call_timeout=50",
        "model.tokenizer=bytes",
        "rollout.max_response_tokens=4",
        "rollout.tasks_per_update=4",  # every episode starts a program
        "train.num_minibatches=2",
    )


def play_gymnasium(kit: Kit) -> Found:
    return kit.train_small("GYMNASIUM", **CART_POLE)


def play_reasoning_gym(kit: Kit) -> Found:
    numbers = {"min_numbers": 2, "max_numbers": 2, "max_value": 9}
    return kit.train_small(
        "REASONING_GYM", "env.max_turns=1", "rollout.tasks_per_update=16", dataset="gcd", params=numbers
    )


def play_textarena(kit: Kit) -> Found:
    game = {"id": "IteratedRockPaperScissors-v0", "kwargs": {"num_rounds": 1}}
    return kit.train_small("TEXTARENA", opponent="first", **game)


def play_openenv(kit: Kit) -> Found:
    options = [word for key, value in CART_POLE.items() for word in ("--options", f"{key}={value}")]
    with (
        tempfile.TemporaryDirectory(dir=kit.folder) as folder,
        serving(folder, "serve-env", "gymnasium", *options, "--sessions", "128") as server,
    ):
        return kit.train_small("OPENENV", url=server.url, observe="text", timeout=50)


SURFACES = {
    "tinker": Surface("tinker", "tinker", 2.0, play_tinker),
    "openai": Surface("openai", "test", 1.0, play_openai),
    "harness": Surface("empg-jax", "serve", 0.2, play_harness),
    "gymnasium": Surface("gymnasium", "adapters", 1.5, play_gymnasium),
    "reasoning_gym": Surface("reasoning-gym", "adapters", 0.1, play_reasoning_gym),
    "textarena": Surface("textarena", "adapters", 0.5, play_textarena),
    "openenv": Surface("websockets", "adapters", 1.5, play_openenv),
}


def check_surface(name: str, surface: Surface, kit: Kit) -> dict:
    """Train through a surface; return its line of the table."""
    line = {"surface": name, "client": surface.package, "steps": 0, "first": None, "last": None, "gap": None}
    line["seconds"] = 0.0
    try:
        line["client"] = f"{surface.package} {importlib.metadata.version(surface.package)}"
    except importlib.metadata.PackageNotFoundError:
        if surface.package != "empg-jax":  # a clone need not be installed
            return {**line, "verdict": f"skipped: pip install -e '.[{surface.extra}]'"}
    began = time.monotonic()
    try:
        found = surface.play(kit)
    except Exception as error:  # the other surfaces are checked all the same
        return {**line, "verdict": f"FAILED: {type(error).__name__}: {error}"}
    part = max(1, len(found.rewards) // PARTS)
    first, last = sum(found.rewards[:part]) / part, sum(found.rewards[-part:]) / part
    line |= {"steps": len(found.rewards), "first": round(first, 3), "last": round(last, 3), "gap": found.gap}
    line["seconds"] = round(time.monotonic() - began, 1)
    return {**line, "verdict": judge(last - first, surface.rise, found.gap)}


def judge(rise: float, needed: float, gap: float) -> str:
    """Return ``ok``, or what is wrong."""
    if not gap <= LARGEST_GAP:
        return f"FAILED: sampler and learner differ by {gap:.1e} nats (at most {LARGEST_GAP:.0e})"
    if not rise >= needed:
        return f"FAILED: the reward rose by {rise:.2f} (at least {needed:g})"
    return "ok"


def show(line: dict) -> str:
    """Return a line of the table."""
    rewards, gap = "", ""
    if line["steps"]:
        rewards, gap = f"{line['first']:.2f} → {line['last']:.2f}", f"{line['gap']:.1e}"
    return (
        f"{line['surface']:14}{line['client']:24}{line['steps']:5}  {rewards:15}{gap:9}"
        f"{line['seconds']:7.1f}  {line['verdict']}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=SURFACES, help="this surface; may be repeated")
    parser.add_argument("--out", type=Path, help="also write the lines here, as JSON")
    args = parser.parse_args(arguments)
    print(f"{'surface':14}{'client':24}steps  {'reward':15}{'gap':9}seconds  verdict")
    lines = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kit = Kit(folder, stack)
        for name in args.only or SURFACES:
            lines.append(check_surface(name, SURFACES[name], kit))
            print(show(lines[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(lines, indent=2) + "\n")
    return int(any(line["verdict"].startswith("FAILED") for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
