"""Launches on several accelerators take turns: as seen in a run, and where there is no need."""

import contextlib
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.engine.programs import compile_programs
from empg_jax.parallel import order
from empg_jax.parallel.mesh import make_mesh
from empg_jax.run.consumed import read_consumed
from tests import runs


def stand_in(platform, size):
    """What `launching` reads of a mesh."""
    devices = np.array([types.SimpleNamespace(platform=platform)] * size).reshape(size, 1, 1, 1)
    return types.SimpleNamespace(size=size, devices=devices)


class Turn(contextlib.AbstractContextManager):
    """The turn of all; notes the threads that had it, and whether two had it at a time."""

    def __init__(self):
        self._lock, self._owners = threading.RLock(), []
        self.names, self.is_shared = set(), False

    def __enter__(self):
        self._lock.acquire()
        self._owners.append(threading.current_thread().name)
        self.names.add(self._owners[-1])
        self.is_shared |= len(set(self._owners)) > 1

    def __exit__(self, *error):
        self._owners.pop()
        self._lock.release()


@pytest.fixture
def turn(monkeypatch):
    """Every mesh takes turns meanwhile."""
    turn = Turn()
    monkeypatch.setattr(order, "_TURN", turn)
    monkeypatch.setattr(order, "_has_queues", lambda mesh: True)
    compile_programs.cache_clear()  # engines of the same shape share them
    yield turn
    compile_programs.cache_clear()


def test_only_several_accelerators_take_turns():
    first, second = (order.launching(stand_in(platform, 4)) for platform in ("gpu", "tpu"))
    assert first is second  # of the whole process, as two meshes may share devices
    for mesh in (stand_in("gpu", 1), make_mesh(), make_mesh(data=2)):
        assert isinstance(order.launching(mesh), contextlib.nullcontext)
    assert type(order.jit_on_mesh(make_mesh(data=2), jnp.negative)) is type(jax.jit(jnp.negative))


def test_a_program_in_turn_is_the_program(turn):
    program = order.jit_on_mesh(make_mesh(data=2), lambda x, *, plus: x + plus, static_argnames="plus")
    assert program(np.arange(2), plus=1).tolist() == [1, 2] and turn.names == {"MainThread"}
    assert program.lower(np.arange(2), plus=1).compile()(np.arange(2)).tolist() == [1, 2]
    assert program.trace(np.arange(2), plus=2).out_info.shape == (2,)


@pytest.mark.slow
def test_learner_and_engine_take_turns(tmp_path, turn):
    devices = ["mesh.data=2", "rollout.data=2", "train.max_lag=1", "sft.updates=0", "eval.tasks=2"]
    run = runs.train(tmp_path / "run", *runs.HOUSE, *devices)
    assert sorted(line["group_id"] for line in read_consumed(run)) == list(range(6))
    assert {"MainThread", "rollout"} <= turn.names and not turn.is_shared
