"""Measure updates with and without ``train.share_prefix`` in one process. Print one JSON object.

Groups of attempts at a task begin with the same prompt, a share of each row. Behind it come a few turns of
sampled and observed tokens. Both learners make the same optimizer step of the same episodes, in turn; the
update without sharing has rows of one episode, the fastest micro-batch on a CPU, the other one long row per
micro-batch. A rate counts the episodes' tokens, whether they are computed or shared, by time (CPU time on a
CPU). ``tokens`` is the bound that fewer tokens alone would give.

    python scripts/bench_shared_update.py --pin 0 --shares 0.5
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--pin", type=int, help="run on this core only")
parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.5, 0.8, 0.9], help="of a row")
parser.add_argument("--groups", type=int, default=4)
parser.add_argument("--size", type=int, default=8, help="attempts of a group")
parser.add_argument("--length", type=int, default=512, help="tokens of an episode")
parser.add_argument("--sampled", type=float, default=0.5, help="share of an episode's own tokens")
parser.add_argument("--turns", type=int, default=4)
parser.add_argument("--micro-tokens", type=int, default=2560, help="of the rows with shared beginnings")
parser.add_argument("--repeats", type=int, default=3, help="alternations")
parser.add_argument("--out", type=Path)
args = parser.parse_args()
if args.pin is not None:
    os.sched_setaffinity(0, {args.pin})

import jax
import numpy as np

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import TrainState, init_state, make_optimizer
from empg_jax.learner.update import Learner, make_learner
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.types import Batch, Outcome, Status, Trajectory, Turn

MODEL = DecoderConfig(
    vocab_size=8192,
    hidden_size=256,
    num_layers=8,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=1024,
    tie_embeddings=False,
)


def make_episode(group: int, member: int, prompt: np.ndarray, rng: np.random.Generator) -> Trajectory:
    """Make an episode of ``--turns`` responses, with an observation before each but the first."""
    own = args.length - len(prompt)
    sampled = max(1, round(own * args.sampled / args.turns))
    seen = (own - sampled * args.turns) // max(1, args.turns - 1)
    turns, level = [], np.full(sampled, 9.0, np.float32)
    for number in range(args.turns):
        if number:
            prompt = np.concatenate([prompt, draw(rng, seen)])
        turns.append(
            Turn(
                prompt_tokens=prompt,
                response_tokens=draw(rng, sampled),
                behavior_logprobs=-level,
                entropies=level,
                reward=0.0,
                version=0,
                anchor=0,
                is_valid=True,
                finish_reason="stop",
            )
        )
        prompt = np.concatenate([prompt, turns[-1].response_tokens])
    return Trajectory(
        task=group,
        split="train",
        group_id=group,
        member=member,
        turns=tuple(turns),
        outcome=Outcome(Status.TRAINED, "won"),
        episode_return=float(rng.normal()),
        is_success=True,
        terminated=True,
        truncated=False,
    )


def draw(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.integers(3, MODEL.vocab_size, count).astype(np.int32)


@dataclasses.dataclass
class Side:
    """One of the two learners, with its times and its last metrics."""

    learner: Learner
    state: TrainState
    shape: BatchShape
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)

    def run(self, batch: Batch, stop: int) -> None:
        """Score the batch and make an optimizer step of its first micro-batches."""
        bounds = np.int32(0), np.int32(stop)
        began = clock()
        scores = self.learner.score(self.state.params, self.state.params, batch, bounds[1])
        jax.block_until_ready(scores)
        self.seconds.setdefault("score", []).append(clock() - began)
        credit = jax.block_until_ready(self.learner.credit(batch, scores))
        began = clock()
        self.state, metrics = self.learner.update(self.state, batch, scores, credit, *bounds)
        jax.block_until_ready(self.state)
        self.seconds.setdefault("update", []).append(clock() - began)
        self.metrics = {name: float(metrics[name]) for name in ("loss", "grad_norm")}


def clock() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def make_side(row_tokens: int, *, is_shared: bool) -> Side:
    count = args.groups * args.size
    shape = BatchShape(count, args.turns, row_tokens, 1, count, 1, is_shared)
    optimizer, _ = make_optimizer(learning_rate=1e-6, final_learning_rate=1e-6, total_steps=1000)
    learner = make_learner(
        MODEL, make_algorithm("grpo"), optimizer, make_mesh(), micro_rows=1, shares_prefix=is_shared
    )
    return Side(learner, init_state(jax.random.key(0), MODEL, optimizer, learner.shardings), shape)


def measure(sides: dict[str, Side], share: float) -> dict[str, float]:
    """Let both sides train on the same episodes in turn."""
    rng = np.random.default_rng(0)
    prompts = [draw(rng, max(1, round(args.length * share))) for _ in range(args.groups)]
    if not share:  # attempts at different tasks
        prompts = [draw(rng, args.length // 4) for _ in range(args.groups * args.size)]
    made = [
        make_episode(number // args.size, number % args.size, prompts[number * len(prompts) // count], rng)
        for count in [args.groups * args.size]
        for number in range(count)
    ]
    batches = {name: make_batch(made, side.shape, seed=(0,)) for name, side in sides.items()}
    placed = {name: sides[name].learner.put(batch) for name, (batch, _) in batches.items()}
    for name, side in sides.items():
        side.run(placed[name], stop=1)  # compiles
        side.seconds.clear()
    for _ in range(args.repeats):
        for name, side in sides.items():
            side.run(placed[name], stop=batches[name][1].bounds[0][1])
    plain, shared = batches["plain"][1], batches["shared"][1]
    tokens = plain.num_tokens
    result = {
        f"{name}_{what}_tokens_per_s": round(tokens / statistics.median(side.seconds[what]), 1)
        for name, side in sides.items()
        for what in ("update", "score")
    }
    for what in ("update", "score"):
        pairs = zip(sides["plain"].seconds[what], sides["shared"].seconds[what], strict=True)
        result[f"{what}_ratio"] = round(statistics.median(slow / fast for slow, fast in pairs), 2)
    computed = shared.num_rows * sides["shared"].shape.row_tokens
    result |= {
        "tokens": round(tokens / shared.num_tokens, 2),
        "packing_efficiency": round(shared.num_tokens / computed, 3),
        "loss_difference": abs(sides["plain"].metrics["loss"] - sides["shared"].metrics["loss"]),
        "grad_norm_ratio": sides["shared"].metrics["grad_norm"] / sides["plain"].metrics["grad_norm"],
    }
    return result


def main() -> None:
    sides = {
        "plain": make_side(args.length, is_shared=False),
        "shared": make_side(args.micro_tokens, is_shared=True),
    }
    result = {
        "shares": {str(share): measure(sides, share) for share in args.shares},
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "device": jax.devices()[0].device_kind,
        "load_average": os.getloadavg(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


main()
