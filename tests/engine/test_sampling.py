"""Sampling: the inverse CDF against a float64 one, statistics against log-softmax, keys by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.engine.sampling import BLOCK, _draw, fold_keys, position_uniforms, sample, sample_filtered

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
draw = jax.jit(sample)


def log_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def make_logits(rows, vocab, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3


@pytest.mark.parametrize("vocab", [2, 5, 127, 128, 129, 300])
def test_draws_have_the_right_frequencies(vocab):
    """Evenly spread uniforms fall on each token as often as its probability says, to one draw."""
    count = 2000
    logits = np.repeat(make_logits(1, vocab), count, axis=0)
    uniforms = ((np.arange(count) + 0.5) / count).astype(np.float32)
    tokens, _, _ = draw(logits, uniforms, np.float32(1))
    tokens = np.asarray(tokens)
    expected = np.exp(log_softmax(logits[0])) * count
    assert np.all(np.diff(tokens) >= 0)
    assert np.abs(np.bincount(tokens, minlength=vocab) - expected).max() < 1.01


def test_draws_agree_with_a_float64_inverse_cdf():
    logits = make_logits(400, 1000)
    uniforms = np.random.default_rng(1).random(400).astype(np.float32)
    tokens, _, _ = draw(logits, uniforms, np.float32(0.7))
    cumulative = np.cumsum(np.exp(log_softmax(logits, 0.7)), axis=-1)
    expected = (cumulative <= uniforms[:, None]).sum(-1)
    differ = np.flatnonzero(np.asarray(tokens) != expected)
    # A float32 sum may put a draw that hits an edge on its other side, and only such a one.
    for row in differ:
        edge = cumulative[row, min(tokens[row], expected[row])]
        assert abs(edge - uniforms[row]) < 1e-6
    assert len(differ) < 4


@pytest.mark.parametrize("uniform", [0.0, 0.5, BELOW_ONE])
@pytest.mark.parametrize("likely", [[0], [299], [5, 290], [127, 128]])
def test_impossible_tokens_are_never_drawn(uniform, likely):
    logits = np.full((1, 300), -1e4, np.float32)
    logits[0, likely] = 0
    token, logprob, _ = draw(logits, np.float32([uniform]), np.float32(1))
    assert int(token[0]) in likely
    np.testing.assert_allclose(logprob, -np.log(len(likely)), atol=1e-6)


def test_a_token_without_weight_is_not_drawn_at_any_edge_of_a_large_vocabulary():
    """Sums that are added up in parallel are not equal over blocks without weight, nor always rising."""
    generator = np.random.default_rng(0)
    weights = np.zeros(151_936, np.float32)
    weights[generator.choice(len(weights), 50, replace=False)] = generator.exponential(size=50)
    blocks = np.pad(weights, (0, -len(weights) % BLOCK)).reshape(1, -1, BLOCK)
    sums = np.unique(jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1))
    edges = (sums / sums.max()).astype(np.float32)
    uniforms = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(2))])
    uniforms = np.unique(uniforms[uniforms < 1])
    tokens, _ = jax.jit(lambda all_: jax.lax.map(lambda one: _draw(weights[None], one[None]), all_))(uniforms)
    assert len(uniforms) > 100 and (weights[np.asarray(tokens)] > 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_statistics_are_those_of_the_temperature(temperature):
    logits = make_logits(16, 300)
    uniforms = np.linspace(0, 0.99, 16, dtype=np.float32)
    tokens, logprobs, entropies = draw(logits, uniforms, np.float32(temperature))
    expected = log_softmax(logits, temperature)
    np.testing.assert_allclose(logprobs, expected[np.arange(16), tokens], atol=2e-6)
    np.testing.assert_allclose(entropies, -(np.exp(expected) * expected).sum(-1), atol=2e-6)


def test_temperature_zero_takes_the_first_of_the_best_with_statistics_at_one():
    logits = make_logits(3, 300)
    logits[1, [40, 200]] = logits.max() + 1
    tokens, logprobs, _ = draw(logits, np.float32([0.1, 0.9, 0.5]), np.float32(0))
    np.testing.assert_array_equal(tokens, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(logprobs, log_softmax(logits)[np.arange(3), tokens], atol=2e-6)


@pytest.mark.parametrize("draws", [sample, sample_filtered])
def test_small_temperatures_take_the_most_likely_token(draws):
    temperatures = np.float32([1e-3, 1e-5, 1e-8, 1e-9, 1e-12, 1e-20, 1e-30, 1e-35])
    logits = make_logits(len(temperatures), 300) + 7
    filters = (np.tile(np.float32([0.9, 5, 0.1]), (len(logits), 1)),) if draws is sample_filtered else ()
    uniforms = np.full(len(logits), 0.5, np.float32)
    tokens, logprobs, entropies, *full = jax.jit(draws)(logits, uniforms, temperatures, *filters)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))
    for statistics in (logprobs, entropies, *full):
        np.testing.assert_allclose(statistics, 0, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbors():
    logits, uniforms = make_logits(8, 300), np.linspace(0.1, 0.9, 8, dtype=np.float32)
    together = draw(logits, uniforms, np.float32(1))
    reordered = draw(logits[::-1], uniforms[::-1], np.float32(1))
    for a, b in zip(together, reordered, strict=True):
        np.testing.assert_array_equal(a, b[::-1])


def test_keys_are_folded_from_every_number_in_order():
    key = jax.random.key(7)
    ids = jnp.asarray([[1, 2, 3, 4], [1, 2, 4, 3], [0, 2, 3, 4], [1, 2, 3, 4]], jnp.int32)
    uniforms = np.asarray(position_uniforms(fold_keys(key, ids), jnp.zeros((4, 1), jnp.int32)))[:, 0]
    assert uniforms[0] == uniforms[3] and len(set(uniforms.tolist())) == 3
    other = position_uniforms(fold_keys(jax.random.key(8), ids), jnp.zeros((4, 1), jnp.int32))
    assert not np.any(np.asarray(other)[:, 0] == uniforms)


def test_uniforms_belong_to_positions_not_to_calls():
    keys = fold_keys(jax.random.key(0), jnp.asarray([[3], [4]], jnp.int32))
    positions = jnp.asarray([[0, 1, 2, 3], [5, 6, 7, 8]], jnp.int32)
    whole = np.asarray(position_uniforms(keys, positions))
    part = np.asarray(position_uniforms(keys, positions[:, 2:3]))
    np.testing.assert_array_equal(whole[:, 2:3], part)
    assert len(set(whole.ravel().tolist())) == 8 and whole.min() >= 0 and whole.max() < 1


# --------------------------------------------------------------------------------------------- filters

filtered = jax.jit(sample_filtered)


def test_neutral_filters_change_no_token():
    logits, uniforms = make_logits(500, 300), np.random.default_rng(2).random(500).astype(np.float32)
    *found, full = filtered(logits, uniforms, np.float32(0.7), np.tile(np.float32([1, 0, 0]), (500, 1)))
    expected = draw(logits, uniforms, np.float32(0.7))
    np.testing.assert_array_equal(found[0], expected[0])
    for one, other in zip((*found[1:], full), (*expected[1:], expected[1]), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("options", [(0.6, 0, 0.0), (1.0, 3, 0.0), (1.0, 0, 0.2), (0.9, 7, 0.02)])
def test_filtered_draws_have_the_renormalized_frequencies(options):
    count = 2000
    logits = np.repeat(make_logits(1, 300), count, axis=0)
    uniforms = ((np.arange(count) + 0.5) / count).astype(np.float32)
    filters = np.tile(np.float32(options), (count, 1))
    tokens, logprobs, entropies, full = map(np.asarray, filtered(logits, uniforms, np.float32(1), filters))
    whole = log_softmax(logits[0])
    order = np.argsort(-whole)
    kept = np.zeros(300, bool)
    kept[order[: options[1] or 300]] = True
    shares = np.cumsum(np.where(kept, np.exp(whole), 0)[order] / np.exp(whole)[kept].sum())
    kept[order[np.searchsorted(shares, options[0]) + 1 :]] = False
    kept &= whole >= whole.max() + np.log(options[2]) if options[2] else True
    expected = np.where(kept, whole - np.log(np.exp(whole)[kept].sum()), -np.inf)
    assert np.abs(np.bincount(tokens, minlength=300) - np.exp(expected) * count).max() < 1.01
    np.testing.assert_allclose(logprobs, expected[tokens], atol=2e-6)
    np.testing.assert_allclose(full, whole[tokens], atol=2e-6)
    np.testing.assert_allclose(entropies, -(np.exp(whole) * whole).sum(), atol=2e-6)
