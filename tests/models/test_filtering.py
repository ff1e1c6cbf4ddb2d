"""Top-k, top-p and min-p: the kept sets against a plain oracle, and the head's log-probs over them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.filtering import TokenFilter, find_reach
from empg_jax.models.head import compute_head

FILTERS = [TokenFilter(*options) for options in itertools.product((1.0, 0.8), (0, 5), (0.0, 0.1))]
reach = jax.jit(find_reach)


def kept_by(logits, token_filter):
    """The kept entries of one row, by sorting: in float64, ties together."""
    top_p, top_k, min_p = token_filter
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    kept = np.ones(len(logits), bool)
    if top_k:
        kept &= logits >= np.sort(logits)[-top_k]
    if top_p < 1:
        order = np.argsort(-logits, kind="stable")
        order = order[kept[order]]
        running = np.cumsum(weights[order]) / weights[order].sum()
        last = order[np.searchsorted(running, top_p)]
        kept &= logits >= logits[last]
    return kept & (weights >= min_p)


def gaps_of(logits):
    return (logits.max(-1, keepdims=True) - logits).astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_kept_sets_are_those_of_a_sort(scale):
    logits = (np.random.default_rng(0).normal(size=(40, 300)) * scale).astype(np.float32)
    for token_filter in FILTERS:
        # Rows with other options stand beside them, as in a server's batch.
        options = np.float32([token_filter if row % 2 else (0.5, 7, 0.0) for row in range(40)])
        gaps = gaps_of(logits)
        kept = gaps <= np.asarray(reach(gaps, options))[:, None]
        for row in range(40):
            expected = kept_by(logits[row], TokenFilter(*token_filter) if row % 2 else TokenFilter(0.5, 7))
            np.testing.assert_array_equal(kept[row], expected, err_msg=f"{token_filter}, row {row}")


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 30.0, 1e6])
def test_accelerators_find_the_same_number(monkeypatch, scale):
    """They divide the range by more at a time."""
    logits = (np.random.default_rng(1).normal(size=(len(FILTERS), 300)) * scale).astype(np.float32)
    inputs = gaps_of(logits), np.float32(FILTERS)
    text = jax.jit(find_reach).lower(*inputs).as_text()
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *arrays, cpu, default: default(*arrays))
        other = jax.jit(lambda *arrays: find_reach(*arrays)).lower(*inputs)
    assert other.as_text() != text
    np.testing.assert_array_equal(other.compile()(*inputs), reach(*inputs))


def test_ties_are_kept_or_dropped_together():
    logits = np.float32([[0, 0, -1, -1, -1, -5, -5, -50]])
    counts = {
        TokenFilter(top_k=1): 2, TokenFilter(top_k=2): 2, TokenFilter(top_k=3): 5, TokenFilter(top_k=8): 8,
        TokenFilter(top_p=1e-6): 2, TokenFilter(top_p=0.65): 5, TokenFilter(top_p=0.9999): 7,
        TokenFilter(min_p=0.999): 2, TokenFilter(min_p=0.3): 5, TokenFilter(): 8,
    }  # fmt: skip
    for token_filter, count in counts.items():
        edge = reach(gaps_of(logits), np.float32([token_filter]))
        assert (gaps_of(logits) <= edge[:, None]).sum() == count, token_filter


@pytest.mark.parametrize(
    "token_filter, message",
    [
        (TokenFilter(top_p=0.0), r"x.top_p=0 must lie in \(0, 1\]"),
        (TokenFilter(top_p=1e-45), r"x.top_p=1e-45 must lie in \[1.17549e-38, 1\]"),
        (TokenFilter(top_p=1e-320), r"x.top_p=\S+ must lie in \[1.17549e-38, 1\]"),
        (TokenFilter(top_p=1.5), "x.top_p=1.5 must"),
        (TokenFilter(top_k=-1), r"x.top_k=-1 must lie in \[0, 50\]"),
        (TokenFilter(top_k=51), "x.top_k=51 must lie in .*vocabulary"),
        (TokenFilter(min_p=1.0), r"x.min_p=1 must lie in \[0, 1\)"),
        (TokenFilter(min_p=-0.1), "x.min_p=-0.1 must"),
    ],
)
def test_values_without_a_meaning_are_refused(token_filter, message):
    with pytest.raises(ValueError, match=message):
        token_filter.check(50, "x.")
    TokenFilter(1.0, 50, 0.99).check(50)


# --------------------------------------------------------------------------------------------- the head


def make_inputs(count, vocab=47, depth=6, dtype=np.float32):
    generator = np.random.default_rng(3)
    hidden = generator.normal(size=(count, depth)).astype(dtype)
    weights = generator.normal(size=(vocab, depth)).astype(dtype)
    return hidden, weights, generator.integers(0, vocab, size=count).astype(np.int32)


def full_head(hidden, weights, tokens, kept, temperature):
    """Log-probs over the kept entries and entropies over all, from the logits of all entries."""
    logits = hidden @ weights.T / temperature
    logprobs = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf))
    every = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return chosen, -jnp.sum(jnp.exp(every) * every, axis=-1)


def kept_with_token(hidden, weights, tokens, temperature, token_filter):
    logits = np.asarray(hidden, np.float64) @ np.asarray(weights, np.float64).T / temperature
    kept = np.stack([kept_by(row, token_filter) for row in logits])
    kept[np.arange(len(tokens)), tokens] = True  # the sampler drew it
    return jnp.asarray(kept)


@pytest.mark.parametrize(
    "token_filter, slab",  # the whole vocabulary at once, or in three chunks
    [(TokenFilter(0.8), 40 * 16), (TokenFilter(top_k=5), None), (TokenFilter(0.8, 9, 0.1), 40 * 16)],
)
def test_the_heads_values_and_gradients_are_those_of_full_logits(token_filter, slab):
    with jax.enable_x64(True):
        hidden, weights, tokens = map(jnp.asarray, make_inputs(40, dtype=np.float64))
        kept = kept_with_token(hidden, weights, tokens, 0.7, token_filter)

        def loss(hidden, weights, outputs):
            logprobs, entropies = outputs(hidden, weights)
            mix = jnp.arange(1, 41, dtype=jnp.float64)
            return jnp.sum(jnp.sin(mix) * logprobs + jnp.cos(mix) * entropies), (logprobs, entropies)

        def chunked(hidden, weights):
            return compute_head(hidden, weights, tokens, 0.7, slab, token_filter=token_filter)

        def full(hidden, weights):
            return full_head(hidden, weights, tokens, kept, 0.7)

        slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
        ((_, found), found_slopes), ((_, expected), expected_slopes) = (
            slopes(hidden, weights, outputs) for outputs in (chunked, full)
        )
        for one, other in zip((*found, *found_slopes), (*expected, *expected_slopes), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)


def test_only_the_tokens_in_a_mask_are_computed():
    count, token_filter = 1024, TokenFilter(0.8, 9, 0.01)
    hidden, weights, tokens = map(jnp.asarray, make_inputs(count))
    mask = np.random.default_rng(1).random(count) < 0.1
    mix = jnp.where(mask, jnp.arange(1, count + 1, dtype=jnp.float32) / count, 0.0)

    def loss(hidden, weights, mask):
        logprobs, entropies = compute_head(
            hidden, weights, tokens, 0.7, 128 * 8, mask, token_filter=token_filter
        )
        return jnp.sum(mix * logprobs + mix**2 * entropies), (logprobs, entropies)

    slopes = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    garbage = jnp.where(mask[:, None], hidden, jnp.float32(1e3))
    (value, some), found = slopes(garbage, weights, jnp.asarray(mask))
    (expected, every), whole = slopes(hidden, weights, None)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(some[0], np.where(mask, every[0], 0.0), atol=1e-5)
    np.testing.assert_allclose(some[1], np.where(mask, every[1], 0.0), atol=1e-5)
    np.testing.assert_allclose(found[0], np.where(mask[:, None], whole[0], 0.0), atol=2e-5)
    np.testing.assert_allclose(found[1], whole[1], atol=2e-4)
