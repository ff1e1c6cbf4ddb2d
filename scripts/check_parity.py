"""Parity on this machine's accelerator: prints one JSON object, exits 1 when a tolerance is exceeded.

* ``cpu_*``: log-probs and entropies of the learner's forward on the accelerator against float32 on its CPU.
* ``engine_*``: log-probs that the engine recorded while sampling against the learner's on the same tokens.

Needs no pydantic and no typer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.learner.update import compute_logprobs
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.rollout.engine import Engine
from empg_jax.rollout.programs import EngineConfig

# Mean and largest absolute difference allowed. bfloat16 has 8 bits of mantissa: its logits are good to 1 %.
TOLERANCES = {"float32": (1e-5, 1e-3), "bfloat16": (3e-2, 5e-1)}


def check(dtype: str, rows: int = 4, length: int = 256) -> dict[str, float]:
    """Differences of one compute type, on random weights and tokens."""
    model = DecoderConfig(
        vocab_size=8192,
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        intermediate_size=1024,
        dtype=jnp.dtype(dtype),
    )
    exact = dataclasses.replace(model, dtype=jnp.dtype("float32"))
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
    result = {"cpu_mean": float(np.mean(gaps)), "cpu_max": float(np.max(gaps))}

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
    return result | {"engine_mean": float(merged.mean()), "engine_max": float(merged.max())}


def main() -> int:
    """Check both types and print the result."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    report: dict[str, object] = {"device": str(jax.devices()[0].device_kind), "jax": jax.__version__}
    passed = True
    for dtype, (mean, largest) in TOLERANCES.items():
        found = check(dtype)
        fits = all(value <= (mean if name.endswith("mean") else largest) for name, value in found.items())
        report[dtype] = {**found, "within": fits}
        passed = passed and fits
    print(json.dumps(report, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
