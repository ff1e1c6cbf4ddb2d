"""Measure the sampling engine on this machine; prints one JSON object.

* batched: 16 rows of 128 prompt and 128 new tokens, log-prob and entropy of each.
* single: one such row.
* agent: live conversations, 10 turns each, 60-token observations, responses of 8 to 64 tokens. The same
  requests go through (a) the engine with kept KV and (b) one slot that prefills every conversation anew.
* occupancy: more conversations than slots, through the collector, with simulated environments that answer
  after 1 to 20 ms. Measured until the last conversation has begun; with the tail beside it. ``--run RUN``
  sets the occupancy of a real run beside it: that of every update, as its ``metrics.jsonl`` says.

Nothing is shared between conversations; ``bench_prefix.py`` measures that. Response lengths are forced
(nothing stops by itself), so every run does the same work. On a shared machine pin it to one core and compare
tokens per CPU-second:

    python scripts/bench_engine.py --pin 0 --out engine.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", help="also write the JSON here")
parser.add_argument("--pin", type=int, help="run on this core only")
parser.add_argument("--only", nargs="*", default=["batched", "single", "agent", "occupancy"])
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--slots", type=int, default=16)
parser.add_argument("--burst", type=int, default=8)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--hidden", type=int, default=256)
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--heads", type=int, default=8)
parser.add_argument("--kv-heads", type=int, default=4)
parser.add_argument("--intermediate", type=int, default=1024)
parser.add_argument("--vocab", type=int, default=8192)
parser.add_argument("--turns", type=int, default=10)
parser.add_argument("--observation", type=int, default=60)
parser.add_argument("--first-prompt", type=int, default=120)
parser.add_argument("--responses", type=int, nargs=2, default=[8, 64], help="shortest and longest")
parser.add_argument("--requests", help="file of requests: read if it exists, else written")
parser.add_argument("--run", type=Path, help="folder of a run, whose occupancy is told, too")
args = parser.parse_args()
if args.pin is not None:
    os.sched_setaffinity(0, {args.pin})
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.rollout.collector import Collector
from empg_jax.rollout.context import PromptDelta
from empg_jax.rollout.episode import Attempt, EpisodeRules
from empg_jax.run.process import CompileCounter
from empg_jax.workers.pool import EnvReply

NEVER = (-1,)  # no stop token
LATENCY = (0.001, 0.020)  # seconds
MODEL = DecoderConfig(
    vocab_size=args.vocab,
    hidden_size=args.hidden,
    num_layers=args.layers,
    num_heads=args.heads,
    num_kv_heads=args.kv_heads,
    head_dim=args.hidden // args.heads,
    intermediate_size=args.intermediate,
    tie_embeddings=False,
    dtype=jnp.dtype(args.dtype),
    param_dtype=jnp.dtype(args.dtype),
)
PARAMS = init_params(jax.random.key(0), MODEL)


# ------------------------------------------------------------------------------------------ requests


def make_requests(count: int, seed: int = 0) -> list[list[tuple[list[int], int]]]:
    """Make the turns of each conversation: new prompt tokens, and the length of the response."""
    rng = np.random.default_rng(seed)
    low, high = args.responses

    def turn(number: int) -> tuple[list[int], int]:
        length = args.observation if number else args.first_prompt
        return rng.integers(3, args.vocab, length).tolist(), int(rng.integers(low, high + 1))

    return [[turn(number) for number in range(args.turns)] for _ in range(count)]


def load_requests() -> list[list[tuple[list[int], int]]]:
    """Load the requests of the agent pattern from the file, or make them and write them to it."""
    path = Path(args.requests) if args.requests else None
    if path is not None and path.exists():
        return json.loads(path.read_text())
    requests = make_requests(args.slots)
    if path is not None:
        path.write_text(json.dumps(requests))
    return requests


def longest(requests: list[list[tuple[list[int], int]]]) -> int:
    return max(sum(len(tokens) + length for tokens, length in turns) for turns in requests)


# ------------------------------------------------------------------------------------------- engines


def make_engine(slots: int, max_tokens: int, kind: type[Engine] = Engine, **sizes) -> Engine:
    longest_response = min(max(128, args.responses[1]), max_tokens - 1)
    # A repeated prompt would else be found in its slot, and cost nothing.
    sizes["share_prefix"] = False
    config = EngineConfig(slots, max_tokens, longest_response, NEVER, burst=args.burst, **sizes)
    engine = kind(MODEL, config, seed=0)
    engine.load(PARAMS, 0)
    engine.warm_up()
    return engine


def finish(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def run_rows(engine: Engine, prompt: int, new: int) -> None:
    """Run a fresh prompt and a response of full length in every slot."""
    rng = np.random.default_rng(0)
    for slot in range(engine.config.slots):
        tokens = rng.integers(3, args.vocab, prompt)
        engine.submit(slot, tokens, is_fresh=True, ids=(0, slot, 0, 0), max_response=new)
    finish(engine)


def run_agents(engine: Engine, requests: list[list[tuple[list[int], int]]]) -> None:
    """Run one conversation per slot with kept KV; environments answer at once."""
    turn_of = dict.fromkeys(range(len(requests)), 0)

    def submit(slot: int) -> None:
        tokens, length = requests[slot][turn_of[slot]]
        ids = (0, slot, 0, turn_of[slot])
        engine.submit(slot, tokens, is_fresh=not turn_of[slot], ids=ids, max_response=length)
        turn_of[slot] += 1

    for slot in turn_of:
        submit(slot)
    while engine.has_work:
        for response in engine.step():
            if turn_of[response.slot] < len(requests[response.slot]):
                submit(response.slot)
    for slot in turn_of:
        engine.release(slot)


def run_one_by_one(engine: Engine, requests: list[list[tuple[list[int], int]]]) -> None:
    """Run one request at a time in one slot and prefill the whole conversation each time."""
    for group, turns in enumerate(requests):
        held: list[int] = []
        for number, (tokens, length) in enumerate(turns):
            held += tokens
            engine.submit(0, held, is_fresh=True, ids=(0, group, 0, number), max_response=length)
            while engine.has_work:
                for response in engine.step():
                    held += response.tokens.tolist()
    engine.release(0)


# --------------------------------------------------------------------------------------- measurement


def measure(run, engine: Engine, repeats: int) -> dict:
    """Measure tokens per CPU-second and per second: medians over repeats, after a warm-up run."""
    run()
    engine.take_stats()
    runs = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        runs.append((time.perf_counter() - wall, time.process_time() - cpu, engine.take_stats()))
    stats = runs[0][2]
    per_cpu = [s.sampled_tokens / cpu for _, cpu, s in runs]
    return {
        "tokens_per_cpu_s": round(statistics.median(per_cpu), 1),
        "tokens_per_cpu_s_all": [round(value, 1) for value in per_cpu],
        "tokens_per_s": round(statistics.median(s.sampled_tokens / wall for wall, _, s in runs), 1),
        "sampled_tokens": stats.sampled_tokens,
        "prefilled_tokens": stats.prefilled_tokens,
        "slot_occupancy": round(stats.occupancy, 4),
        "bursts": stats.bursts,
    }


def bench_agents(counter: CompileCounter) -> tuple[dict, dict, int]:
    requests = load_requests()
    engine = make_engine(args.slots, longest(requests), prefill_buckets=(64,), row_buckets=(1, 4))
    alone = make_engine(1, longest(requests), prefill_buckets=(64, 256))
    compiled = counter.count
    kept = measure(lambda: run_agents(engine, requests), engine, args.repeats)
    # This one takes about five times as long.
    one = measure(lambda: run_one_by_one(alone, requests), alone, max(1, args.repeats // 3))
    return kept, one, counter.count - compiled


# ----------------------------------------------------------------------------------------- occupancy


class Requested(Engine):
    """An engine whose responses have the lengths of the requests."""

    lengths: list[list[int]]

    def submit(self, slot, tokens, *, is_fresh, ids, max_response=None, watch=None) -> None:
        length = self.lengths[ids[1]][ids[3]]
        super().submit(slot, tokens, is_fresh=is_fresh, ids=ids, max_response=length)


class SimulatedPool:
    """A pool of environments that answer with the next tokens of their conversation after a delay."""

    def __init__(self, requests: list[list[tuple[list[int], int]]]) -> None:
        self._requests, self._rng = requests, np.random.default_rng(1)
        self._tasks: dict[int, list[int]] = {}  # handle -> conversation, turn
        self._due: dict[int, float] = {}
        self.breaker = SimpleNamespace(seconds=0.0)  # nothing breaks here

    def reset(self, handle: int, *, seed: int, split: str, index: int) -> None:
        self._tasks[handle] = [index, 0]
        self._ask(handle)

    def step(self, handle: int, action: str) -> None:
        self._tasks[handle][1] += 1
        self._ask(handle)

    def release(self, handle: int) -> None:
        self._due.pop(handle, None)

    def _ask(self, handle: int) -> None:
        self._due[handle] = time.monotonic() + self._rng.uniform(*LATENCY)

    def poll(self, timeout: float, *, within: range) -> list[EnvReply]:
        wait = min(self._due.values(), default=float("inf")) - time.monotonic()
        if self._due and wait > 0 and timeout > 0:
            time.sleep(min(wait, timeout))
        now = time.monotonic()
        return [self._reply(handle) for handle in [h for h, due in self._due.items() if due <= now]]

    def _reply(self, handle: int) -> EnvReply:
        del self._due[handle]
        task, turn = self._tasks[handle]
        turns = self._requests[task]
        info = {"tokens": turns[min(turn, len(turns) - 1)][0]}
        return EnvReply(handle, "step" if turn else "reset", terminated=turn == len(turns), info=info)


class Delta:
    """The next tokens of the prompt, sent by the environment."""

    def start(self, observation, info) -> PromptDelta:
        return PromptDelta(info["tokens"], True)

    def follow(self, tokens, text, stopped, action, observation, info) -> PromptDelta:
        return PromptDelta(info["tokens"], False)


@dataclasses.dataclass
class Action:
    action: str = "go"
    is_valid: bool = True


def bench_occupancy(counter: CompileCounter) -> tuple[dict, int]:
    requests = make_requests(4 * args.slots, seed=2)
    sizes = {"prefill_buckets": (64,), "row_buckets": (1, 4)}
    engine = make_engine(args.slots, longest(requests), Requested, **sizes)
    engine.lengths = [[length for _, length in turns] for turns in requests]
    compiled = counter.count
    collector = Collector(
        engine,
        SimulatedPool(requests),
        Delta,
        lambda text, info: Action(),
        lambda tokens: "",
        EpisodeRules(max_turns=args.turns + 1),
        seed=0,
    )
    collector.admit(Attempt("train", task, task, 0) for task in range(len(requests)))
    wall, cpu, left, steady = time.perf_counter(), time.process_time(), len(requests), 0.0
    while left:
        left -= len(collector.advance())
        if left >= args.slots:
            steady = engine.stats.occupancy
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    stats = engine.take_stats()
    result = {
        "slot_occupancy": round(steady, 4),
        "slot_occupancy_with_tail": round(stats.occupancy, 4),
        "tokens_per_cpu_s": round(stats.sampled_tokens / cpu, 1),
        "tokens_per_s": round(stats.sampled_tokens / wall, 1),
        "steps_per_burst": round(stats.decode_rows / args.slots / stats.bursts, 2),
    }
    return result, counter.count - compiled


def read_occupancy(run: Path) -> dict:
    """Read the occupancy of a run's updates."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    found = [line["slot_occupancy"] for line in lines if "slot_occupancy" in line]
    return {
        "updates": len(found),
        "median": round(statistics.median(found), 4),
        "least": round(min(found), 4),
        "most": round(max(found), 4),
    }


