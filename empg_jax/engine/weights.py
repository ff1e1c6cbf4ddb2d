"""The engine's copy of the weights: in its layout, on its devices."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from empg_jax.engine.programs import Programs
from empg_jax.models.axes import param_shardings
from empg_jax.parallel.arrays import is_here, move_in_pieces
from empg_jax.types import Params


def place_params(params: Params, programs: Programs, mesh: Mesh) -> Params:
    """Copy stacked parameters into an engine's layout and placement; return when they are there.

    Parameters that are split over hosts come layer by layer (`move_in_pieces`).

    Args:
      params: the parameters, on any devices.
      programs: the engine's programs.
      mesh: its devices.
    """
    place = functools.partial(place_piece, programs=programs, mesh=mesh)
    return place(params) if is_here(params) else move_in_pieces(params, place)


def place_piece(params: Params, *, programs: Programs, mesh: Mesh) -> Params:
    """Copy parameters that are all here; as `place_params`."""
    moved = jax.device_put(params, param_shardings(mesh, params, programs.layout.head_dim))
    return jax.block_until_ready(programs.unstack(moved))
