"""Compile the learner's update and the engine's programs for accelerators that this machine lacks.

The platform's own compiler works from shapes alone: it refuses a kernel whose tiles do not fit, and reports
the memory of each device. Nothing is run, so speed is not measured. The script prints one JSON object; exit
code 1 when a program does not compile, 2 when there is no compiler. In it ``turned_gb`` are copies of whole
arrays of the cache, to lay them out anew or to hand them to a kernel: 0, or much is lost. ``traffic_gb`` is
the compiler's own estimate of the bytes that one pass moves (TPUs only).

Needs the compiler of the platform: for GPUs ``jax-cuda12-plugin``, ``jax-cuda12-pjrt`` of jax's version and
``nvidia-cuda-nvcc-cu12``; for TPUs ``libtpu`` of the version that ``jax[tpu]`` names.

    python scripts/compile_ahead.py h100 --preset qwen2.5-1.5b --devices 4 --tensor 2
    python scripts/compile_ahead.py v5e:2x2 --preset qwen2.5-1.5b --tensor 2
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("device", help="h100, a100, l4, or a TPU slice such as v5e:2x2, v5p:2x2x1, v6e:2x4")
parser.add_argument("--preset", default="qwen2.5-1.5b", help="model shape")
parser.add_argument("--devices", type=int, default=1, help="GPUs; a TPU slice says it itself")
parser.add_argument(
    "--tensor", type=int, default=1, help="size of the tensor axis, also the engine's; fsdp takes the rest"
)
parser.add_argument("--pages", type=int, default=0, help="tokens of a page of the engine's cache; 0: rows")
parser.add_argument("--length", type=int, default=4096, help="tokens per row")
parser.add_argument("--rows-per-device", type=int, default=1, help="rows of a micro-batch per fsdp shard")
parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
parser.add_argument("--attention", default="auto", help="model.attention")
names = ("update", "prefill", "decode")
parser.add_argument("--programs", nargs="+", default=list(names), choices=names)
args = parser.parse_args()

# Compute capability, multiprocessors, KB of shared memory per multiprocessor and per block, GB of memory.
GPUS = {
    "h100": ((9, 0), 132, 228, 227, 80),
    "a100": ((8, 0), 108, 164, 163, 80),
    "l4": ((8, 9), 58, 100, 99, 24),
}
if args.device not in GPUS and ":" not in args.device:
    parser.error(f"device {args.device}: choose {', '.join(GPUS)}, or a TPU slice such as v5e:2x2")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
if args.device in GPUS:
    # Without a device nothing can be timed, hence no search for the fastest tiles of XLA's own products.
    flags = ["--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"]
    nvidia = importlib.util.find_spec("nvidia")
    for folder in (nvidia and nvidia.submodule_search_locations) or ():
        if (Path(folder) / "cuda_nvcc").is_dir():
            flags.append(f"--xla_gpu_cuda_data_dir={Path(folder) / 'cuda_nvcc'}")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from empg_jax.algorithms import make_algorithm
from empg_jax.engine.programs import Chunk, Request, cache_sharding, compile_programs
from empg_jax.engine.sizes import EngineConfig
from empg_jax.hf.presets import make_preset
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import make_optimizer, state_shapes
from empg_jax.learner.update import make_learner
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.parallel.mesh import make_mesh, replicated

GPU_CONFIG = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores} fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 1536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: {per_core} shared_memory_per_block_optin: {per_block}
  memory_bandwidth: 1000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5 device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
KERNELS = ("__gpu$xla.gpu.triton", "tpu_custom_call")


def find_devices() -> list[Any]:
    """Find the descriptions of the devices to compile for."""
    if args.device not in GPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=args.device).devices
    (major, minor), cores, per_core, per_block, memory = GPUS[args.device]
    config = GPU_CONFIG.format(
        major=major,
        minor=minor,
        cores=cores,
        per_core=per_core * 1024,
        per_block=per_block * 1024,
        memory=memory * 10**9,
        name=f"NVIDIA {args.device.upper()}",  # JAX 0.11 tells the capability by this name
    )
    return topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=f"1x1x{args.devices}"
    ).devices


def name_device(kind: str) -> contextlib.AbstractContextManager[Any]:
    """Tell kernels the kind of GPU they are lowered for: JAX 0.11 asks a device, and here there is none."""
    if args.device not in GPUS:
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def shapes_of(tree: Any) -> Any:
    """Replace the arrays of a tree by their shapes and types."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def place(tree: Any, shardings: Any) -> Any:
    """Give shapes their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def lower_update(model: DecoderConfig, devices: list[Any]) -> Any:
    """Lower the update (GRPO with AEM, AdamW), split over all devices."""
    shards = len(devices) // args.tensor
    rows = shards * args.rows_per_device
    optimizer, _ = make_optimizer(learning_rate=1e-6, final_learning_rate=1e-7, total_steps=100)
    mesh = make_mesh(fsdp=shards, tensor=args.tensor, devices=devices)
    algorithm = make_algorithm("grpo", modulation="aem", num_minibatches=1)
    learner = make_learner(model, algorithm, optimizer, mesh, micro_rows=rows)
    shape = BatchShape(8, 4, args.length, rows, 2 * rows, 1)
    batch = shapes_of(make_batch([], shape, seed=(0,))[0])
    state = place(state_shapes(model, optimizer), learner.shardings)
    scores = shapes_of(jax.eval_shape(learner.recorded_scores, batch))
    credit = shapes_of(jax.eval_shape(learner.credit, batch, scores))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    return learner.update.lower(state, batch, scores, credit, index, index)


def make_engine(model: DecoderConfig, devices: list[Any]) -> tuple[Any, EngineConfig, Any, Any, Any]:
    """Build an engine of 16 conversations over the devices of the tensor axis.

    Returns:
      Its programs and sizes, the shapes of its weights and cache, and a function that places inputs.
    """
    sizes = EngineConfig(
        slots=16, max_tokens=args.length, max_response_tokens=128, stop_ids=(1, 2), page_tokens=args.pages
    )
    mesh = make_mesh(tensor=args.tensor, devices=devices[: args.tensor])
    programs = compile_programs(model, sizes, mesh)
    stacked = jax.eval_shape(lambda: init_params(jax.random.key(0), model))
    unstacked = programs.unstack.lower(place(stacked, param_shardings(mesh, stacked, model.head_dim)))
    params = place(unstacked.out_info, unstacked.compile().output_shardings)
    cache = jax.eval_shape(functools.partial(programs.new_cache, args.length))
    cache = place(cache, jax.tree.map(lambda _: cache_sharding(mesh, programs.layout, sizes), cache))
    return programs, sizes, params, cache, lambda x: place(x, jax.tree.map(lambda _: replicated(mesh), x))


def integers(*shape: int) -> jax.ShapeDtypeStruct:
    """Return the shape of an array of integers."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def lower_prefill(model: DecoderConfig, devices: list[Any]) -> Any:
    """Lower the prefill of four conversations by 512 tokens."""
    programs, _, params, cache, put = make_engine(model, devices)
    pages = integers(4, args.length // args.pages) if args.pages else None
    return programs.prefill.lower(
        params, cache, put(Chunk(integers(4), integers(4, 512), integers(4, 2), pages))
    )


def lower_decode(model: DecoderConfig, devices: list[Any]) -> Any:
    """Lower a burst of decode steps of all conversations."""
    programs, sizes, params, cache, put = make_engine(model, devices)
    request = Request(
        jax.eval_shape(lambda: jax.random.key(0)),
        integers(sizes.slots, 8),
        integers(sizes.slots, 4),
        integers(2),
        jax.ShapeDtypeStruct((sizes.slots,), jnp.float32),
        pages=integers(sizes.slots, args.length // args.pages) if args.pages else None,
    )
    return programs.decode.lower(params, cache, put(request))


def count_turned(text: str, model: DecoderConfig) -> int:
    """Count the bytes of copies, in a compiled program, that are as large as a layer's keys."""
    parts = math.gcd(args.tensor, model.num_kv_heads)
    least = 16 * args.length * model.num_kv_heads // parts * model.head_dim
    found, is_fused = 0, False
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            is_fused = "fused" in line.split("(")[0]  # a copy inside of a fusion is only an order of reading
        copy = re.search(r" = \(?[a-z]+(\d+)\[([\d,]+)\]\S* copy(?:-start)?\(", line)
        if copy and not is_fused:
            numbers = math.prod(int(size) for size in copy[2].split(","))
            found += numbers * int(copy[1]) // 8 if numbers >= least else 0
    return found


def main() -> int:
    """Compile the requested programs and print the result."""
    try:
        devices = find_devices()
    except (RuntimeError, ValueError) as error:
        print(f"no compiler for {args.device} (see --help): {error}", file=sys.stderr)
        return 2
    model = make_preset(args.preset, dtype=jnp.dtype(args.dtype), attention=args.attention)
    result: dict[str, Any] = {"jax": jax.__version__, "settings": vars(args), "devices": len(devices)}
    lower = {"update": lower_update, "prefill": lower_prefill, "decode": lower_decode}
    failed = False
    for name in args.programs:
        start = time.perf_counter()
        try:
            with name_device(devices[0].device_kind):
                program = lower[name](model, devices).compile()
        except RuntimeError as error:  # the compiler's, and those of lowering
            result[name], failed = {"error": str(error).splitlines()[0][:500]}, True
            continue
        memory, text = program.memory_analysis(), program.as_text()
        result[name] = {
            "seconds": round(time.perf_counter() - start, 1),
            "arguments_gb": round(memory.argument_size_in_bytes / 1e9, 2),
            "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 2),
            "kernel_calls": sum(text.count(f'custom_call_target="{kernel}"') for kernel in KERNELS),
        }
        if name != "update":
            result[name]["turned_gb"] = round(count_turned(text, model) / 1e9, 2)
        if traffic := (program.cost_analysis() or {}).get("bytes accessed"):
            result[name]["traffic_gb"] = round(traffic / 1e9, 2)
    print(json.dumps(result, indent=1))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
