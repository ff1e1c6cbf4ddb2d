"""The engine's copy of the weights: in its layout, on its devices."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from empg_jax.engine.programs import Programs
from empg_jax.models.axes import param_shardings
from empg_jax.models.quantize import cast_params
from empg_jax.parallel.arrays import move_in_pieces
from empg_jax.parallel.order import launching
from empg_jax.types import Params


def place_params(params: Params, programs: Programs, mesh: Mesh) -> Params:
    """Copy stacked parameters into an engine's layout and placement; return when they are there.

    They come layer by layer (`move_in_pieces`), so that beside the copy only one piece needs memory.

    Args:
      params: the parameters, on any devices.
      programs: the engine's programs.
      mesh: its devices.
    """
    return move_in_pieces(params, functools.partial(place_piece, programs=programs, mesh=mesh))


def place_piece(params: Params, *, programs: Programs, mesh: Mesh) -> Params:
    """Copy parameters that are all here; as `place_params`."""
    with launching(mesh):
        # Cast first, where the learner has its parts: the engine's devices may hold much larger ones.
        narrow = _cast(params, programs.layout.dtype)
        moved = jax.device_put(narrow, param_shardings(mesh, params, programs.layout.head_dim))
        placed = programs.unstack(moved)
    return jax.block_until_ready(placed)


_cast = jax.jit(cast_params, static_argnums=1)
