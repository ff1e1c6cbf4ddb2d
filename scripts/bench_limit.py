"""Measure the limits of this device: matrix product and memory bandwidth. Print one JSON object.

python scripts/bench_limit.py --pin 0 --out limit.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--pin", type=int, help="run on this core only")
parser.add_argument("--sizes", type=int, nargs="+", help="matrix sizes (default by platform)")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--out", type=Path)
args = parser.parse_args()
if args.pin is not None:
    os.sched_setaffinity(0, {args.pin})

import jax
import jax.numpy as jnp


def measure(function, *inputs) -> dict[str, float]:
    """Measure the median wall and CPU seconds of a call, after a warm-up."""
    jax.block_until_ready(function(*inputs))
    walls, cpus = [], []
    for _ in range(args.repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*inputs))
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall": statistics.median(walls), "cpu": statistics.median(cpus)}


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    result: dict = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "matmul": {}}
    result["load_average"] = os.getloadavg()
    for dtype in ("float32", "bfloat16"):
        for size in args.sizes or ([1024, 2048] if on_cpu else [4096, 8192]):
            square = jnp.ones((size, size), dtype)
            seconds = measure(jax.jit(lambda a, b: a @ b), square, square)
            flops = 2 * size**3
            result["matmul"][f"{dtype}_{size}"] = {
                "gflop_per_s": round(flops / seconds["wall"] / 1e9, 1),
                "gflop_per_cpu_s": round(flops / max(seconds["cpu"], 1e-9) / 1e9, 1),
            }
    numbers = jnp.ones((2**26 if on_cpu else 2**29,), jnp.float32)
    seconds = measure(jax.jit(jnp.sum), numbers)
    result["read_gb_per_s"] = round(numbers.nbytes / seconds["wall"] / 1e9, 1)
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


main()
