"""Top-k, top-p and min-p: the tokens that a sampler may draw. Engine and learner share this one rule.

A filter keeps the tokens whose logits are at most some *reach* below the largest one. Tokens with equal
logits are therefore kept or dropped together, and nothing needs to be sorted: the reach is found by dividing
the range of float32's bit patterns again and again, which is exact and parallelizes well. A CPU halves it 31
times, with one sum over the vocabulary each; others divide it by eight 11 times, with seven sums at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_INFINITY_BITS = 0x7F800000  # float32; the bit patterns of numbers that are not negative are in their order
_SMALLEST = float(jnp.finfo(jnp.float32).tiny)  # smaller ones are taken for 0
_PASSES = {2: 31, 8: 11}  # by the number of parts: divisions of the range of these patterns until one is left


class TokenFilter(NamedTuple):
    """The options that restrict sampling to likely tokens; the defaults keep every token.

    They apply to the distribution at the sampling temperature: ``top_k`` first, then ``top_p`` to what
    ``top_k`` left, renormalized (as vLLM and Transformers do). ``min_p`` compares with the most likely token.

    Attributes:
      top_p: keeps the fewest most likely tokens whose probabilities sum to at least this share; 1 is off.
      top_k: keeps the most likely ``top_k`` tokens; 0 is off.
      min_p: keeps the tokens with at least this share of the most likely token's probability; 0 is off.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_off(self) -> bool:
        """Whether every token is kept."""
        return self == NO_FILTER

    def check(self, vocab_size: int, prefix: str = "") -> None:
        """Refuse values without a meaning.

        Args:
          vocab_size: number of tokens that there are.
          prefix: written before an option's name in the message.

        Raises:
          ValueError: an option lies outside its range.
        """
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{prefix}top_p={self.top_p:g} must lie in (0, 1]; 1 keeps every token")
        if self.top_p < _SMALLEST:
            raise ValueError(
                f"{prefix}top_p={self.top_p:g} must lie in [{_SMALLEST:g}, 1]: float32 has no smaller number "
                "of full precision; 1 keeps every token"
            )
        if not 0 <= self.top_k <= vocab_size:
            raise ValueError(
                f"{prefix}top_k={self.top_k} must lie in [0, {vocab_size}], the size of the vocabulary; "
                "0 keeps every token"
            )
        if not 0 <= self.min_p < 1:
            raise ValueError(f"{prefix}min_p={self.min_p:g} must lie in [0, 1); 0 keeps every token")


NO_FILTER = TokenFilter()


def uses_filter(filters: Float[Array, "R 3"]) -> Array:
    """Return which rows of options (in the order of `TokenFilter`) drop tokens, bool[R]."""
    top_p, top_k, min_p = (filters[:, i] for i in range(3))
    return (top_p < 1) | (top_k > 0) | (min_p > 0)


def find_reach(gaps: Float[Array, "*M V"], filters: Float[Array, "*#M 3"]) -> Float[Array, "*M"]:
    """Find how far below the largest logit the kept tokens lie.

    Args:
      gaps: float32, the largest logit minus each logit, at the sampling temperature.
      filters: float32, options in the order of `TokenFilter`.

    Returns:
      The largest gap that is kept; infinity where all are.
    """
    top_p, top_k, min_p = (jnp.broadcast_to(filters[..., i], gaps.shape[:-1]) for i in range(3))
    infinity = jnp.full(gaps.shape[:-1], jnp.inf, jnp.float32)

    def has_count(edge: Array) -> Array:
        return jnp.sum(gaps <= edge[..., None], axis=-1, dtype=jnp.float32) >= top_k

    # Searched only where some row asks for it: a search reads the vocabulary many times.
    def search_count() -> Array:
        return jnp.where(top_k > 0, _search(has_count, infinity), infinity)

    by_count = jax.lax.cond(jnp.any(top_k > 0), search_count, lambda: infinity)

    def mass(edge: Array) -> Array:
        return jnp.sum(jnp.where(gaps <= edge[..., None], jnp.exp(-gaps), jnp.float32(0.0)), axis=-1)

    def search_mass() -> Array:
        wanted = top_p * mass(by_count)
        found = _search(lambda edge: mass(jnp.minimum(edge, by_count)) >= wanted, infinity)
        return jnp.where(top_p < 1, found, infinity)

    by_mass = jax.lax.cond(jnp.any(top_p < 1), search_mass, lambda: infinity)
    # The logarithm of 0 is minus infinity, which keeps all.
    return jnp.minimum(jnp.minimum(by_count, by_mass), -jnp.log(min_p))


def _search(is_enough: Callable[[Array], Array], like: Array) -> Array:
    """Find the smallest float32 that is not negative and is enough; infinity counts as enough.

    Args:
      is_enough: maps numbers to booleans, from false to true as they grow.
      like: an array of the result's shape.
    """

    def search(parts: int, low: Array) -> Array:
        def divide(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            size, rest = (high - low) // parts, (high - low) % parts
            edges = [low + size * i + jnp.minimum(rest, i) for i in range(1, parts)]
            enough = [is_enough(jax.lax.bitcast_convert_type(edge, jnp.float32)) for edge in edges]
            for edge, is_it in zip(edges, enough, strict=True):  # the last that is not enough
                low = jnp.where(is_it, low, edge)
            for edge, is_it in zip(reversed(edges), reversed(enough), strict=True):  # the first that is
                high = jnp.where(is_it, edge, high)
            return low, high

        bounds = low, jnp.full_like(low, _INFINITY_BITS)
        return jax.lax.fori_loop(jnp.int32(0), _PASSES[parts], divide, bounds)[1]

    low = jnp.full_like(like, -1, jnp.int32)  # the pattern of no number; only those above it are tried
    by_parts = {parts: functools.partial(search, parts) for parts in _PASSES}
    found = jax.lax.platform_dependent(low, cpu=by_parts[2], default=by_parts[8])
    return jax.lax.bitcast_convert_type(found, jnp.float32)
