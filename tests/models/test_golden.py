"""The decoder computes what ``transformers`` computed, in an install that has neither it nor torch."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.hf.load import load_hf
from empg_jax.models.decoder import forward, output_embedding
from empg_jax.models.head import compute_head
from tests.models import golden


@pytest.fixture(scope="module", params=golden.FAMILIES)
def model(request, tmp_path_factory):
    """(golden arrays, our config, our parameters), read while torch and transformers cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("torch", "transformers"):
            patch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError):
            import torch  # noqa: F401
        raw, shapes, arrays = golden.load_golden(request.param)
        folder = tmp_path_factory.mktemp("golden") / request.param
        golden.write_model(folder, raw, shapes)
        yield arrays, *load_hf(folder)


@functools.cache
def compiled():
    return jax.jit(forward, static_argnums=1)


def compute_hidden(params, config, tokens):
    """Hidden states of one text; whatever fills it up to the golden length stands behind it."""
    tokens = np.pad(tokens, (0, golden.LENGTH - len(tokens)))[None]
    positions = jnp.arange(golden.LENGTH)[None]
    return compiled()(params, config, jnp.asarray(tokens), positions, jnp.ones_like(positions))[0]


def test_logits_and_logprobs(model):
    arrays, config, params = model
    assert np.abs(arrays["logits"]).max() > 3  # the comparison means something
    hidden, embedding = compute_hidden(params, config, arrays["tokens"]), output_embedding(params)
    np.testing.assert_allclose(np.asarray(hidden @ embedding.T), arrays["logits"], atol=1e-4, rtol=0)
    logprobs, _ = compute_head(hidden[:-1], embedding, jnp.asarray(arrays["tokens"][1:]))
    np.testing.assert_allclose(np.asarray(logprobs), arrays["logprobs"], atol=1e-4, rtol=0)


def test_greedy_continuation(model):
    # Every token is the likeliest after the ones before it, so decoding one by one gives the same.
    arrays, config, params = model
    prompt, greedy = arrays["tokens"][: golden.PROMPT], arrays["greedy"]
    hidden = compute_hidden(params, config, np.concatenate([prompt, greedy]))
    found = jnp.argmax(hidden @ output_embedding(params).T, axis=-1)
    assert found[golden.PROMPT - 1 :][: golden.STEPS].tolist() == greedy.tolist()
    assert len(greedy) == golden.STEPS and len(set(greedy.tolist())) > 5


def test_the_files_are_small_and_the_weights_are_those_of_the_day_they_were_made():
    assert sum(path.stat().st_size for path in golden.DATA.glob("golden_*")) < 300_000
    np.testing.assert_array_equal(golden.load_golden("qwen2")[2]["tokens"], golden.make_tokens())
    weights = golden.make_weight("model.norm.weight", (3,)), golden.make_weight("lm_head.weight", (2, 1))
    np.testing.assert_allclose(weights[0], [1.2593565, 1.4163001, 1.0662073], rtol=1e-6)
    np.testing.assert_allclose(weights[1][:, 0], [0.08590835, 0.09982105], rtol=1e-6)
