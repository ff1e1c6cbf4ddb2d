"""What an engine's copy of the weights needs besides itself while it is made."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.engine.programs import compile_programs
from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.weights import place_params
from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.parallel.mesh import make_mesh

MODEL = DecoderConfig(
    vocab_size=512,
    hidden_size=128,
    num_layers=20,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    intermediate_size=512,
    dtype=jnp.bfloat16,
)
SIZES = EngineConfig(slots=8, max_tokens=64, max_response_tokens=32, stop_ids=(1,))


def bytes_here(tree):
    """Bytes on the first device."""
    return sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 4}])
def test_beside_the_copy_only_one_piece_needs_memory(axes):
    learner, mesh = make_mesh(fsdp=8), make_mesh(**axes)
    programs = compile_programs(MODEL, SIZES, mesh)
    params = init_params(jax.random.key(0), MODEL)
    split = jax.device_put(params, param_shardings(learner, params, MODEL.head_dim))
    placed, beside = 0, list[int]()

    def unstack(moved):
        nonlocal placed
        memory = programs.unstack.lower(moved).compile().memory_analysis()
        out = programs.unstack(moved)
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        beside.append(placed + needed)
        placed += bytes_here(out)
        return out

    copy = place_params(split, dataclasses.replace(programs, unstack=unstack), mesh)
    own = bytes_here(copy)
    assert len(beside) == 2 + MODEL.num_layers  # table, norm, layers
    assert max(beside) < 1.2 * own
    whole = programs.unstack(jax.device_put(params, param_shardings(mesh, params, MODEL.head_dim)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(copy), jax.device_get(whole))
