"""One order of launches for devices that two threads share, the learner's and the engine's.

A program over several devices is started on one after the other. Of two that are started at a time, one
device may begin with the first and another with the second; where both exchange data between devices, each
then waits for the other for ever. So a launch is a turn, in which no other thread launches. It takes as long
as to queue the program, not as to run it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from empg_jax.parallel.layout import on_mesh

_TURN = threading.RLock()


def launching(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which this thread alone launches programs on a mesh of several accelerators.

    On one device nothing is exchanged. CPUs have no queues in which a program waits behind another one, and
    may run it within the launch.
    """
    return _TURN if _has_queues(mesh) else contextlib.nullcontext()


def jit_on_mesh(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
    """Return a function jitted for a mesh (`layout.on_mesh`), whose launches take turns (`launching`).

    Args:
      mesh: the devices of its arrays.
      function: what `jax.jit` takes.
      options: those of `jax.jit`.
    """
    program = jax.jit(on_mesh(mesh, function), **options)
    return _InTurn(program) if _has_queues(mesh) else program


def _has_queues(mesh: Mesh) -> bool:
    return mesh.size > 1 and mesh.devices.flat[0].platform != "cpu"


class _InTurn:
    """A jitted program whose calls take turns; all else, as ``lower``, is the program's own."""

    def __init__(self, program: Any) -> None:
        self._program = program

    def __call__(self, *args: Any, **options: Any) -> Any:
        with _TURN:
            return self._program(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)
