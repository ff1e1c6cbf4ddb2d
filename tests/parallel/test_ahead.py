"""Programs compile side by side before they run: each once, in the form that later calls find."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.parallel import ahead
from empg_jax.parallel.ahead import warm_up
from empg_jax.parallel.mesh import make_mesh, replicated
from empg_jax.run.process import CompileCounter


def make_programs():
    """A program whose result another one takes, donated; the first has a bound argument."""
    placed = replicated(make_mesh())
    first = jax.jit(lambda x, base: {"y": jnp.sin(x) + base}, out_shardings=placed)
    second = jax.jit(lambda y, n: y["y"] * n, out_shardings=placed, donate_argnums=0)
    base = jax.device_put(np.ones(3, np.float32), placed)
    return functools.partial(first, base=base), second, jax.device_put(np.arange(3, dtype=np.float32), placed)


def test_every_program_compiles_once_and_runs_once():
    first, second, x = make_programs()
    seen, checks = [], []

    def call_all(call):
        y = call(first, x)
        seen.append(call(lambda y: y["y"], y))  # a plain function is not compiled
        seen.append(call(second, y, np.float32(2)))

    with CompileCounter() as compiled:
        warm_up(call_all, lambda: checks.append(compiled.count))
        assert compiled.count == 2 == len(checks)
        second(first(x), np.float32(3))
        assert compiled.count == 2
    assert seen[0] is None and seen[1].shape == (3,) and not isinstance(seen[1], jax.Array)
    np.testing.assert_allclose(seen[3], 2 * (np.sin(np.arange(3)) + 1), rtol=1e-6)


@pytest.mark.parametrize(("share", "threads"), [("150000 100000", 2), ("max 100000", 8), (None, 8)])
def test_a_container_compiles_on_the_cores_that_it_may_use(share, threads, tmp_path, monkeypatch):
    started = []

    class Pool(ahead.ThreadPoolExecutor):
        def __init__(self, size, name):
            started.append(size)
            super().__init__(size, name)

    if share is not None:
        (tmp_path / "cpu.max").write_text(f"{share}\n")
    monkeypatch.setattr(ahead, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(ahead, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda process: set(range(8)))
    warm_up(lambda call: None, lambda: None)
    assert started == [threads]


def test_a_check_that_raises_ends_the_warm_up():
    first, second, x = make_programs()
    ran = []

    def call_all(call):
        ran.append(call(second, call(first, x), np.float32(2)))

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        warm_up(call_all, stop)
    assert len(ran) == 1  # lowered, and never run


def test_what_the_compiler_refuses_is_told():
    bad = jax.jit(lambda x: x, compiler_options={"no_such_option": True})
    with pytest.raises(Exception, match="no_such_option"):
        warm_up(lambda call: call(bad, np.float32(1)), lambda: None)
