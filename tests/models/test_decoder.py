"""The decoder: one block, two ways to run it, and the properties that both must share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.models.decoder import (
    Block,
    DecoderConfig,
    RopeScaling,
    compute_rope,
    forward,
    forward_cached,
    fuse_projections,
    init_cache,
    init_params,
    output_embedding,
    param_axes,
    rotate,
    unstack_layers,
)

TINY = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    intermediate_size=20,
    tie_embeddings=False,
)
CONFIGS = {
    "qwen2": TINY,
    "qwen3": dataclasses.replace(TINY, qkv_bias=False, qk_norm=True),
    "llama": dataclasses.replace(
        TINY, qkv_bias=False, tie_embeddings=True, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)
    ),
}
run = jax.jit(forward, static_argnums=1)
run_cached = jax.jit(forward_cached, static_argnums=1)


@functools.cache
def make_params(config):
    """Parameters in which norms and biases are random too, so that leaving one out shows."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        # An embedding [V, D] has fan-in D; every other matrix stands as [in, out].
        scale = leaf.shape[-1 if path[-1].key == "embedding" else -2] ** -0.5 if leaf.ndim > 1 else 1.0
        return jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def make_tokens(rows, length, seed=1):
    tokens = np.random.default_rng(seed).integers(0, TINY.vocab_size, size=(rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return tokens, positions, np.ones_like(tokens)


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_decode_equals_the_full_forward(family):
    """Two prefill chunks, then single tokens."""
    config = CONFIGS[family]
    tokens, positions, segments = make_tokens(2, 12)
    params = make_params(config)
    expected = run(params, config, tokens, positions, segments)
    layers, cache = unstack_layers(params, config.num_layers), init_cache(config, 2, 16)
    found = []
    for span in (slice(0, 5), slice(5, 9), slice(9, 10), slice(10, 11), slice(11, 12)):
        hidden, cache = run_cached(layers, config, tokens[:, span], positions[:, span], cache)
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=1e-5)


def test_ragged_rows_and_pads():
    """Rows of different length in one prefill; pads stand at the capacity and are not written."""
    capacity = 8
    tokens, positions, segments = make_tokens(2, 7)
    params = make_params(TINY)
    expected = np.asarray(run(params, TINY, tokens, positions, segments))
    layers, cache = unstack_layers(params, TINY.num_layers), init_cache(TINY, 2, capacity)
    counts = np.array([3, 5])
    prompt_positions = np.where(np.arange(5) < counts[:, None], positions[:, :5], capacity)
    hidden, cache = run_cached(layers, TINY, tokens[:, :5], prompt_positions, cache)
    for row, count in enumerate(counts):
        np.testing.assert_allclose(hidden[row, :count], expected[row, :count], atol=1e-5)
        for keys, values in cache:
            assert np.all(np.asarray(keys)[row, :, count:] == 0)
            assert np.all(np.asarray(values)[row, :, count:] == 0)
            assert np.all(np.abs(np.asarray(keys)[row, :, :count]).max(axis=-1) > 0)
    for _ in range(2):  # each row goes on from its own position
        here = counts[:, None].astype(np.int32)
        next_tokens = np.take_along_axis(tokens, here, axis=1)
        hidden, cache = run_cached(layers, TINY, next_tokens, here, cache)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(hidden[row, 0], expected[row, count], atol=1e-5)
        counts = counts + 1


def test_a_subset_of_cache_rows():
    """Token rows 0 and 1 are cache rows 3 and 1; the third is a pad beyond the cache."""
    tokens, positions, segments = make_tokens(3, 4)
    params = make_params(TINY)
    expected = run(params, TINY, tokens[:2], positions[:2], segments[:2])
    layers = unstack_layers(params, TINY.num_layers)
    before = jax.tree.map(lambda leaf: jnp.full_like(leaf, 7.0), init_cache(TINY, 4, 8))
    rows = np.array([3, 1, 4], np.int32)
    hidden, after = run_cached(layers, TINY, tokens, positions, before, rows)
    np.testing.assert_allclose(hidden[:2], expected, atol=1e-5)
    assert np.all(np.isfinite(hidden))
    plain = run_cached(layers, TINY, tokens[:2], positions[:2], init_cache(TINY, 2, 8))[1]
    for written, wanted in zip(jax.tree.leaves(after), jax.tree.leaves(plain), strict=True):
        written = np.asarray(written)
        np.testing.assert_array_equal(written[[0, 2]], 7.0)
        np.testing.assert_allclose(written[[3, 1], :, :4], np.asarray(wanted)[:, :, :4], atol=1e-6)
        np.testing.assert_array_equal(written[[3, 1], :, 4:], 7.0)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_equals_unpacked(family):
    config = CONFIGS[family]
    tokens, positions, segments = make_tokens(2, 6)
    alone = run(make_params(config), config, tokens, positions, segments)
    packed_tokens = np.concatenate([tokens[0], tokens[1, :4], np.zeros(3, np.int32)])[None]
    packed_positions = np.concatenate([np.arange(6), np.arange(4), np.zeros(3)]).astype(np.int32)[None]
    packed_segments = np.repeat([1, 2, 0], [6, 4, 3]).astype(np.int32)[None]
    packed = run(make_params(config), config, packed_tokens, packed_positions, packed_segments)
    np.testing.assert_allclose(packed[0, :6], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, 6:10], alone[1, :4], atol=1e-5)


