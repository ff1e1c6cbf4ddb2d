"""Modulations: turn advantages reweighted by the turns' entropies."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from empg_jax.algorithms import modulation
from empg_jax.algorithms.advantages import has_spread
from empg_jax.algorithms.contract import Modulation, Turns
from empg_jax.algorithms.kernel import CENTERS, MEANS, SCOPES
from empg_jax.algorithms.masking import Count, NonNegative, check_choice
from empg_jax.algorithms.part import Part, default_of
from empg_jax.types import Batch


def _control_key(seed: int | None, batch: Batch) -> Key[Array, ""] | None:
    """Make a key for the shuffled control: another one for every batch, the same however it is packed."""
    if seed is None:
        return None
    return jax.random.fold_in(jax.random.key(seed), jnp.sum(jnp.where(batch.loss_mask, batch.tokens, 0)))


def empg(
    *,
    k: NonNegative = default_of(modulation.empg, "k"),
    k_future: NonNegative = default_of(modulation.empg, "k_future"),
    zeta: NonNegative = default_of(modulation.empg, "zeta"),
    scope: Literal["batch", "group", "trajectory"] = default_of(modulation.empg, "scope"),
    center: Literal["turn", "token", "none"] = default_of(modulation.empg, "center"),
    whiten: bool = default_of(modulation.empg, "whiten"),
    mixed_groups_only: bool = False,
    reverse: bool = default_of(modulation.empg, "reverse"),
    shuffle_seed: Count | None = None,
    eps: NonNegative = default_of(modulation.empg, "eps"),
) -> Part:
    """Bind `empg`, Entropy-Modulated Policy Gradients (https://arxiv.org/abs/2509.09265).

    Args:
      k: Strength of the self-calibrating gradient scaling.
      k_future: Strength of the entropy term inside the clarity bonus.
      zeta: Weight of the future-clarity bonus.
      scope: Turns over which entropies are normalized.
      center: Mean that is subtracted from the modulated advantages.
      whiten: Also divide them by their standard deviation.
      mixed_groups_only: Leave out task groups whose raw returns are all equal.
      reverse: Control: swap the factors of low and high entropy.
      shuffle_seed: Control: permute the factors with this seed.
      eps: Guard of the min-max and of the mean.
    """
    options: dict[str, Any] = dict(locals())
    check_choice("empg.scope", scope, SCOPES)
    check_choice("empg.center", center, CENTERS)
    kept = {key: value for key, value in options.items() if key not in ("mixed_groups_only", "shuffle_seed")}

    def modulate(base: Float[Array, "N K"], turns: Turns, batch: Batch) -> Modulation:
        return modulation.empg_terms(
            base,
            turns.entropies,
            turns.mask,
            group_ids=batch.group_ids,
            token_counts=turns.token_counts,
            active_mask=has_spread(batch.returns, batch.group_ids) if mixed_groups_only else None,
            shuffle_key=_control_key(shuffle_seed, batch),
            **kept,
        )

    return Part("empg", options, modulate)


def aem(
    *,
    lam: NonNegative = default_of(modulation.aem, "lam"),
    scope: Literal["group", "batch", "trajectory"] = default_of(modulation.aem, "scope"),
    min_range: NonNegative = default_of(modulation.aem, "min_range"),
    mean: Literal["turn", "token"] = default_of(modulation.aem, "mean"),
    center: Literal["turn", "none"] = default_of(modulation.aem, "center"),
    reverse: bool = default_of(modulation.aem, "reverse"),
    shuffle_seed: Count | None = None,
    eps: NonNegative = default_of(modulation.aem, "eps"),
) -> Part:
    """Bind `aem`, Adaptive Entropy Modulation (https://arxiv.org/abs/2605.00425).

    Args:
      lam: Strength of the modulation.
      scope: Turns over which entropies are normalized.
      min_range: Entropy range (nats) below which nothing is modulated.
      mean: Unit of equal weight in the mean of the factors.
      center: Mean subtracted from the modulated advantages.
      reverse: Control: swap the factors of low and high entropy.
      shuffle_seed: Control: permute the factors with this seed.
      eps: Guard of the min-max.
    """
    options: dict[str, Any] = dict(locals())
    check_choice("aem.scope", scope, SCOPES)
    check_choice("aem.mean", mean, MEANS)
    check_choice("aem.center", center, ("turn", "none"))
    kept = {key: value for key, value in options.items() if key != "shuffle_seed"}

    def modulate(base: Float[Array, "N K"], turns: Turns, batch: Batch) -> Modulation:
        return modulation.aem_terms(
            base,
            turns.entropies,
            turns.mask,
            group_ids=batch.group_ids,
            token_counts=turns.token_counts,
            shuffle_key=_control_key(shuffle_seed, batch),
            **kept,
        )

    return Part("aem", options, modulate)
