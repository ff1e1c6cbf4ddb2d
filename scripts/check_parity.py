"""Check parity on this machine's accelerator: a table, one JSON object, exit code 1 beyond a tolerance.

* ``cpu``: log-probs and entropies of the learner's forward on the accelerator against float32 on its CPU.
* ``engine``: log-probs that the engine recorded while sampling against the learner's on the same tokens.
* ``attention output``, ``attention slope of ...``: the platform's fused kernel (Triton on a GPU, splash on a
  TPU) against the XLA tiles on the same device, packed rows, as a share of the tiles' root mean square. On a
  CPU both are the tiles.
* ``rows decode``, ``rows prefill``, ``pages decode``: the platform's kernels over the engine's cache against
  XLA's products over all of it, on the same device, as a share of these. On a CPU both are the same.

The JSON goes to the standard output, the table to the standard error. Needs no pydantic and no typer.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.engine.engine import Engine
from empg_jax.engine.sizes import EngineConfig
from empg_jax.hf.presets import make_preset
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.models.attention import attend_pages, packed_attention
from empg_jax.models.attention.cached import attend, cached_attention
from empg_jax.models.attention.paged import gather_pages
from empg_jax.models.decoder import DecoderConfig, init_params

# Mean and largest absolute difference allowed. bfloat16 has 8 bits of mantissa: its logits are good to 1 %.
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (3e-2, 5e-1)}
ATTENTION_TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (1e-2, 3e-1)}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument(
    "--only", nargs="+", default=["model", "attention", "cache"], choices=("model", "attention", "cache")
)
parser.add_argument("--dtypes", nargs="+", default=list(TOLERANCES), choices=list(TOLERANCES))
parser.add_argument("--preset", help="shape of a well-known model, with random weights; default: a small one")
parser.add_argument("--out", type=Path)
args = parser.parse_args()

Gaps = dict[str, tuple[float, float]]  # mean and largest difference by what is compared


def share(ours: jax.Array, expected: jax.Array) -> tuple[float, float]:
    """Return the mean and the largest difference, as shares of the root mean square."""
    wide = [np.asarray(x, np.float32) for x in (ours, expected)]
    gap = np.abs(wide[0] - wide[1]) / np.sqrt(np.mean(wide[1] ** 2))
    return float(gap.mean()), float(gap.max())


def check_attention(dtype: str, length: int = 1000) -> Gaps:
    """Compare fused attention with tiles: Qwen2.5-1.5B's heads, rows of several segments, no whole block."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = {"queries": 12, "keys": 2, "values": 2, "slope": 12}
    q, k, v, slope = (
        jax.random.normal(key, (2, length, n, 128), jnp.dtype(dtype))
        for key, n in zip(keys, heads.values(), strict=True)
    )
    segments = jnp.searchsorted(jnp.array([100, 350, 900]), jnp.arange(length), side="right") + 1
    segments = jnp.broadcast_to(segments, (2, length))

    @functools.partial(jax.jit, static_argnames="backend")
    def run(q: jax.Array, k: jax.Array, v: jax.Array, backend: str) -> list[jax.Array]:
        output, pull = jax.vjp(lambda *x: packed_attention(*x, segments, backend=backend), q, k, v)
        return [x.astype(jnp.float32) for x in (output, *pull(slope))]

    names = ["output", *(f"slope of {name}" for name in list(heads)[:3])]
    gaps = {}
    for name, ours, tiled in zip(names, run(q, k, v, "auto"), run(q, k, v, "xla"), strict=True):
        gaps[f"attention {name}"] = share(ours, tiled)
    return gaps


def check_cache(dtype: str) -> Gaps:
    """Compare attention over the cache with products over all of it."""
    return check_rows(dtype) | check_pages(dtype)


def check_rows(dtype: str, rows: int = 8, capacity: int = 1024) -> Gaps:
    """Compare a decode step and a prefill over rows: Qwen2.5-1.5B's heads, rows filled to any length."""
    keys = jax.random.split(jax.random.key(0), 4)
    cache = [jax.random.normal(key, (rows, 2, capacity, 128), jnp.dtype(dtype)) for key in keys[:2]]
    starts = np.random.default_rng(0).integers(0, capacity - 96, (rows, 1))
    gaps = {}
    for name, key, length in (("rows decode", keys[2], 1), ("rows prefill", keys[3], 96)):
        queries = jax.random.normal(key, (rows, length, 12, 128), jnp.dtype(dtype))
        positions = jnp.asarray(starts + np.arange(length), jnp.int32)
        ours, expected = (jax.jit(body)(queries, *cache, positions) for body in (cached_attention, attend))
        gaps[name] = share(ours, expected)
    return gaps


