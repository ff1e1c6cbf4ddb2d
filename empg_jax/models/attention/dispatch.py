"""Functions with one body per platform, selected when a program is lowered.

``jax.lax.platform_dependent`` does the same with two disadvantages. It traces every body for every program.
It also cannot export a module for several platforms: it lowers each body for all platforms, and a Pallas
kernel can be lowered for its own platform only. A primitive with a lowering rule per platform avoids both: a
CPU program never traces a GPU kernel.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def by_platform(
    name: str, default: Callable[..., tuple[Any, ...]], **bodies: Callable[..., tuple[Any, ...]]
) -> Callable[..., tuple[Any, ...]]:
    """Build one function from bodies for different platforms.

    Every array's first axis is rows, and every body computes each row independently. The function has no
    derivative: wrap it in `jax.custom_vjp`.

    Args:
      name: name of the operation in a jaxpr.
      default: the body for all other platforms. It takes the arrays, and options by keyword. It also
        defines the shapes of the results.
      **bodies: bodies by platform (``cuda``, ``rocm``, ``tpu``, ``cpu``); they take the arrays only.

    Returns:
      A function with the signature of ``default``; it supports `jax.vmap`.
    """
    operation = Primitive(name)
    operation.multiple_results = True

    @operation.def_impl
    def run(*arrays: Any, **options: Any) -> Any:
        return jax.jit(functools.partial(operation.bind, **options))(*arrays)

    @operation.def_abstract_eval
    def shapes(*arrays: Any, **options: Any) -> Any:
        found = jax.eval_shape(functools.partial(default, **options), *arrays)
        return [jax.core.ShapedArray(x.shape, x.dtype) for x in found]

    def map_over(arrays: Any, axes: Any, **options: Any) -> Any:
        """Map by merging the mapped axis into the rows, which are independent anyway."""
        size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
        moved = [
            jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(arrays, axes, strict=True)
        ]
        rows = moved[0].shape[1]
        found = operation.bind(*(x.reshape(size * rows, *x.shape[2:]) for x in moved), **options)
        return [x.reshape(size, rows, *x.shape[1:]) for x in found], [0] * len(found)

    batching.primitive_batchers[operation] = map_over
    mlir.register_lowering(operation, mlir.lower_fun(default, multiple_results=True))
    for platform, body in bodies.items():
        mlir.register_lowering(operation, _lower_for(platform, body), platform=platform)
    return operation.bind


def load_late(module: str, name: str) -> Callable[..., Any]:
    """Return a function of a module that is imported at its first call.

    A body that only one platform traces need not be loaded on the others: Pallas takes a while.
    """

    def call(*arrays: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*arrays, **options)

    return call


def _lower_for(platform: str, body: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Return a lowering rule for a body whose operations exist on one platform only."""
    rule = mlir.lower_fun(body, multiple_results=True)

    def lower(context: mlir.LoweringRuleContext, *arrays: Any, **options: Any) -> Any:
        del options
        # An empty cache, so that an operation lowered for this platform is not reused for another one.
        module = context.module_context.replace(platforms=(platform,), cached_primitive_lowerings={})
        return rule(context.replace(module_context=module), *arrays)

    return lower
