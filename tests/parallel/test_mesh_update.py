"""A whole pass of the learner on a mesh with all kinds of axes equals the same pass on one device."""

import dataclasses

import jax
import numpy as np
import pytest

from empg_jax.algorithms import make_algorithm
from empg_jax.learner.update import make_learner
from empg_jax.parallel.mesh import make_mesh
from tests.learner.problems import (
    MODEL,
    assert_trees_close,
    gradient_descent,
    initial_state,
    make_problem,
    run_batch,
    start,
)

pytestmark = pytest.mark.slow


def run_on(model, **mesh):
    """State, scores and metrics; plain gradient descent, so parameters differ by their gradients."""
    algorithm = make_algorithm("grpo", modulation="empg", num_minibatches=2)
    learner = make_learner(model, algorithm, gradient_descent(), make_mesh(**mesh), micro_rows=8)
    batch, layout = make_problem(8)
    split = {shard.data.shape for shard in learner.put(batch).tokens.addressable_shards}
    fraction = mesh.get("fsdp", 1), mesh.get("sequence", 1)
    assert split == {tuple(size // n for size, n in zip(batch.tokens.shape, fraction, strict=True))}
    return jax.device_get(run_batch(learner, start(learner), batch, layout))


@pytest.fixture(scope="module")
def expected():
    return run_on(MODEL)


@pytest.mark.parametrize(
    "remat, scan_layers", [("full", True), pytest.param("dots", False, marks=pytest.mark.long)]
)
def test_fsdp_tensor_and_sequence_change_nothing(expected, remat, scan_layers):
    model = dataclasses.replace(MODEL, remat=remat, scan_layers=scan_layers)
    found = run_on(model, fsdp=2, tensor=2, sequence=2)
    before = initial_state(gradient_descent(), 0).params
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), expected[0].params, before)
    assert min(jax.tree.leaves(moved)) > 1e-5  # every parameter has a gradient to compare
    for one, other, atol in zip(found, expected, (2e-6, 2e-5, 1e-4), strict=True):
        assert_trees_close(one, other, atol=atol)
