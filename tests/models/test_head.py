"""The chunked head against full logits: values, gradients, and what it never allocates."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.learner.outputs import compute_logprobs
from empg_jax.models import head
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.head import compute_head


def full_head(hidden, weights, tokens, temperature):
    logprobs = jax.nn.log_softmax(hidden @ weights.T / temperature)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def make_inputs(count=7, vocab=23, depth=5, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    hidden = generator.normal(size=(count, depth)).astype(dtype)
    weights = (2 * generator.normal(size=(vocab, depth))).astype(dtype)
    return hidden, weights, generator.integers(0, vocab, size=count).astype(np.int32)


@pytest.mark.parametrize("vocab", [23, 24])  # a prime, and one that chunks divide
@pytest.mark.parametrize("slab", [7 * 24, 7 * 8, 7])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_equal_full_logits(vocab, slab, temperature):
    inputs = make_inputs(vocab=vocab)
    found = jax.jit(compute_head, static_argnums=(3, 4))(*inputs, temperature, slab)
    for one, other in zip(found, full_head(*inputs, temperature), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


@pytest.mark.parametrize("vocab, chunks", [(23, 1), (23, 3), (23, 23), (24, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_equal_full_logits_in_float64(vocab, chunks, temperature):
    with jax.enable_x64(True):
        hidden, weights, tokens = map(jnp.asarray, make_inputs(vocab=vocab, dtype=np.float64))

        def loss(hidden, weights, function):
            logprobs, entropies = function(hidden, weights)
            mix = jnp.arange(1, len(tokens) + 1, dtype=jnp.float64)
            return jnp.sum(jnp.sin(mix) * logprobs + jnp.cos(mix) * entropies)

        def chunked(hidden, weights):
            return head._head(hidden, weights, tokens, temperature, chunks)

        def full(hidden, weights):
            return full_head(hidden, weights, tokens, temperature)

        slopes = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=2)
        (value, found), (expected_value, expected) = (slopes(hidden, weights, f) for f in (chunked, full))
        np.testing.assert_allclose(value, expected_value, rtol=1e-12)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == jnp.float64
            np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("slab", [None, 128 * 8])
def test_only_the_tokens_in_a_mask_are_computed(share, slab):
    """Values and gradients equal those of the whole head, and garbage elsewhere changes nothing."""
    count = 1024
    hidden, weights, tokens = map(jnp.asarray, make_inputs(count, vocab=24))
    mask = np.random.default_rng(1).random(count) < share
    mix = jnp.where(mask, jnp.arange(1, count + 1, dtype=jnp.float32) / count, 0.0)

    def loss(hidden, weights, mask):
        logprobs, entropies = compute_head(hidden, weights, tokens, 0.7, slab, mask)
        return jnp.sum(mix * logprobs + mix**2 * entropies), (logprobs, entropies)

    slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    garbage = jnp.where(mask[:, None], hidden, jnp.float32(1e3))
    (value, found), some = slopes(garbage, weights, jnp.asarray(mask))
    (expected, whole), every = slopes(hidden, weights, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, np.where(mask, other, 0.0), atol=1e-5)
    for one, other in zip(some, every, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-4)
    assert not np.asarray(some[0])[~mask].any()


def test_a_small_share_of_tokens_takes_a_small_share_of_blocks():
    order, used = head._blocks_of(jnp.arange(1024) % 10 == 0, 16)
    assert int(used) == 2 and order.shape == (16, 64)
    assert sorted(np.asarray(order).ravel()) == list(range(1024))
    assert set(np.asarray(order).ravel()[:103] % 10) == {0}
    assert [head.num_blocks(n) for n in (64, 128, 192, 1024, 4096)] == [1, 2, 2, 16, 16]


def test_a_certain_token_and_a_uniform_choice():
    # Uniform over 8: logprob -ln 8, entropy ln 8. Certain: both 0, with logits far beyond exp's range.
    uniform = compute_head(jnp.zeros((1, 2)), jnp.ones((8, 2)), jnp.array([3]))
    np.testing.assert_allclose(uniform, [[-np.log(8)], [np.log(8)]], rtol=1e-6)
    weights = jnp.zeros((8, 2)).at[5].set(1e4)
    certain = compute_head(jnp.ones((1, 2)), weights, jnp.array([5]), 1.0, 2)
    np.testing.assert_array_equal(certain, np.zeros((2, 1)))


def test_temperature_divides_the_logits():
    hidden, weights, tokens = map(jnp.asarray, make_inputs())
    cold = compute_head(hidden, weights, tokens, 0.5)
    scaled = compute_head(2 * hidden, weights, tokens)
    np.testing.assert_allclose(cold, scaled, atol=2e-6)


def test_bfloat16_stays_near_float32():
    hidden, weights, tokens = make_inputs(depth=16)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (hidden, weights / 4)]
    found = compute_head(*narrow, jnp.asarray(tokens), 1.0, 7 * 8)
    assert all(x.dtype == jnp.float32 for x in found)
    expected = full_head(*(x.astype(jnp.float32) for x in narrow), tokens, 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # products of bfloat16 are exact in float32
    slopes = jax.grad(lambda h, w: jnp.sum(compute_head(h, w, jnp.asarray(tokens))[0]), (0, 1))(*narrow)
    assert all(x.dtype == jnp.bfloat16 for x in slopes)


def largest_array(jaxpr):
    """Most elements of any array in a jaxpr, sub-programs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        sizes += [largest_array(sub) for sub in jax.extend.core.jaxprs_in_params(equation.params)]
    return max(sizes)


@pytest.mark.parametrize("rows, is_bounded", [(1, False), (8, True)])
def test_the_logits_of_all_tokens_are_never_held(rows, is_bounded):
    config = DecoderConfig(vocab_size=150000, hidden_size=8, num_layers=1)
    tokens = jnp.zeros((rows, 100 if rows == 1 else 512), jnp.int32)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))  # nothing is allocated

    def loss(params):
        found = compute_logprobs(params, config, tokens, tokens, tokens)
        return jnp.sum(found[0]) + jnp.sum(found[1])

    largest = largest_array(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    if is_bounded:
        assert largest <= head.slab_size() < rows * 512 * config.vocab_size / 30
    else:  # the count itself: logits that fit the slab are held
        assert largest == 100 * config.vocab_size
