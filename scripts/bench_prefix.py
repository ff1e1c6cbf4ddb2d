"""Measure what shared prefixes save the sampling engine on this machine; prints one JSON object.

* group: attempts at tasks, all submitted at once. A given share of each prompt is common to the 8 attempts at
  a task, the rest is each one's own. The same requests go through an engine that shares prefixes and one that
  does not, in alternation.
* pool: the pressure of live conversations on the kept keys and values. Conversations of several turns over
  common instructions are placed in slots as the server places them; the slots have twice the room that they
  need, just enough, or half of it. The next conversation is a random one, or each in turn, which is the worst
  case of a cache that gives up what was used longest ago. With ``--page-tokens``, the same conversations have
  a slot each, and pages of a pool that holds as much as those slots.
* memory: what a cache of rows and the pages in use hold at most, for attempts at tasks whose conversations
  have different numbers of turns. Counted, so that it is the same on every machine; needs ``--page-tokens``.

Lengths are forced (nothing stops by itself), so every run does the same work:

    python scripts/bench_prefix.py --out prefix.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--out", help="also write the JSON here")
parser.add_argument("--only", nargs="*", default=["group", "pool"], choices=("group", "pool", "memory"))
parser.add_argument("--repeats", type=int, default=3)
parser.add_argument("--slots", type=int, default=16)
parser.add_argument("--attempts", type=int, default=8, help="at each task")
parser.add_argument("--prompt", type=int, default=256)
parser.add_argument("--response", type=int, default=16)
parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.9, 1.0])
parser.add_argument("--turns", type=int, default=6)
parser.add_argument("--instructions", type=int, default=128, help="common tokens of the pool's conversations")
parser.add_argument("--observation", type=int, default=24)
parser.add_argument("--page-tokens", type=int, help="keep keys and values in pages of this many tokens")
parser.add_argument("--hidden", type=int, default=128)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--vocab", type=int, default=2048)
args = parser.parse_args()
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

import jax
import numpy as np

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.run.process import CompileCounter
from empg_jax.serve.slots import SlotTable

MODEL = DecoderConfig(
    vocab_size=args.vocab,
    hidden_size=args.hidden,
    num_layers=args.layers,
    num_heads=args.heads,
    num_kv_heads=args.heads,
    head_dim=args.hidden // args.heads,
    intermediate_size=4 * args.hidden,
)
PARAMS = init_params(jax.random.key(0), MODEL)


def make_engine(max_tokens: int, *, share: bool, slots: int = args.slots, pages: bool = False) -> Engine:
    """Build an engine; its pages hold ``args.slots`` longest conversations."""
    sizes = {"page_tokens": args.page_tokens, "kv_tokens": args.slots * max_tokens} if pages else {}
    config = EngineConfig(
        slots, max_tokens, args.response, (-1,), cache_buckets=(max_tokens,), share_prefix=share, **sizes
    )
    engine = Engine(MODEL, config, seed=0)
    engine.load(PARAMS, 0)
    engine.warm_up()
    return engine


def draw(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, args.vocab, count).tolist()


def make_prompts(share: float) -> list[list[int]]:
    """Make one prompt for each slot; ``share`` of it is that of all attempts at its task."""
    rng, common = np.random.default_rng(0), round(share * args.prompt)
    tasks = [draw(rng, common) for _ in range(-(-args.slots // args.attempts))]
    return [tasks[slot // args.attempts] + draw(rng, args.prompt - common) for slot in range(args.slots)]


def run_groups(engine: Engine, prompts: list[list[int]]) -> None:
    for slot, prompt in enumerate(prompts):
        engine.submit(slot, prompt, is_fresh=True, ids=(0, slot, 0, 0))
    while engine.has_work:
        engine.step()
    for slot in range(len(prompts)):
        engine.release(slot)


def bench_groups(share: float) -> dict:
    """Measure both engines in alternation, after a run of each."""
    prompts = make_prompts(share)
    engines = {shares: make_engine(args.prompt + args.response, share=shares) for shares in (True, False)}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    wall: dict[bool, list[float]] = {True: [], False: []}
    for number in range(args.repeats + 1):
        for shares, engine in engines.items():
            engine.take_stats()
            began = time.perf_counter(), time.process_time()
            run_groups(engine, prompts)
            if number:
                wall[shares].append(time.perf_counter() - began[0])
                cpu[shares].append(time.process_time() - began[1])
    stats = {shares: engine.take_stats() for shares, engine in engines.items()}
    assert stats[True].sampled_tokens == stats[False].sampled_tokens
    return {
        "prefilled_tokens": stats[True].prefilled_tokens,
        "prefilled_tokens_without": stats[False].prefilled_tokens,
        "shared_tokens": stats[True].shared_tokens,
        "hit_rate": round(stats[True].hit_rate, 4),
        "cpu_s": round(statistics.median(cpu[True]), 3),
        "cpu_s_without": round(statistics.median(cpu[False]), 3),
        "times_faster_cpu": round(statistics.median(cpu[False]) / statistics.median(cpu[True]), 2),
        "times_faster_wall": round(statistics.median(wall[False]) / statistics.median(wall[True]), 2),
    }


def run_pool(engine: Engine, count: int, order: str) -> None:
    """Let each of ``count`` conversations take its turns; at most half of the slots answer at one time."""
    rng = np.random.default_rng(0)
    instructions, table = draw(rng, args.instructions), SlotTable(engine.config.slots)
    held = [instructions + draw(rng, args.observation) for _ in range(count)]
    turns, queue = [0] * count, list(range(count))
    while queue:
        if order == "random":
            rng.shuffle(queue)
        now, queue = queue[: max(1, args.slots // 2)], queue[max(1, args.slots // 2) :]
        places = {}
        for which in now:
            place = table.take(held[which])
            assert place is not None
            places[place.slot] = which
            engine.cut(place.slot, place.kept)
            ids = (0, which, 0, turns[which])
            engine.submit(place.slot, held[which][place.kept :], is_fresh=place.kept == 0, ids=ids)
        while engine.has_work:
            for response in engine.step():
                which = places[response.slot]
                tokens = np.concatenate([response.prompt_tokens, response.tokens])
                engine.cut(response.slot, len(tokens))
                table.keep(response.slot, tokens, len(response.prompt_tokens))
                held[which] = tokens.tolist() + draw(rng, args.observation)
                turns[which] += 1
        queue += [which for which in now if turns[which] < args.turns]


def bench_pool(counter: CompileCounter) -> dict:
    longest = args.instructions + args.turns * (args.observation + args.response) + args.observation
    engines = {shares: make_engine(longest, share=shares) for shares in (True, False)}
    compiled, result = counter.count, {}
    for order in ("random", "in turn"):
        for room in (2.0, 1.0, 0.5):
            line: dict[str, float] = {}
            for shares, engine in engines.items():
                engine.load(PARAMS, 0)
                engine.take_stats()
                began = time.process_time()
                run_pool(engine, max(1, round(args.slots / room)), order)
                seconds, stats = time.process_time() - began, engine.take_stats()
                name = "" if shares else "_without"
                line[f"hit_rate{name}"] = round(stats.hit_rate, 4)
                line[f"tokens_per_cpu_s{name}"] = round(stats.sampled_tokens / seconds, 1)
                line[f"evicted_tokens{name}"] = stats.evicted_tokens
            result[f"{order}, {room:g}x"] = line
    return result | {"recompiles": counter.count - compiled}


def bench_pages(counter: CompileCounter) -> dict:
    """Measure the conversations of `bench_pool`, each in a slot of its own, over pages."""
    longest = args.instructions + args.turns * (args.observation + args.response) + args.observation
    result, recompiles = {}, 0
    for room in (2.0, 1.0, 0.5, 0.25):
        count = max(1, round(args.slots / room))
        engine = make_engine(longest, share=True, slots=max(args.slots, count), pages=True)
        compiled = counter.count
        for order in ("random", "in turn"):
            engine.load(PARAMS, 0)
            engine.take_stats()
            began = time.process_time()
            run_pool(engine, count, order)
            seconds, stats = time.process_time() - began, engine.take_stats()
            result[f"{order}, {room:g}x"] = {
                "hit_rate": round(stats.hit_rate, 4),
                "tokens_per_cpu_s": round(stats.sampled_tokens / seconds, 1),
                "evicted_tokens": stats.evicted_tokens,
                "page_use": round(stats.page_use, 3),
            }
        recompiles += counter.count - compiled
    return result | {"recompiles": recompiles}


def bench_memory() -> dict:
    """Count the tokens that rows and pages hold for attempts of 1 to ``args.turns`` turns at one time."""
    longest = args.prompt + args.turns * (args.observation + args.response)
    engine = make_engine(longest, share=True, pages=True)
    rng, prompts = np.random.default_rng(1), make_prompts(1.0)
    turns = np.arange(args.slots) % args.turns + 1
    lengths = np.full(args.slots, args.prompt)
    for turn in range(args.turns):
        for slot in np.flatnonzero(turn < turns):
            tokens = prompts[slot] if turn == 0 else draw(rng, args.observation)
            lengths[slot] += args.response + (args.observation if turn else 0)
            engine.submit(slot, tokens, is_fresh=turn == 0, ids=(0, int(slot), 0, turn))
        while engine.has_work:
            engine.step()
    pool = engine.config.num_pages * args.page_tokens
    return {
        "tokens_of_conversations": int(lengths.sum()),
        "tokens_of_rows": args.slots * engine.capacity,
        "tokens_of_pages": round(engine.take_stats().page_use * pool),
    }


def main() -> None:
    result: dict = {"settings": vars(args), "load": os.getloadavg(), "cpus": os.cpu_count()}
    with CompileCounter() as counter:
        if "group" in args.only:
            result["group"] = {f"{share:g}": bench_groups(share) for share in args.shares}
        if "pool" in args.only:
            result["pool"] = bench_pages(counter) if args.page_tokens else bench_pool(counter)
        if "memory" in args.only:
            if not args.page_tokens:
                parser.error("--only memory needs --page-tokens")
            result["memory"] = bench_memory()
    device = jax.devices()[0]
    result["device"] = f"{device.platform} {device.device_kind}"
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
