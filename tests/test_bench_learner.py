"""The learner benchmark counts the work that an update does: of the head, blocks of sampled tokens only."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.models.decoder import init_params

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    """Return the benchmark as a module, read with these options."""

    def read(options):
        spec = importlib.util.spec_from_file_location("bench_learner", ROOT / "scripts" / "bench_learner.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "bench_learner", module)
        monkeypatch.setattr(sys, "argv", ["bench_learner.py", *options.split()])
        spec.loader.exec_module(module)
        return module

    return read


def count_parameters(module):
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), module.MODEL))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("length", "share"), [(256, 0.5), (64, 1)])
def test_operations_of_an_update(load, length, share):
    """Half of a row is sampled; 64 tokens are one block, which runs whole."""
    module = load(f"--rows 2 --length {length}")
    shape = BatchShape(2, 1, length, 1, 2, 1)
    made = [module.make_trajectory(member, np.random.default_rng(0)) for member in range(2)]
    batch, _ = make_batch(made, shape, seed=(0,))
    np.testing.assert_array_equal(np.sum(batch.loss_mask, axis=1), length // 2)
    width, inner, layers, vocab = 256, 1024, 8, 8192
    block = width * (256 + 2 * 128) + 256 * width + 3 * width * inner  # q, k and v; output; MLP
    scales = layers * 2 * width + width
    biases = layers * (256 + 2 * 128) if module.MODEL.qkv_bias else 0
    weights = layers * block + scales + biases + share * vocab * width
    attention = layers * 4 * width * length / 2
    wanted = 3 * 2 * length * (2 * weights + attention)
    assert module.count_flops(count_parameters(module)) == wanted


def test_the_pages_share_of_the_limit_follows_from_its_timing(load):
    page = (ROOT / "scripts" / "README.md").read_text()
    row = re.search(r"^\| 1.5B, `--remat dots` \|.*$", page, re.M).group()
    rate, share, reached, limit = re.search(
        r"([\d,]+) \| \*\*([\d.]+) %\*\* \((\d+) of (\d+) TFLOP/s\)", row
    ).groups()
    module = load("--preset qwen2.5-1.5b --rows 4 --length 4096 --micro-rows 4 --remat dots")
    per_token = module.count_flops(count_parameters(module)) / (4 * 4096)
    teraflops = float(rate.replace(",", "")) * per_token / 1e12
    assert round(teraflops) == int(reached)
    assert round(100 * teraflops / int(limit), 1) == float(share)
    front = (ROOT / "README.md").read_text()
    assert f"{round(float(share))} % of the product limit" in front
