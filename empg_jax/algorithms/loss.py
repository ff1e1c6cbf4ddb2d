"""The training loss per token, on any rows of the batch: objective + KL − entropy bonus, and the critic's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.algorithms.contract import LossResult
from empg_jax.algorithms.part import name_of
from empg_jax.algorithms.recipe import Recipe
from empg_jax.algorithms.surrogates import log_ratio
from empg_jax.types import Batch, Scores


def make_loss(recipe: Recipe) -> Callable[..., LossResult]:
    """Build the policy's loss per token.

    Args:
      recipe: the algorithm.
    """

    def loss(
        logprobs: Float[Array, "B T"],
        entropies: Float[Array, "B T"],
        batch_rows: Batch,
        scores_rows: Scores,
        advantages: Float[Array, "B T"],
    ) -> LossResult:
        mask = batch_rows.loss_mask
        # Overwritten before any arithmetic: neither value nor gradient can leak from an untrained token.
        logprobs, entropies, advantages = (jnp.where(mask, x, 0) for x in (logprobs, entropies, advantages))
        scores_rows = jax.tree.map(lambda x: jnp.where(mask, x, 0), scores_rows)
        values, metrics = recipe.objective(logprobs, batch_rows, scores_rows, advantages)
        if values.shape != mask.shape:
            raise ValueError(
                f"{name_of(recipe.objective)} returned a loss of shape {values.shape}; expected float[B, "
                "T] = "
                f"{mask.shape}"
            )
        for correction in recipe.correct:  # type: ignore[union-attr]
            if correction.weigh is not None:
                weights = correction.weigh(logprobs, batch_rows, scores_rows, advantages)
                # where, not a product alone: a rejected token's loss may be infinite or NaN.
                values = jnp.where(weights != 0, values * jax.lax.stop_gradient(weights), 0)
        for correction in recipe.correct:  # type: ignore[union-attr]
            if correction.limit is not None:
                kept = correction.limit(jax.lax.stop_gradient(entropies), batch_rows, scores_rows)
                values = jnp.where(kept, values, jax.lax.stop_gradient(values))
                metrics["entropy_kept"] = kept.astype(values.dtype)
        change = log_ratio(logprobs, scores_rows.old_logprobs)
        metrics |= {
            "policy_loss": values,
            "ratio": jnp.exp(change),
            "approx_kl": jnp.expm1(change) - change,  # k3 of the policy before the update to the one trained
        }
        if recipe.kl is not None:
            metrics["kl"], weight = recipe.kl(logprobs, batch_rows, scores_rows)
            values = values + weight * metrics["kl"]
        if recipe.entropy_coef:
            values = values - recipe.entropy_coef * entropies
        return jnp.where(mask, values, 0), jax.lax.stop_gradient(metrics)

    return loss


def make_value_loss(recipe: Recipe) -> Callable[..., LossResult] | None:
    """Build the critic's loss per token, its coefficient included; None without a critic.

    Args:
      recipe: the algorithm.
    """
    critic = recipe.critic
    if critic is None:
        return None

    def critic_loss(
        values: Float[Array, "B T"],
        batch_rows: Batch,
        scores_rows: Scores,
        value_targets: Float[Array, "B T"],
    ) -> LossResult:
        mask = batch_rows.loss_mask
        streams = (jnp.where(mask, x, 0) for x in (values, scores_rows.values, value_targets))
        loss, weight = critic(*streams)
        metrics = jax.lax.stop_gradient({"value_loss": loss, "value_mean": values})
        return weight * loss, metrics

    return critic_loss