def check_pages(dtype: str, rows: int = 16, size: int = 16, columns: int = 64) -> Gaps:
    """Compare a decode step over pages with one over rows: Qwen2.5-1.5B's heads, one row idle."""
    keys = jax.random.split(jax.random.key(0), 6)
    pool = [jax.random.normal(key, (2, 600, size, 128), jnp.dtype(dtype)) for key in keys[:2]]
    new = [jax.random.normal(key, (rows, 1, 2, 128), jnp.dtype(dtype)) for key in keys[2:4]]
    queries = jax.random.normal(keys[4], (rows, 1, 12, 128), jnp.dtype(dtype))
    lengths = np.random.default_rng(0).integers(1, size * columns, rows)
    pages, fresh = np.zeros((rows, columns), np.int32), 20
    for row, length in enumerate(lengths):
        needed = -(-(int(length) + 1) // size)
        shared = min(4, needed - 1)  # the beginning of all rows
        pages[row, :needed] = [*range(shared), *range(fresh, fresh + needed - shared)]
        fresh += needed - shared
    assert fresh <= 600
    positions = jnp.asarray(lengths, jnp.int32)[:, None].at[3].set(size * columns)

    @jax.jit
    def run(queries: jax.Array, new: list[jax.Array], pool: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        ours, written = attend_pages(queries, tuple(new), tuple(pool), jnp.asarray(pages), positions)
        gathered = [gather_pages(x, jnp.asarray(pages)) for x in written]
        return ours, attend(queries, *gathered, positions)

    ours, expected = (jnp.delete(x, 3, axis=0) for x in run(queries, new, pool))
    return {"pages decode": share(ours, expected)}


def check_model(dtype: str, rows: int = 4, length: int = 256) -> Gaps:
    """Measure the differences of one compute type, on random weights and tokens."""
    model = (
        make_preset(args.preset)
        if args.preset
        else DecoderConfig(
            vocab_size=8192,
            hidden_size=256,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            intermediate_size=1024,
        )
    )
    model, exact = (dataclasses.replace(model, dtype=jnp.dtype(kind)) for kind in (dtype, "float32"))
    params = init_params(jax.random.key(0), model)
    tokens = jax.random.randint(jax.random.key(1), (rows, length), 4, model.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    inputs = (params, tokens, positions, jnp.ones_like(tokens))

    def score(config: DecoderConfig, device: jax.Device) -> list[np.ndarray]:
        placed = jax.device_put(inputs, device)
        return [
            np.asarray(x) for x in jax.jit(compute_logprobs, static_argnums=1)(placed[0], config, *placed[1:])
        ]

    ours, reference = score(model, jax.devices()[0]), score(exact, jax.devices("cpu")[0])
    gaps = [np.abs(a - b)[:, 1:] for a, b in zip(ours, reference, strict=True)]

    sizes = EngineConfig(slots=rows, max_tokens=length, max_response_tokens=32, stop_ids=(2,))
    engine = Engine(model, sizes, seed=0)
    engine.load(params, 0)
    differences = []
    for turn in range(3):
        for slot in range(rows):
            engine.submit(
                slot,
                np.asarray(tokens[slot, 20 * turn : 20 * turn + 20]),
                is_fresh=turn == 0,
                ids=(0, slot, 0, turn),
            )
        while engine.has_work:
            for response in engine.step():
                held = np.concatenate([response.prompt_tokens, response.tokens])
                row = np.zeros((1, length), np.int32)
                row[0, : len(held)] = held
                logprobs, _ = jax.jit(compute_logprobs, static_argnums=1)(
                    params, model, row, np.arange(length, dtype=np.int32)[None], np.ones_like(row)
                )
                start = len(response.prompt_tokens)
                differences.append(np.abs(np.asarray(logprobs)[0, start : len(held)] - response.logprobs))
    merged = np.concatenate(differences)
    return {
        "cpu": (float(np.mean(gaps)), float(np.max(gaps))),
        "engine": (float(merged.mean()), float(merged.max())),
    }


def main() -> int:
    """Check both types and print the result."""
    jax.config.update("jax_default_matmul_precision", "highest")
    rows: list[dict[str, object]] = []
    print(
        f"{'type':10}{'check':28}{'mean':>10}{'allowed':>10}{'largest':>10}{'allowed':>10}", file=sys.stderr
    )
    checks = {
        "model": (check_model, TOLERANCES),
        "attention": (check_attention, ATTENTION_TOLERANCES),
        "cache": (check_cache, ATTENTION_TOLERANCES),
    }
    for check, tolerances in (checks[name] for name in args.only):
        for dtype in args.dtypes:
            mean_allowed, max_allowed = tolerances[dtype]
            for name, (mean, largest) in check(dtype).items():
                # Written so that a difference that is not a number fails.
                fits = mean <= mean_allowed and largest <= max_allowed
                rows.append({"type": dtype, "check": name, "mean": mean, "max": largest, "within": fits})
                print(
                    f"{dtype:10}{name:28}{mean:10.1e}{mean_allowed:10.0e}{largest:10.1e}{max_allowed:10.0e}"
                    f"{'' if fits else '  EXCEEDED'}",
                    file=sys.stderr,
                )
    device = jax.devices()[0]
    text = json.dumps({"device": str(device.device_kind), "jax": jax.__version__, "rows": rows}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
