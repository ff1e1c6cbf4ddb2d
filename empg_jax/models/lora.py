"""Low-rank adapters (LoRA, arXiv 2106.09685) as a parameter tree separate from the frozen base.

An adapted layer computes ``x W + (alpha / rank) (x A) B``. ``A [in r]`` starts random and ``B [r out]`` at
zero, so that a new adapter changes nothing. The tree of adapters has the base's module names::

    layers/<module>/lora_a [L in r]    layers/<module>/lora_b [L r out]

`combine` joins both trees without copying. `merge` adds the adapters to the matrices.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from empg_jax.models.quantize import dequantize_module, matrix_shape
from empg_jax.types import Params


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The configuration of adapters.

    Attributes:
      rank: number of columns of A.
      alpha: the adapter's product is scaled by ``alpha / rank``.
      targets: patterns (``*``, ``?``) over module names. A linear layer is adapted if one of them matches.
    """

    rank: int
    alpha: float = 32.0
    targets: tuple[str, ...] = ("*_proj",)

    def __post_init__(self) -> None:
        """Refuse a configuration that adapts nothing."""
        if self.rank < 1 or not self.targets:
            raise ValueError(f"LoRA needs rank >= 1 and a target, not rank={self.rank}, {self.targets}")

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return self.alpha / self.rank


def make_lora(key: jax.Array, base: Params, config: LoraConfig) -> Params:
    """Initialize adapters in float32: A normal with standard deviation ``1 / sqrt(in)``, B zero.

    Args:
      key: PRNG key.
      base: stacked base parameters, quantized or not, or their shapes.
      config: rank and targets.

    Raises:
      ValueError: a pattern matches no linear layer.
    """
    adapters: Params = {}
    modules = find_targets(base, config.targets)
    for number, (path, shape) in enumerate(modules.items()):
        *layers, depth, width = shape
        # A separate key for each module, so that no two adapters start equal.
        down = jax.random.normal(jax.random.fold_in(key, number), (*layers, depth, config.rank))
        node = adapters
        for name in path:
            node = node.setdefault(name, {})
        node["lora_a"] = down * jnp.float32(depth**-0.5)
        node["lora_b"] = jnp.zeros((*layers, config.rank, width), jnp.float32)
    return adapters


def find_targets(base: Params, patterns: tuple[str, ...]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Find the linear layers that match at least one pattern.

    Returns:
      Path of each module, and the shape ``[L in out]`` of its matrix.

    Raises:
      ValueError: a pattern matches no linear layer.
    """
    modules = dict(_linear_modules(base["layers"], ("layers",)))
    names = sorted({path[-1] for path in modules})
    idle = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    if idle:
        raise ValueError(
            f"LoRA target {', '.join(idle)} fits no linear layer; the model has {', '.join(names)}"
        )
    return {
        path: shape
        for path, shape in modules.items()
        if any(fnmatch.fnmatchcase(path[-1], pattern) for pattern in patterns)
    }


def _linear_modules(tree: Params, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    for name, node in sorted(tree.items()):
        if isinstance(node, dict):
            shape = matrix_shape(node)
            # Three axes are layer, in, out. Matrices of experts have a fourth axis and no adapters.
            if shape is not None and len(shape) == 3:
                yield (*path, name), shape
            yield from _linear_modules(node, (*path, name))


def combine(base: Params, adapters: Params) -> Params:
    """Join base and adapters to the one tree that the model applies; nothing is copied.

    Raises:
      ValueError: both trees have a leaf at the same path.
    """
    if isinstance(base, tuple):  # unstacked layers
        return tuple(combine(*pair) for pair in zip(base, adapters, strict=True))
    shared = base.keys() & adapters.keys()
    taken = [name for name in shared if not isinstance(base[name], dict | tuple)]
    if taken:
        raise ValueError(f"the base already has {', '.join(sorted(taken))}, which the adapters bring")
    return {**base, **adapters, **{name: combine(base[name], adapters[name]) for name in shared}}


def merge(base: Params, adapters: Params, scale: float, dtype: Any = None) -> Params:
    """Merge adapters into their matrices as ``W + scale A B``, added in float32.

    Args:
      base: stacked base parameters; quantized matrices become plain ones.
      adapters: their adapters; other leaves (a critic's head) are kept unchanged.
      scale: `LoraConfig.scale`.
      dtype: type of the merged matrices; the default is the type of the base's norms.
    """
    dtype = dtype or base["final_norm"]["scale"].dtype

    def walk(node: Params) -> Params:
        if not isinstance(node, dict):
            return node
        if matrix_shape(node) is not None:
            return _merge_module(node, scale, dtype)
        return {name: walk(child) for name, child in node.items()}

    return walk(combine(base, adapters))


def _merge_module(module: Params, scale: float, dtype: Any) -> Params:
    """Merge one stacked linear layer, layer by layer so that only one float32 copy exists at a time."""
    names = ("lora_a", "lora_b")
    kept = {name: module[name] for name in module.keys() & {"bias"}}
    matrices = {name: leaf for name, leaf in module.items() if name not in kept}

    def fold(layer: Params) -> jax.Array:
        unpack: Callable[[Params], jax.Array] = functools.partial(dequantize_module, dtype=jnp.float32)
        for _ in range(num_experts_axes):
            unpack = jax.vmap(unpack)
        kernel = unpack({k: v for k, v in layer.items() if k not in names})
        if "lora_a" in layer:
            down, up = (layer[name].astype(jnp.float32) for name in names)
            kernel = kernel + jnp.float32(scale) * (down @ up)
        return kernel.astype(dtype)

    if matrices.keys() == {"kernel"}:  # neither quantized nor adapted
        return module
    num_experts_axes = len(matrix_shape(module) or ()) - 3
    return {"kernel": jax.jit(lambda stacked: jax.lax.map(fold, stacked))(matrices), **kept}