@functools.cache
def run_and_derive(config):
    """Hidden states, and the gradient with respect to stacked parameters."""
    inputs = [jnp.asarray(x) for x in make_tokens(2, 6)]

    def loss(params):
        hidden = forward(params, config, *inputs)
        return jnp.sum(jnp.sin(hidden)), hidden

    (_, hidden), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(make_params(TINY))
    return jax.device_get((hidden, slopes))


@pytest.mark.parametrize("remat", ["dots", "none"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_rematerialisation_and_scan_change_nothing(remat, scan_layers):
    expected = run_and_derive(TINY)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(expected[1]["layers"]))
    found = run_and_derive(dataclasses.replace(TINY, remat=remat, scan_layers=scan_layers))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), found, expected)


def test_layers_are_stacked_and_unstacked():
    params = make_params(TINY)
    unstacked = unstack_layers(params, TINY.num_layers)
    assert len(unstacked["layers"]) == 2
    np.testing.assert_array_equal(
        unstacked["layers"][1]["q_proj"]["bias"], params["layers"]["q_proj"]["bias"][1]
    )
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *unstacked["layers"])
    jax.tree.map(np.testing.assert_array_equal, {**unstacked, "layers": stacked}, params)
    written_out = dataclasses.replace(TINY, scan_layers=False, remat="none")  # what is stored stays the same
    shapes = [jax.eval_shape(lambda c=c: init_params(jax.random.key(0), c)) for c in (TINY, written_out)]
    assert shapes[0] == shapes[1]
    inputs = make_tokens(2, 6)  # unstacked parameters run as they are
    np.testing.assert_allclose(run(unstacked, TINY, *inputs), run(params, TINY, *inputs), atol=1e-5)


def test_the_head_is_tied_or_not():
    tied = make_params(CONFIGS["llama"])
    assert "head" not in tied and output_embedding(tied) is tied["embed"]["embedding"]
    untied = make_params(TINY)
    assert output_embedding(untied) is untied["head"]["embedding"]


def test_options_change_which_parameters_exist():
    bias, norm = (make_params(CONFIGS[name])["layers"] for name in ("qwen2", "qwen3"))
    assert "bias" in bias["q_proj"] and "bias" not in bias["o_proj"] and "q_norm" not in bias
    assert "bias" not in norm["q_proj"]
    assert norm["q_norm"]["scale"].shape == norm["k_norm"]["scale"].shape == (2, 6)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_parameter_has_axes(family):
    params = make_params(CONFIGS[family])
    axes = param_axes(params)
    leaves, structure = jax.tree.flatten(params)
    names = structure.flatten_up_to(axes)
    assert all(len(name) == leaf.ndim for name, leaf in zip(names, leaves, strict=True))
    assert all(name[0] == "layers" for name in structure.flatten_up_to(axes) if len(name) == 3)
    assert axes["layers"]["down_proj"]["kernel"] == ("layers", "mlp", "embed")
    assert axes["embed"]["embedding"] == ("vocab", "embed")
    assert axes["layers"]["input_norm"]["scale"] == ("layers", None)


def test_init_is_deterministic_and_scaled():
    config = dataclasses.replace(TINY, hidden_size=64, intermediate_size=256, vocab_size=500)
    init = jax.jit(init_params, static_argnums=1)
    first, again, other = (init(jax.random.key(seed), config) for seed in (0, 0, 1))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, first, again)))
    kernel, scale = first["layers"]["up_proj"]["kernel"], first["layers"]["input_norm"]["scale"]
    assert np.std(kernel) == pytest.approx(64**-0.5, rel=0.05)
    # What writes onto the residual stream is smaller by sqrt(2 layers).
    assert np.std(first["layers"]["down_proj"]["kernel"]) == pytest.approx(256**-0.5 / 2, rel=0.05)
    assert np.std(first["embed"]["embedding"]) == pytest.approx(1, rel=0.05)
    assert np.std(first["head"]["embedding"]) == pytest.approx(64**-0.5, rel=0.05)
    tied = init(jax.random.key(0), dataclasses.replace(config, tie_embeddings=True))
    assert np.std(tied["embed"]["embedding"]) == pytest.approx(64**-0.5, rel=0.05)
    assert np.all(scale == 1)
    assert not np.array_equal(kernel[0], kernel[1])
    assert not np.array_equal(kernel, other["layers"]["up_proj"]["kernel"])


