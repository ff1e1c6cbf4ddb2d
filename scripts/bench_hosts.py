"""What several hosts cost, measured with two processes over gloo on this machine. Print one JSON object.

``publish``: memory beside the old weights while new ones come from a mesh over both hosts to each engine:
the highest resident memory above that before (the kernel's count), beside the bytes of a replica and a layer.
``agree``: seconds of what the hosts tell each other per update: the batch's episodes and whether to save.
All episodes are ready, so that no host waits for another one's environments. On a busy machine the least of
many rounds and the processor's time say more than the median.

    python scripts/bench_hosts.py publish --preset qwen2.5-0.5b --dtype bfloat16
    python scripts/bench_hosts.py agree --episodes 64 --rounds 100
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.config.hosts import HostsConfig
from empg_jax.engine.engine import Engine, EngineConfig, EngineStats
from empg_jax.hf.presets import make_preset
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import init_params
from empg_jax.parallel.hosts import Hosts, joined
from empg_jax.parallel.mesh import make_mesh
from empg_jax.rollout.thread import Delivery
from empg_jax.run.process import StopRequest
from empg_jax.run.together import gather_delivery
from empg_jax.types import Outcome, Status, Trajectory, Turn

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("what", choices=("publish", "agree"))
parser.add_argument("--preset", default="qwen2.5-0.5b")
parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
parser.add_argument("--publications", type=int, default=3)
parser.add_argument("--episodes", type=int, default=64, help="episodes of each host per update")
parser.add_argument("--turns", type=int, default=8, help="turns of an episode")
parser.add_argument("--tokens", type=int, default=8, help="sampled tokens of a turn, each after 24 others")
parser.add_argument("--rounds", type=int, default=100)
parser.add_argument("--seat", nargs=2, help=argparse.SUPPRESS)  # index and port of a process


def read_memory(name: str) -> int:
    """A number of this process's memory in /proc, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def settle() -> int:
    """Give free memory back to the system, begin a new peak, and return the resident memory."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return read_memory("VmRSS")


def make_split(model: Any) -> Any:
    """Random weights, half of them on each host, stacked as the learner's."""
    mesh = make_mesh(data=1, fsdp=2, tensor=1, sequence=1)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), model))

    def make(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.Array:
        def fill(index: Any) -> np.ndarray:
            shape = [len(range(*part.indices(n))) for part, n in zip(index, leaf.shape, strict=True)]
            return np.random.default_rng(0).standard_normal(shape, np.float32).astype(leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, sharding, fill)

    return jax.tree.map(make, shapes, param_shardings(mesh, shapes, model.head_dim))


def measure_publication(args: argparse.Namespace, hosts: Hosts) -> dict[str, Any]:
    """The memory of publications, after one that compiles."""
    dtype = jnp.dtype(args.dtype)
    model = make_preset(args.preset, dtype=dtype, param_dtype=dtype)
    params = make_split(model)
    here = make_mesh(data=1, fsdp=1, tensor=1, sequence=1, devices=jax.local_devices()[:1])
    engine = Engine(model, EngineConfig(1, 64, 8, stop_ids=(1,)), seed=0, mesh=here)
    placed = engine.place(params)
    extra, seconds = [], []
    for _ in range(args.publications):
        before, began = settle(), time.perf_counter()
        hosts.barrier("begin")
        new = engine.place(params)
        seconds.append(round(time.perf_counter() - began, 2))
        extra.append(read_memory("VmHWM") - before)
        placed = new  # the old replica was there until now, as in a run
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(placed)]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(placed["layers"][0]))
    return {
        "preset": args.preset,
        "dtype": args.dtype,
        "replica_bytes": sum(sizes),
        "layer_bytes": layer,
        "bound_bytes": sum(sizes) + layer,
        "peak_extra_bytes": extra,
        "seconds": seconds,
    }


def make_episode(args: argparse.Namespace, group: int, member: int) -> Trajectory:
    """An episode whose prompts grow, as those of a transcript."""
    tokens, turns = np.arange(6, 6 + 24, dtype=np.int32), []
    for _ in range(args.turns):
        sampled = np.arange(args.tokens, dtype=np.int32)
        numbers = np.linspace(-3, 0, args.tokens, dtype=np.float32)
        turns.append(
            Turn(
                prompt_tokens=tokens,
                response_tokens=sampled,
                behavior_logprobs=numbers,
                entropies=-numbers,
                reward=0.0,
                version=0,
                anchor=group,
                is_valid=True,
                finish_reason="stop",
            )
        )
        tokens = np.concatenate([tokens, sampled, np.arange(24, dtype=np.int32)])
    won = Outcome(Status.TRAINED, "won")
    return Trajectory(
        task=group,
        split="train",
        group_id=group,
        member=member,
        turns=tuple(turns),
        outcome=won,
        episode_return=1.0,
        is_success=True,
        terminated=True,
        truncated=False,
    )


def measure_agreement(args: argparse.Namespace, hosts: Hosts) -> dict[str, Any]:
    """The seconds of an update's two agreements."""
    group = 8
    episodes = [
        make_episode(args, hosts.index + hosts.num * (number // group), number % group)
        for number in range(args.episodes)
    ]
    batches, whether, work = [], [], []
    with StopRequest(None) as stop:
        for update in range(args.rounds + 5):
            delivery = Delivery(update, episodes, {}, EngineStats(), {}, {})
            hosts.barrier("begin")
            began, worked = time.perf_counter(), time.process_time()
            whole = gather_delivery(hosts, lambda delivery=delivery: delivery, stop)
            batches.append(time.perf_counter() - began)
            hosts.any("is-time", False)
            whether.append(time.perf_counter() - began - batches[-1])
            work.append(time.process_time() - worked)
            assert len(whole.trajectories) == hosts.num * args.episodes
    total = [a + b for a, b in zip(batches, whether, strict=True)][5:]  # the first ones import and connect

    def in_ms(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        p90 = ordered[math.ceil(0.9 * len(ordered)) - 1]
        at = {"least": ordered[0], "median": statistics.median(ordered), "p90": p90}
        return {name: round(1000 * value, 2) for name, value in at.items()}

    return {
        "episodes_per_host": args.episodes,
        "sampled_tokens_per_host": sum(episode.num_tokens for episode in episodes),
        "rounds": args.rounds,
        "batch_ms": in_ms(batches[5:]),
        "whether_to_save_ms": in_ms(whether[5:]),
        "per_update_ms": in_ms(total),
        "per_update_cpu_ms": in_ms(work[5:]),
    }


def run_seat(args: argparse.Namespace) -> None:
    """One of the two processes."""
    index, port = map(int, args.seat)
    section = HostsConfig(coordinator=f"127.0.0.1:{port}", num=2, index=index)
    measure = measure_publication if args.what == "publish" else measure_agreement
    with joined(section, dict) as hosts:
        found = hosts.agree("found", measure(args, hosts))
        if hosts.is_first:
            print(json.dumps({"host_0": found[0], "host_1": found[1]}, indent=1), flush=True)


def main() -> None:
    args = parser.parse_args()
    if args.seat is not None:
        run_seat(args)
        return
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, *sys.argv]
    # Freed arrays go back to the system at once, whatever their size: the resident memory is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    processes = [subprocess.Popen([*command, "--seat", str(i), str(port)], env=env) for i in range(2)]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
