"""There is memory for one train state: no second one is alive where phases change or a run goes on."""

import functools
import gc

import jax
import pytest

from empg_jax.run import parts
from empg_jax.sft import phase, warm_start
from tests import runs

WIDTH = 44  # of no other test, so that this run's arrays can be told apart


@pytest.fixture
def counts(monkeypatch):
    """The numbers of arrays of the model's width before and after each change."""
    found = {}

    def watched(name, make, *args, **kwargs):
        before = count()
        made = make(*args, **kwargs)
        found[name] = before, count()
        return made

    def count():
        return sum(leaf.ndim == 2 and leaf.shape[1] == WIDTH for leaf in jax.live_arrays())

    for module, name in ((phase, "restart_optimizer"), (warm_start, "restart_optimizer")):
        wrapped = functools.partial(watched, module.__name__, getattr(module, name))
        monkeypatch.setattr(module, name, wrapped)
    monkeypatch.setattr(parts, "restore_state", functools.partial(watched, "restore", parts.restore_state))
    return found


@pytest.mark.slow
def test_one_state_is_alive_at_a_time(tmp_path, counts):
    run = runs.train(tmp_path / "run", *runs.HOUSE, f"model.hidden_size={WIDTH}", "train.updates=1")
    before, after = counts[phase.__name__]
    assert after == 3 * before > 0  # the weights alone, and then their moments, too
    assert counts[warm_start.__name__] == (before, after)
    gc.collect()  # what is left of the first run
    runs.resume(run, "train.updates=2")
    assert counts["restore"] == (0, after)
