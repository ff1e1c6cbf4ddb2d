"""Alignment: position t of the streams talks about token t, given the tokens before it in its segment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.learner.fingerprint import text_logprob
from empg_jax.learner.outputs import compute_logprobs
from empg_jax.models.decoder import forward, output_embedding
from empg_jax.parallel.mesh import make_mesh, replicated
from tests.learner.problems import MODEL, TEMPERATURE, by_token, gradient_descent, initial_state, make_problem


@jax.jit
def score_alone(params, tokens, length):
    """Log-probs and entropies of one padded sequence by itself, from full logits; index 0 is token 1."""
    positions = jnp.arange(len(tokens))
    hidden = forward(
        params, MODEL, tokens[None], positions[None], (positions < length)[None].astype(jnp.int32)
    )
    table = jax.nn.log_softmax(hidden[0, :-1] @ output_embedding(params).T / TEMPERATURE)
    logprobs = jnp.take_along_axis(table, tokens[1:, None], axis=1)[:, 0]
    return logprobs, -jnp.sum(jnp.exp(table) * table, axis=1)


@pytest.mark.parametrize("sequence", [3, 6])
def test_the_fingerprint_of_weights_fits_every_mesh(sequence):
    """A row of 64 tokens is not divided by these; the text is, with what pads it."""
    params, ids = initial_state(gradient_descent(), 0).params, [1, 2, 3, 4, 5] * 20
    alone = text_logprob(params, MODEL, ids, make_mesh())
    mesh = make_mesh(sequence=sequence)
    split = text_logprob(jax.device_put(params, replicated(mesh)), MODEL, ids, mesh)
    np.testing.assert_allclose(split, alone, rtol=1e-5)


def test_packed_scores_equal_each_sequence_alone():
    params = initial_state(gradient_descent(), 0).params
    batch, layout = make_problem(8)
    scored = jax.jit(lambda p, *inputs: compute_logprobs(p, MODEL, *inputs, TEMPERATURE))(
        params, batch.tokens, batch.positions, batch.segment_ids
    )
    logprobs, entropies = (by_token(batch, values) for values in scored)
    assert (np.asarray(scored[0])[:, 0] == 0).all() and (np.asarray(scored[1])[:, 0] == 0).all()
    for sequence in range(layout.num_segments):
        tokens = batch.tokens[batch.sequence_ids == sequence]
        padded = np.pad(tokens, (0, 20 - len(tokens)))
        expected = map(np.asarray, score_alone(params, padded, len(tokens)))
        for i, (logprob, entropy) in enumerate(zip(*expected, strict=True), start=1):
            if i < len(tokens):
                np.testing.assert_allclose(logprobs[sequence, i], logprob, atol=2e-5)
                np.testing.assert_allclose(entropies[sequence, i], entropy, atol=2e-5)
