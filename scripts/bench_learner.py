"""Measure the learner: update (GRPO loss with entropy, AdamW) and score pass. Print one JSON object.

The default shape is a 12.07M-parameter Qwen2; every row is one conversation of half prompt and half response.
``mfu`` counts the products that the update needs: 6 operations for each parameter and token, without the
input embedding, which is looked up, and with the output head only for the blocks of tokens that it runs on;
and causal attention; nothing for what rematerialization computes again. It is a share of the fastest matrix
product measured in the same process, in CPU time on a CPU.

    python scripts/bench_learner.py --pin 0 --out learner.json
    python scripts/bench_learner.py --preset qwen2.5-1.5b --dtype bfloat16 --rows 4 --length 4096
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import time
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("--pin", type=int, help="run on this core only")
parser.add_argument("--preset", help="shape of a well-known model, with random weights")
parser.add_argument("--rows", type=int, default=8)
parser.add_argument("--length", type=int, default=512)
parser.add_argument("--micro-rows", type=int, default=1, help="rows per micro-batch")
parser.add_argument("--remat", choices=("full", "dots", "none"), default="full")
parser.add_argument("--attention", default="auto", help="model.attention")
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the products")
parser.add_argument("--param-dtype", default="float32", choices=("float32", "bfloat16"))
parser.add_argument("--lora-rank", type=int, default=0, help="train adapters of this rank on a frozen base")
parser.add_argument("--quantize", default="none", choices=("none", "int8", "nf4"), help="of the frozen base")
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--out", type=Path)
args = parser.parse_args()
if args.pin is not None:
    os.sched_setaffinity(0, {args.pin})

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.algorithms import make_algorithm
from empg_jax.hf.presets import make_preset
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import init_state, make_optimizer
from empg_jax.learner.update import make_learner
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.head import num_blocks
from empg_jax.models.lora import LoraConfig
from empg_jax.models.quantize import quantize_params
from empg_jax.parallel.mesh import make_mesh
from empg_jax.plan.bench import measure_product
from empg_jax.run.process import CompileCounter
from empg_jax.types import Outcome, Status, Trajectory, Turn

NUMERICS = {
    "dtype": jnp.dtype(args.dtype),
    "param_dtype": jnp.dtype(args.param_dtype),
    "remat": args.remat,
    "attention": args.attention,
    "lora": LoraConfig(args.lora_rank) if args.lora_rank else None,
}
SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 32,
    "intermediate_size": 1024,
    "tie_embeddings": False,
}
MODEL = make_preset(args.preset, **NUMERICS) if args.preset else DecoderConfig(**SMALL, **NUMERICS)


def make_trajectory(member: int, rng: np.random.Generator) -> Trajectory:
    """Make a trajectory of one turn: half of the row is prompt, half is response, ids are random."""
    half = args.length // 2
    prompt, response = (rng.integers(3, MODEL.vocab_size, half).astype(np.int32) for _ in range(2))
    level = np.full(half, 9.0, np.float32)
    turn = Turn(
        prompt_tokens=prompt,
        response_tokens=response,
        behavior_logprobs=-level,
        entropies=level,
        reward=0.0,
        version=0,
        anchor=0,
        is_valid=True,
        finish_reason="stop",
    )
    return Trajectory(
        task=0,
        split="train",
        group_id=0,
        member=member,
        turns=(turn,),
        outcome=Outcome(Status.TRAINED, "won"),
        episode_return=float(rng.normal()),
        is_success=True,
        terminated=True,
        truncated=False,
    )


def count_flops(parameters: int) -> float:
    """Count the operations of one update: forward, twice that backward, without rematerialization."""
    tokens = args.rows * args.length
    head = MODEL.vocab_size * MODEL.hidden_size  # with tied embeddings the table that is also looked up
    layers = parameters - head * (1 if MODEL.tie_embeddings else 2)
    products = 6 * (layers + head * share_of_head()) * tokens
    width = MODEL.num_heads * MODEL.head_dim
    # Two products of [T, T / 2] per layer, and twice as much backward.
    attention = 3 * 2 * args.length * width * MODEL.num_layers * tokens
    return products + attention


def share_of_head() -> float:
    """Return the share of a micro-batch's tokens that the head runs on: whole blocks of sampled tokens."""
    tokens, sampled = args.micro_rows * args.length, args.micro_rows * (args.length // 2)
    blocks = num_blocks(tokens)
    return math.ceil(sampled * blocks / tokens) / blocks


def main() -> None:
    rng = np.random.default_rng(0)
    shape = BatchShape(args.rows, 1, args.length, args.micro_rows, args.rows, 1)
    batch, layout = make_batch([make_trajectory(i, rng) for i in range(args.rows)], shape, seed=(0,))
    optimizer, _ = make_optimizer(learning_rate=1e-6, final_learning_rate=1e-6, total_steps=1000)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), MODEL))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    base = quantize_params(init_params(jax.random.key(0), MODEL), args.quantize) if args.lora_rank else None
    learner = make_learner(
        MODEL, make_algorithm("grpo"), optimizer, make_mesh(), micro_rows=args.micro_rows, base=base
    )
    state = init_state(jax.random.key(0), MODEL, optimizer, learner.shardings)
    batch, (start, stop) = learner.put(batch), np.asarray(layout.bounds[0], np.int32)
    tokens = args.rows * args.length
    began = time.perf_counter()
    with CompileCounter() as counter:
        walls: dict[str, list[float]] = {"update": [], "score": []}
        cpus: dict[str, list[float]] = {"update": [], "score": []}
        compiled, warm_up = 0, 0.0
        for repeat in range(args.repeats + 2):  # the first two rounds warm up
            if repeat == 2:
                compiled, warm_up = counter.count, time.perf_counter() - began
            wall, cpu = time.perf_counter(), time.process_time()
            scores = jax.block_until_ready(learner.score(state.params, state.params, batch, stop))
            walls["score"].append(time.perf_counter() - wall)
            cpus["score"].append(time.process_time() - cpu)
            credit = jax.block_until_ready(learner.credit(batch, scores))
            wall, cpu = time.perf_counter(), time.process_time()
            state, metrics = learner.update(state, batch, scores, credit, start, stop)
            jax.block_until_ready(state)
            walls["update"].append(time.perf_counter() - wall)
            cpus["update"].append(time.process_time() - cpu)
        recompiles = counter.count - compiled
    result = {
        f"{name}_tokens_per_{clock}_s": round(tokens / statistics.median(times[name][2:]), 1)
        for clock, times in (("cpu", cpus), ("wall", walls))
        for name in ("update", "score")
    }
    on_cpu = jax.default_backend() == "cpu"
    peak = measure_product(MODEL.dtype, args.repeats, time.process_time if on_cpu else time.perf_counter)
    rate = count_flops(parameters) / statistics.median((cpus if on_cpu else walls)["update"][2:])
    memory = jax.devices()[0].memory_stats() or {}
    result |= {
        "mfu": round(rate / peak, 4),
        "update_tflop_per_s": round(rate / 1e12, 3),
        "peak_tflop_per_s": round(peak / 1e12, 3),
        "peak_memory_gb": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
        "warm_up_s": round(warm_up, 1),
        "recompiles": recompiles,
        "parameters": parameters,
        "loss": float(metrics["loss"]),
        "device": jax.devices()[0].device_kind,
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "versions": {
            name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")
        },
        "load_average": os.getloadavg(),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