def test_rotation_turns_pairs_by_their_angle():
    """Position 3, head size 4: pairs (0, 2) and (1, 3) turn by 3 and by 3 / sqrt(theta)."""
    config = dataclasses.replace(TINY, head_dim=4, rope_theta=100.0)
    rope = compute_rope(config, jnp.array([[3]]))
    x = np.array([1.0, 2.0, 0.5, -1.0])
    first, second = 3.0, 0.3
    expected = [
        x[0] * np.cos(first) - x[2] * np.sin(first),
        x[1] * np.cos(second) - x[3] * np.sin(second),
        x[2] * np.cos(first) + x[0] * np.sin(first),
        x[3] * np.cos(second) + x[1] * np.sin(second),
    ]
    found = rotate(jnp.asarray(x, jnp.float32)[None, None, None], rope)
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-6)


def test_rope_scaling_leaves_fast_pairs_and_slows_slow_ones():
    config = dataclasses.replace(TINY, head_dim=64, rope_theta=5e5)
    scaled = dataclasses.replace(config, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
    one = jnp.array([[1]])
    plain, slowed = (np.arctan2(*reversed(compute_rope(c, one)))[0, 0, 0] for c in (config, scaled))
    wavelengths = 2 * np.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    np.testing.assert_allclose(slowed[fast], plain[fast], rtol=1e-5)
    np.testing.assert_allclose(slowed[slow], plain[slow] / 8, rtol=1e-4)
    between = ~(fast | slow)
    assert np.all((slowed[between] < plain[between]) & (slowed[between] > plain[between] / 8))


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        DecoderConfig(vocab_size=8, num_heads=4, num_kv_heads=3)
    with pytest.raises(ValueError, match="remat='some' is unknown; choose full, dots, none"):
        DecoderConfig(vocab_size=8, remat="some")
    with pytest.raises(ValueError, match="attention='flash' is unknown; choose auto, xla"):
        DecoderConfig(vocab_size=8, attention="flash")
    with pytest.raises(ValueError, match="head_dim=5 must be even"):
        DecoderConfig(vocab_size=8, head_dim=5)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    config = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    inputs = make_tokens(1, 4)
    params = make_params(TINY)
    found = run(params, config, *inputs)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), run(params, TINY, *inputs), atol=0.15)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_the_block_is_an_ordinary_linen_module():
    """Its own ``init`` gives one layer of the stacked parameters."""
    rope = compute_rope(TINY, jnp.zeros((1, 1), jnp.int32))
    own = jax.eval_shape(
        lambda: Block(TINY).init(jax.random.key(0), jnp.zeros((1, 1, 16)), rope, lambda q, k, v: (q, None))
    )
    stacked = jax.tree.map(lambda leaf: leaf.shape[1:], make_params(TINY)["layers"])
    assert jax.tree.map(lambda leaf: leaf.shape, own["params"]) == stacked


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_projections_change_nothing(name):
    config = CONFIGS[name]
    fused = dataclasses.replace(config, fused_projections=True)
    params = unstack_layers(make_params(config), config.num_layers)
    layers = tuple(map(fuse_projections, params["layers"]))
    assert {"qkv_proj", "gate_up_proj"} < set(layers[0])
    assert not {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"} & set(layers[0])
    tokens, positions = make_tokens(2, 5)[:2]
    expected, cache = run_cached(params, config, tokens, positions, init_cache(config, 2, 8))
    found, fused_cache = run_cached(
        {**params, "layers": layers}, fused, tokens, positions, init_cache(config, 2, 8)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(fused_cache), jax.tree.leaves(cache), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_bfloat16_parameters_are_added_up_in_float32():
    """Against float32 parameters of the same values, on a text in which one token is frequent."""
    narrow = dataclasses.replace(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    wide = dataclasses.replace(narrow, param_dtype=jnp.float32)
    generator = np.random.default_rng(0)
    tokens = np.where(generator.random((4, 512)) < 0.5, 3, generator.integers(0, 31, (4, 512))).astype(
        np.int32
    )
    positions = np.broadcast_to(np.arange(512, dtype=np.int32), (4, 512))
    inputs = jax.tree.map(jnp.asarray, (tokens, positions, np.ones((4, 512), np.int32)))
    weights = jnp.asarray(generator.normal(0.2, 1, (4, 512, 16)), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    def slope_of(params, config):
        def loss(params):
            return jnp.sum((forward(params, config, *inputs) * weights).astype(jnp.float32))

        return jax.grad(loss)(params)

    params = make_params(narrow)
    found = slope_of(params, narrow)
    expected = slope_of(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params), wide)
    for (path, one), other in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if np.any(other):  # not of the head, which is behind the states
            error = np.linalg.norm(one.astype(np.float32) - other) / np.linalg.norm(other)
            assert error < 0.01, (jax.tree_util.keystr(path), error)
