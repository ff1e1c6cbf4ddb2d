"""The terms beside the policy's loss: the divergence from a reference, and the critic's loss."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from empg_jax.algorithms import losses
from empg_jax.algorithms.masking import Count, NonNegative, Positive, check_choice
from empg_jax.algorithms.part import Part, default_of
from empg_jax.types import Batch, Scores


def kl(
    coef: NonNegative,
    *,
    kind: Literal["k1", "k2", "k3", "k1+", "k3+", "k3_is"] = default_of(losses.kl_penalty, "kind"),
) -> Part:
    """Bind `kl_penalty` to the frozen reference policy.

    Args:
      coef: Weight of the KL penalty to the reference policy.
      kind: Estimator of that KL; + corrects its gradient, k3_is both under older samples (DeepSeek-V3.2).
    """
    check_choice("kl_kind", kind, losses.KL_KINDS)

    def penalty(
        logprobs: Float[Array, "B T"], rows: Batch, scores: Scores
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        # The policy that sampled, which with older samples is not the learner before the update.
        old = rows.behavior_logprobs if kind == "k3_is" else None
        found = losses.kl_penalty(logprobs, scores.ref_logprobs, kind=kind, old_logprobs=old)
        return found, jnp.asarray(coef, logprobs.dtype)

    return Part("kl", {"coef": coef, "kind": kind}, penalty, needs=("ref_logprobs",))


def critic(
    *,
    value_coef: NonNegative = 0.5,
    value_clip: Positive | None = default_of(losses.value_loss, "clip"),
    learning_rate: Positive | None = None,
    grad_clip: Positive | None = None,
    warmup_updates: Count = 0,
    detach: bool = False,
) -> Part:
    """Bind `value_loss` and the optimizer settings of the critic's head.

    Args:
      value_coef: Weight of the value loss beside the policy loss.
      value_clip: Largest change of a value in an update; null is off.
      learning_rate: Peak learning rate of the critic's head; null is the policy's.
      grad_clip: Largest gradient norm of the critic's head; null is the policy's.
      warmup_updates: Updates that train the critic alone before the policy moves.
      detach: Stop the critic's gradient at its head, so that it does not shape the network below.
    """
    options: dict[str, Any] = dict(locals())

    def loss(
        values: Float[Array, "B T"], old_values: Float[Array, "B T"], targets: Float[Array, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, ""]]:
        per_token = losses.value_loss(values, old_values, targets, clip=value_clip)
        return per_token, jnp.asarray(value_coef, per_token.dtype)

    return Part("critic", options, loss, needs=("values",))
