"""What a mesh cannot split, so each device holds it whole or gathers it: one line each, with the cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
from jax.sharding import AbstractMesh

from empg_jax.learner.state import init_trained
from empg_jax.models.axes import param_axes
from empg_jax.models.decoder import DecoderConfig
from empg_jax.parallel.layout import cache_heads, head_shards
from empg_jax.parallel.mesh import AXES, RULES, Blocks, fit_spec, mesh_axes
from empg_jax.run.weights import base_shapes
from empg_jax.types import Params

if TYPE_CHECKING:
    from empg_jax.config import Config

MIB = 2**20
WORDS = {"vocab": "vocabulary", "embed": "hidden size", "kv_heads": "key/value heads", "mlp": "hidden layer"}


def whole_lines(config: Config, model: DecoderConfig) -> list[str]:
    """Return what a configuration's meshes do not split although they have more than one device for it.

    Args:
      config: the configuration. The devices of its meshes need not exist.
      model: the decoder's shape.
    """
    return [
        f"note: {line}" for line in (*_weights(config, model), *_time(config, model), *_cache(config, model))
    ]


def _weights(config: Config, model: DecoderConfig) -> Iterator[str]:
    mesh = AbstractMesh(tuple(vars(config.mesh)[axis] for axis in AXES), AXES)
    trained = jax.eval_shape(lambda: init_trained(jax.random.key(0), model))
    found = list(_missed(trained, model, mesh, 8))  # both moments in float32
    if model.lora is not None:
        found += _missed(base_shapes(config, model), model, mesh, 0)
    more: dict[tuple[str, str], float] = {}
    counts: dict[str, int] = {}
    for name, count, asked, size in found:
        more[name, asked] = more.get((name, asked), 0) + size
        counts[name] = max(counts.get(name, 0), count)  # packed matrices have fewer numbers
    for (name, asked), size in more.items():
        if size >= MIB:
            words = WORDS.get(name, name)
            yield f"{asked} does not divide {words} {counts[name]}: {size / MIB:.0f} MiB more on every device"


def _missed(
    params: Params, model: DecoderConfig, mesh: AbstractMesh, moments: int
) -> Iterator[tuple[str, int, str, float]]:
    """Yield name, parts, keys and bytes of each axis that has not as many parts as the mesh asks for.

    Args:
      params: shapes and types.
      model: the decoder's shape.
      mesh: sizes of the mesh's axes.
      moments: bytes of a number's moments.
    """
    axes = jax.tree.leaves(param_axes(params, model.head_dim), is_leaf=lambda node: isinstance(node, tuple))
    for leaf, names in zip(jax.tree.leaves(params), axes, strict=True):
        spec = fit_spec(mesh, names, leaf.shape)
        parts = math.prod(mesh.shape[name] for entry in spec for name in mesh_axes(entry))
        for axis, size, entry in zip(names, leaf.shape, spec, strict=True):
            name, block = axis if isinstance(axis, Blocks) else (axis, 1)
            left = [each for each in mesh_axes(RULES[name]) if each not in mesh_axes(entry)]
            missed = math.prod(mesh.shape[each] for each in left)
            if missed > 1:
                asked = " x ".join(f"mesh.{each}={mesh.shape[each]}" for each in left if mesh.shape[each] > 1)
                held = math.prod(leaf.shape) / parts * (leaf.dtype.itemsize + moments)
                yield str(name), size // block, asked, held * (1 - 1 / missed)


def _time(config: Config, model: DecoderConfig) -> Iterator[str]:
    mesh = vars(config.mesh)
    if mesh["sequence"] > head_shards(mesh, model.num_heads).sequence:
        yield (
            f"mesh.sequence={mesh['sequence']} does not divide the {model.num_heads} heads: keys and values "
            "are gathered, and attention costs about twice as much"
        )


def _cache(config: Config, model: DecoderConfig) -> Iterator[str]:
    tensor, heads = config.rollout.tensor, model.num_kv_heads
    if heads % tensor == 0:
        return
    kept = cache_heads(model.num_heads, heads, tensor)
    if kept % tensor:
        yield (
            f"rollout.tensor={tensor} does not divide the {model.num_heads} heads: every device holds the "
            "whole KV cache, and gathers it for every burst"
        )
    else:
        yield (
            f"rollout.tensor={tensor} does not divide {heads} key/value heads: each is kept "
            f"{kept // heads} times, so a device holds 1/{tensor * heads // kept} of the KV cache"
        )
