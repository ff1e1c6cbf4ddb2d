"""Measure packed attention, forward and backward: the platform's kernel and XLA tiles. Print one JSON object.

The heads are those of Qwen2.5-1.5B; every row holds four segments. ``tflop_per_s`` counts the products below
the diagonal only: 2 forward and 5 backward, whatever a back end computes again.

    python scripts/bench_attention.py --rows 8 --length 4096 --out attention.json
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from empg_jax.models.attention import BACKENDS, packed_attention

HEADS, KV_HEADS, HEAD_DIM = 12, 2, 128

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--rows", type=int, help="default 8; 1 on a CPU")
parser.add_argument("--length", type=int, help="tokens per row; default 4096; 512 on a CPU")
parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
parser.add_argument("--repeats", type=int, default=10)
parser.add_argument("--out", type=Path)


@functools.partial(jax.jit, static_argnames="backend")
def run(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, backend: str) -> list[jax.Array]:
    """Return the output and the gradients."""
    output, pull = jax.vjp(lambda *x: packed_attention(*x, segments, backend=backend), q, k, v)
    return [output, *pull(output)]


def main() -> None:
    """Measure each back end and print the result."""
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    args.rows = args.rows or (1 if on_cpu else 8)
    args.length = args.length or (512 if on_cpu else 4096)
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (args.rows, args.length, heads, HEAD_DIM), jnp.dtype(args.dtype))
        for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    )
    segments = jnp.broadcast_to(jnp.arange(args.length) * 4 // args.length + 1, (args.rows, args.length))
    flops = 7 * args.rows * HEADS * args.length**2 * HEAD_DIM
    result: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    result["settings"] = {name: value for name, value in vars(args).items() if name != "out"}
    for backend in BACKENDS:
        program = run.lower(q, k, v, segments, backend=backend).compile()
        jax.block_until_ready(program(q, k, v, segments))
        walls = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            jax.block_until_ready(program(q, k, v, segments))
            walls.append(time.perf_counter() - start)
        seconds = statistics.median(walls)
        result[backend] = {
            "tokens_per_s": round(args.rows * args.length / seconds, 1),
            "tflop_per_s": round(flops / seconds / 1e12, 3),
            "temporary_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


main()
