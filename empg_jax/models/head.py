"""The head: log-probability and entropy of given tokens, without all logits ``[tokens, V]`` in memory.

The learner and the warm start use it; the engine has the logits of one position at a time and uses
`engine.sampling`. On a mesh each device computes the logits of its own tokens and its own part of the
vocabulary. The devices exchange only one number per token and the embedding rows of one chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.models.floors import find_floors
from empg_jax.parallel.layout import constrain, gather_weight, num_shards, shard_weight
from empg_jax.types import wide_type

# Largest number of float32 logits [tokens, chunk] in memory at one time on a device. On a CPU, 64 MiB stay
# near the caches. An accelerator needs large products: with 16k tokens and V = 152k the larger slab takes an
# H100 60 ms instead of 99 ms.
SLABS = {"cpu": 2**24}
LARGE_SLAB = 2**28
MIN_BLOCK = 64  # tokens; smaller products would not pay for the rest that they save
# Logit of a padded vocabulary entry, and initial value of running maxima. It is finite, and its exp is 0.
LOWEST = -1e30


def compute_head(
    hidden: Float[Array, "*M D"],
    weights: Float[Array, "V D"],
    tokens: Int[Array, "*M"],
    temperature: float = 1.0,
    slab: int | None = None,
    mask: Bool[Array, "*M"] | None = None,
    *,
    token_filter: TokenFilter = NO_FILTER,
) -> tuple[Float[Array, "*M"], Float[Array, "*M"]]:
    """Compute log-probability and full-vocabulary entropy of each token; both have gradients.

    With ``z = hidden @ weights.T / temperature``: ``logprob = z[token] - logsumexp(z)`` and
    ``entropy = logsumexp(z) - sum(softmax(z) * z)``. The vocabulary is processed in chunks with a running
    maximum. The backward pass recomputes each chunk from two saved numbers per token, ``logsumexp(z)`` and
    ``E_p z``: ``dz = g_lp (1[v = token] - p) - g_H p (z - E_p z)``.

    With a filter, log-probabilities are those of the filtered distribution, as the sampler draws from it: the
    sum goes over the kept entries and over the token itself. Which entries are kept is found from these
    logits and is a constant in the gradient. Entropies are those of the whole distribution all the same.

    Args:
      hidden: normalized final hidden states; on a mesh ``[B T D]`` with rows and time split.
      weights: output embedding, one row per vocabulary entry.
      tokens: the tokens to score.
      temperature: divides the logits.
      slab: largest number of logits in memory at one time on a device; default by platform (`slab_size`).
      mask: the tokens whose results are read; those of the others are 0. Agents sample a small part of their
        rows' tokens, so most blocks of tokens are left out, unless rows are split over devices.
      token_filter: the sampler's filter.

    Returns:
      ``(logprobs, entropies)`` in float32, entropies in nats.
    """
    slab, vocab = slab or slab_size(), weights.shape[0]
    blocks = 1 if mask is None else num_blocks(tokens.size)
    chunks = num_chunks(tokens.size // blocks, vocab, slab)
    floors = None
    if not token_filter.is_off:
        floors = find_floors(hidden, weights, temperature, token_filter, slab, mask)
    if num_shards("time") > 1:  # flattening two split axes into one would gather the states
        outputs = _head(hidden, weights, tokens, temperature, chunks, floors)
    else:
        flat = hidden.reshape(-1, hidden.shape[-1]), weights, tokens.reshape(-1)  # faster products on CPUs
        floors = None if floors is None else floors.reshape(-1)
        if mask is None or blocks == 1:
            logprobs, entropies = _head(*flat, temperature, chunks, floors)
        else:
            sizes = _Sizes(temperature, chunks, blocks)
            logprobs, entropies = _head_of_some(*flat, mask.reshape(-1), sizes, floors)
        outputs = logprobs.reshape(tokens.shape), entropies.reshape(tokens.shape)
    if mask is None:
        return outputs
    # Also for gradients: a block's rest holds tokens outside the mask.
    logprobs, entropies = (jnp.where(mask, each, jnp.zeros((), each.dtype)) for each in outputs)
    return logprobs, entropies


def slab_size() -> int:
    """Return the largest number of logits in memory at one time on a device of this platform."""
    return SLABS.get(jax.default_backend(), LARGE_SLAB)


def num_chunks(num_tokens: int, vocab: int, slab: int) -> int:
    """Return the number of vocabulary chunks for which a device's part of the logits fits the slab."""
    shards = num_shards("vocab")
    devices = shards * num_shards("rows") * num_shards("time")
    chunks = max(1, -(-num_tokens * vocab // (slab * devices)))
    # Prefer a divisor of the vocabulary: it avoids a padded copy of the embedding, and its chunks can be
    # split over the devices like the whole vocabulary.
    for candidate in range(chunks, min(2 * chunks, vocab) + 1):
        if vocab % (candidate * (shards if vocab % shards == 0 else 1)) == 0:
            return candidate
    return min(chunks, vocab)


def num_blocks(num_tokens: int) -> int:
    """Return the number of blocks of tokens that are computed or left out; 1 where all are computed."""
    if num_shards("rows") * num_shards("time") > 1:  # each device has its own tokens, and all work in step
        return 1
    fitting = (n for n in (16, 8, 4, 2) if num_tokens % n == 0 and num_tokens // n >= MIN_BLOCK)
    return next(fitting, 1)


def _chunked(weights: Array, chunks: int) -> Array:
    """Split the embedding into ``[C, ceil(V / C), D]``: chunk ``c`` holds the rows ``v`` with ``v % C == c``.

    The chunks are strided because a sharded vocabulary is split into contiguous parts. Every chunk then has
    rows on every device, and each scan step keeps all devices busy.
    """
    vocab, depth = weights.shape
    per_chunk = -(-vocab // chunks)
    padded = jnp.pad(weights, ((0, per_chunk * chunks - vocab), (0, 0))) if vocab % chunks else weights
    return shard_weight(jnp.swapaxes(padded.reshape(per_chunk, chunks, depth), 0, 1), (None, *_TABLE))


_TABLE = ("vocab", "embed")  # logical axes of the output embedding


def _split_tokens(x: Array, *axes: str | None) -> Array:
    """Split the tokens of ``x [*M ...]`` over the mesh like the learner's rows."""
    return constrain(x, *("rows", "time")[: x.ndim - len(axes)], *axes)


def _chunk_logits(
    hidden: Array, chunk: Array, index: Array, vocab: int, chunks: int, temperature: float
) -> Array:
    wide = wide_type(hidden.dtype)
    logits = jnp.einsum("...d,vd->...v", hidden, chunk, preferred_element_type=wide)
    logits = _split_tokens(logits * jnp.asarray(1 / temperature, wide), "vocab")
    if vocab % chunks:
        exists = _entries(chunk, index, chunks, hidden.ndim) < vocab
        logits = jnp.where(exists, logits, jnp.asarray(LOWEST, wide))
    return logits


def _entries(chunk: Array, index: Array, chunks: int, ndim: int) -> Array:
    """Return the vocabulary entry of each row of a chunk, along the last of ``ndim`` axes."""
    entries = jnp.arange(chunk.shape[0], dtype=index.dtype) * chunks + index
    return entries.reshape((1,) * (ndim - 1) + entries.shape)


def _logit_of(tokens: Array, logits: Array, chunk: Array, index: Array, chunks: int) -> tuple[Array, Array]:
    """Return which tokens are in the chunk, and their logits there (arbitrary for the others)."""
    if num_shards("vocab") > 1:  # an index lookup would gather the logits of all devices
        is_mine = _entries(chunk, index, chunks, logits.ndim) == tokens[..., None]
        found = jnp.sum(jnp.where(is_mine, logits, jnp.zeros((), logits.dtype)), axis=-1)
    else:
        place = jnp.minimum(tokens // chunks, chunk.shape[0] - 1)
        found = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
    return tokens % chunks == index, found


# Running maximum, sum of exponentials, sum of exponentials x logits, the token's logit, and (with a filter)
# the sum of the kept exponentials; each [*M].
Running = tuple[Array, Array, Array, Array, Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _head(
    hidden: Array,
    weights: Array,
    tokens: Array,
    temperature: float,
    chunks: int,
    floors: Array | None = None,
) -> tuple[Array, Array]:
    return _head_forward(hidden, weights, tokens, temperature, chunks, floors)[0]


class _Saved(NamedTuple):
    """What the backward pass needs; the last two only with a filter."""

    hidden: Array
    weights: Array
    tokens: Array
    normalizer: Array  # log of the sum of all exponentials
    mean_logit: Array
    kept_normalizer: Array | None
    floors: Array | None


def _head_forward(
    hidden: Array,
    weights: Array,
    tokens: Array,
    temperature: float,
    chunks: int,
    floors: Array | None = None,
) -> tuple[tuple[Array, Array], _Saved]:
    vocab, wide = weights.shape[0], wide_type(hidden.dtype)

    def step(carry: Running, inputs: tuple[Array, Array]) -> tuple[Running, None]:
        largest, total, weighted, target, kept = carry
        index, chunk = inputs
        chunk = gather_weight(chunk, _TABLE)
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        decay = jnp.exp(largest - new_largest)
        shifted = logits - new_largest[..., None]
        exponentials = jnp.exp(shifted)
        # Sum shifted logits. With plain logits the entropy would be a small difference of large numbers.
        weighted = decay * (weighted + total * (largest - new_largest))
        weighted = weighted + jnp.sum(exponentials * shifted, axis=-1)
        total = total * decay + jnp.sum(exponentials, axis=-1)
        is_here, found = _logit_of(tokens, logits, chunk, index, chunks)
        target = jnp.where(is_here, found, target)
        if floors is not None and kept is not None:
            is_kept = logits >= floors[..., None]
            kept = kept * decay + jnp.sum(jnp.where(is_kept, exponentials, jnp.zeros((), wide)), axis=-1)
        return (new_largest, total, weighted, target, kept), None

    zeros = jnp.zeros(tokens.shape, wide)
    carry = (jnp.full(tokens.shape, LOWEST, wide), zeros, zeros, zeros, None if floors is None else zeros)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    (largest, total, weighted, target, kept), _ = jax.lax.scan(step, carry, inputs)
    mean_shifted = weighted / total
    if floors is not None and kept is not None:
        # The sampler drew the token, so it was kept there, whatever a last digit or newer weights say here.
        kept = kept + jnp.where(target < floors, jnp.exp(target - largest), jnp.zeros((), wide))
    outputs = (target - largest - jnp.log(total if kept is None else kept), jnp.log(total) - mean_shifted)
    normalizer, mean_logit = largest + jnp.log(total), largest + mean_shifted
    kept_normalizer = None if kept is None else largest + jnp.log(kept)
    return outputs, _Saved(hidden, weights, tokens, normalizer, mean_logit, kept_normalizer, floors)


def _head_backward(
    temperature: float, chunks: int, saved: _Saved, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    hidden, weights, tokens, normalizer, mean_logit, kept_normalizer, floors = saved
    g_logprob, g_entropy = cotangents
    vocab, wide = weights.shape[0], wide_type(hidden.dtype)

    def step(d_hidden: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        index, chunk = inputs
        chunk = gather_weight(chunk, _TABLE)
        logits = _chunk_logits(hidden, chunk, index, vocab, chunks, temperature)
        # Softmax of this chunk from the saved normalizer; d entropy / dz = -p (z - E_p z).
        probabilities = jnp.exp(logits - normalizer[..., None])
        surprise = logits - mean_logit[..., None]
        is_target = _entries(chunk, index, chunks, hidden.ndim) == tokens[..., None]
        if floors is None or kept_normalizer is None:
            slope = -probabilities * (g_logprob[..., None] + g_entropy[..., None] * surprise)
        else:
            is_kept = jnp.logical_or(logits >= floors[..., None], is_target)
            kept = jnp.where(is_kept, jnp.exp(logits - kept_normalizer[..., None]), jnp.zeros((), wide))
            slope = -kept * g_logprob[..., None] - probabilities * g_entropy[..., None] * surprise
        slope = slope + jnp.where(is_target, g_logprob[..., None], jnp.zeros((), wide))
        slope = (slope * jnp.asarray(1 / temperature, wide)).astype(hidden.dtype)
        here = jnp.einsum("...v,vd->...d", slope, chunk, preferred_element_type=wide)
        d_hidden = d_hidden + _split_tokens(here, None)
        d_chunk = jnp.einsum("...v,...d->vd", slope, hidden, preferred_element_type=wide)
        return d_hidden, shard_weight(d_chunk.astype(weights.dtype), _TABLE)

    zeros = jnp.zeros(hidden.shape, wide)
    inputs = (jnp.arange(chunks, dtype=tokens.dtype), _chunked(weights, chunks))
    d_hidden, d_chunks = jax.lax.scan(step, zeros, inputs)
    d_weights = jnp.swapaxes(d_chunks, 0, 1).reshape(-1, weights.shape[1])[:vocab]
    return d_hidden.astype(hidden.dtype), shard_weight(d_weights, _TABLE), None, None


_head.defvjp(_head_forward, _head_backward)


# ------------------------------------------------------------------------------- some of the tokens only


class _Sizes(NamedTuple):
    """The static settings of `_head_of_some`."""

    temperature: float
    chunks: int  # of the vocabulary
    blocks: int  # of the tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _head_of_some(
    hidden: Array, weights: Array, tokens: Array, mask: Array, sizes: _Sizes, floors: Array | None
) -> tuple[Array, Array]:
    """Compute the head of the blocks with tokens in the mask; zero in the others. Arrays are ``[M ...]``."""
    return _some_forward(hidden, weights, tokens, mask, sizes, floors)[0]


def _blocks_of(mask: Array, blocks: int) -> tuple[Array, Array]:
    """Return the places of all tokens ``[blocks, M / blocks]``, masked ones first, and the blocks in use."""
    order = jnp.argsort(jnp.logical_not(mask), stable=True).reshape(blocks, -1)
    return order, -(-jnp.sum(mask, dtype=jnp.int32) // order.shape[1])


def _some_forward(
    hidden: Array, weights: Array, tokens: Array, mask: Array, sizes: _Sizes, floors: Array | None
) -> tuple[tuple[Array, Array], tuple[_Saved, Array]]:
    order, used = _blocks_of(mask, sizes.blocks)

    def step(block: Array, found: Array) -> Array:
        rows = order[block]
        outputs, saved = _head_forward(
            hidden[rows], weights, tokens[rows], sizes.temperature, sizes.chunks, _at(floors, rows)
        )
        numbers = [*outputs, saved.normalizer, saved.mean_logit]
        numbers += [] if saved.kept_normalizer is None else [saved.kept_normalizer]
        return found.at[rows].set(jnp.stack(numbers, axis=-1))

    nothing = jnp.zeros((*tokens.shape, 4 if floors is None else 5), wide_type(hidden.dtype))
    # The number of rounds depends on the data: a while loop, which the backward pass repeats by itself.
    found = jax.lax.fori_loop(jnp.int32(0), used, step, nothing)
    kept = None if floors is None else found[:, 4]
    saved = _Saved(hidden, weights, tokens, found[:, 2], found[:, 3], kept, floors)
    return (found[:, 0], found[:, 1]), (saved, mask)


def _some_backward(
    sizes: _Sizes, residuals: tuple[_Saved, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None, None]:
    saved, mask = residuals
    hidden, weights = saved.hidden, saved.weights
    g_logprob, g_entropy = cotangents
    order, used = _blocks_of(mask, sizes.blocks)
    wide = wide_type(hidden.dtype)

    def step(block: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, (d_hidden, d_weights) = order[block], sums
        here = _Saved(
            hidden[rows],
            weights,
            saved.tokens[rows],
            saved.normalizer[rows],
            saved.mean_logit[rows],
            _at(saved.kept_normalizer, rows),
            _at(saved.floors, rows),
        )
        slopes = g_logprob[rows], g_entropy[rows]
        d_here, d_table, *_ = _head_backward(sizes.temperature, sizes.chunks, here, slopes)
        return d_hidden.at[rows].set(d_here), d_weights + d_table.astype(wide)

    zeros = jnp.zeros_like(hidden), jnp.zeros(weights.shape, wide)
    d_hidden, d_weights = jax.lax.fori_loop(jnp.int32(0), used, step, zeros)
    return d_hidden, d_weights.astype(weights.dtype), None, None, None


def _at(values: Array | None, rows: Array) -> Array | None:
    return None if values is None else values[rows]


_head_of_some.defvjp(_some_forward, _some_backward)
