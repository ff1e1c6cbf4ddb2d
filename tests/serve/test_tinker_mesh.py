"""The training API over several devices."""

import functools

import jax
import numpy as np
import pytest

from empg_jax.models.decoder import init_params
from empg_jax.parallel.mesh import make_mesh
from empg_jax.serve.policy import Start
from empg_jax.serve.tinker.objectives import find_objective
from empg_jax.serve.tinker.rows import Limits
from empg_jax.serve.tinker.trainer import Trainer
from tests.serve.test_tinker_parts import MODEL, make_data, numbers


@pytest.mark.parametrize(("devices", "longest"), [(3, 768), (2, 45)])
def test_rows_are_split_over_time_whatever_the_longest(devices, longest):
    params = jax.device_get(jax.jit(functools.partial(init_params, config=MODEL))(jax.random.key(0)))
    data = make_data(5, 40, weights=numbers(0, 2))

    def score(sequence):
        mesh = make_mesh(sequence=sequence, devices=jax.local_devices()[:sequence])
        limits = Limits(vocab_size=32, max_tokens=longest, micro_tokens=longest, mesh=mesh)
        trainer = Trainer(Start(MODEL, mesh, params, None), limits)
        return trainer.run_batch(data, find_objective("cross_entropy", {}), forward_only=True).outputs

    for ours, theirs in zip(score(devices), score(1), strict=True):
        np.testing.assert_allclose(ours["logprobs"], theirs["logprobs"], rtol=1e-5)