# ---------------------------------------------------------------------------------------------- main


def main() -> None:
    sizes = dataclasses.asdict(MODEL).items()
    shape = {key: jnp.dtype(size).name if key.endswith("dtype") else size for key, size in sizes}
    result: dict = {"recompiles": 0, "shape": shape}
    result["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    result["load_before"] = os.getloadavg()
    with CompileCounter() as counter:
        for name, slots in (("batched", args.slots), ("single", 1)):
            if name not in args.only:
                continue
            sizes = {"prefill_buckets": (128,), "row_buckets": (1,), "cache_buckets": (128, 160, 192, 224)}
            engine = make_engine(slots, 256, **sizes)
            compiled = counter.count
            result[name] = measure(lambda engine=engine: run_rows(engine, 128, 128), engine, args.repeats)
            result[f"{name}_tokens_per_cpu_s"] = result[name]["tokens_per_cpu_s"]
            result["recompiles"] += counter.count - compiled
        if "agent" in args.only:
            result["agent"], result["one_slot_no_reuse"], recompiles = bench_agents(counter)
            result["agent_tokens_per_cpu_s"] = result["agent"]["tokens_per_cpu_s"]
            result["prefilled_tokens"] = result["agent"]["prefilled_tokens"]
            one = result["one_slot_no_reuse"]["tokens_per_cpu_s"]
            result["agent_speedup"] = round(result["agent_tokens_per_cpu_s"] / one, 2)
            result["recompiles"] += recompiles
        if "occupancy" in args.only:
            result["occupancy"], recompiles = bench_occupancy(counter)
            result["slot_occupancy"] = result["occupancy"]["slot_occupancy"]
            if args.run:
                result["slot_occupancy_of_run"] = read_occupancy(args.run)
            result["recompiles"] += recompiles
    device = jax.devices()[0]
    result |= {
        "load_after": os.getloadavg(),
        "pinned_to": args.pin,
        "repeats": args.repeats,
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
