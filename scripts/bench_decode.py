"""Compare decoding with its bound by memory bandwidth, with random weights. Print one JSON object.

For every number of slots: each slot is prefilled with ``--context`` tokens and then samples ``--new`` tokens.
A decode step must read every weight once and the keys and values of every live token once; ``bound_share`` is
the time that this takes at the bandwidth measured here, over the time that was taken. The JSON is written
again after each number of slots, so that a run that is cut short keeps what it has.

    python scripts/bench_decode.py --preset qwen2.5-1.5b --slots 1 16 64 256 --out decode.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.engine.engine import Engine, EngineConfig
from empg_jax.hf.presets import make_preset
from empg_jax.models.decoder import DecoderConfig, init_params

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--preset", help="default: a model of 12M parameters")
parser.add_argument("--slots", type=int, nargs="+", default=[1, 16])
parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
parser.add_argument("--new", type=int, default=128, help="tokens sampled by each slot")
parser.add_argument("--capacity", type=int, default=2048, help="physical length of the cache")
parser.add_argument("--page-tokens", type=int, default=0, help="keys and values in pages of so many tokens")
parser.add_argument("--burst", type=int, default=8)
parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
parser.add_argument("--out", type=Path)


def measure_bandwidth() -> float:
    """Measure the bytes per second of reading and writing a large array."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**32
    source = jnp.ones((size // 4,), jnp.float32)
    scale = jax.jit(lambda x: x * 2)
    jax.block_until_ready(scale(source))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(scale(source))
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def measure(
    model: DecoderConfig, params: Any, slots: int, bandwidth: float, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure the prefill and decode rates of one number of slots."""
    config = EngineConfig(
        slots,
        args.capacity,
        max(1, args.capacity - args.context - 1),
        stop_ids=(-1,),
        burst=args.burst,
        prefill_buckets=(args.context,),
        row_buckets=(min(slots, max(1, 16384 // args.context)),),
        cache_buckets=(args.capacity,),
        page_tokens=args.page_tokens,
    )
    engine = Engine(model, config, seed=0)
    engine.load(params, 0)
    began = time.perf_counter()
    engine.warm_up()
    warm_up = time.perf_counter() - began
    rng = np.random.default_rng(0)

    def begin() -> float:
        """Prefill every slot and make the first burst; return the seconds."""
        start = time.perf_counter()
        for slot in range(slots):
            tokens = rng.integers(3, model.vocab_size, args.context)
            engine.submit(slot, tokens, is_fresh=True, ids=(0, slot, 0, 0), max_response=args.new)
        engine.step(is_eager=False)
        return time.perf_counter() - start

    begin()
    while engine.has_work:  # what runs first is slower, whatever was compiled
        engine.step(is_eager=False)
    engine.take_stats()
    first = begin()
    sampled = engine.take_stats().sampled_tokens
    start = time.perf_counter()
    while engine.has_work:
        engine.step(is_eager=False)
    seconds = time.perf_counter() - start
    tokens = engine.take_stats().sampled_tokens
    steps = tokens / slots
    step_seconds = seconds / steps
    item = jnp.dtype(args.dtype).itemsize
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    weights = (sum(leaf.size for leaf in jax.tree.leaves(params)) - looked_up) * item
    live = slots * (args.context + args.new / 2)
    kv = live * 2 * model.num_layers * model.num_kv_heads * model.head_dim * item
    return {
        "slots": slots,
        "tokens_per_s": round(tokens / seconds, 1),
        "step_ms": round(1000 * step_seconds, 3),
        "gigabytes_per_step": round((weights + kv) / 1e9, 3),
        "bound_share": round((weights + kv) / bandwidth / step_seconds, 4),
        "prefill_tokens_per_s": round(
            slots * (args.context - 1) / max(first - step_seconds * sampled / slots, 1e-9), 1
        ),
        "warm_up_s": round(warm_up, 1),
    }


def main() -> None:
    """Measure each number of slots."""
    args = parser.parse_args()
    dtype = jnp.dtype(args.dtype)
    numerics = {"dtype": dtype, "param_dtype": dtype}
    if args.preset:
        model = make_preset(args.preset, **numerics)
    else:
        model = DecoderConfig(
            vocab_size=8192, hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=32,
            intermediate_size=1024, tie_embeddings=False, **numerics,
        )  # fmt: skip
    params = jax.jit(init_params, static_argnums=1)(jax.random.key(0), model)
    bandwidth = measure_bandwidth()
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "bandwidth_gb_per_s": round(bandwidth / 1e9, 1),
        "rows": [],
    }
    for slots in args.slots:
        try:
            row = measure(model, params, slots, bandwidth, args)
        except Exception as error:  # memory may not suffice for the next one; earlier results stay
            row = {"slots": slots, "error": str(error)[:300]}
        result["rows"].append(row)
        text = json.dumps(result, indent=1)
        if args.out:
            args.out.write_text(text + "\n")
    print(text)
    if any("error" in row for row in result["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
