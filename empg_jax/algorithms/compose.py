"""An algorithm is a pair of pure functions (three with a critic), composed from the parts of a recipe.

::

    credit(batch, scores)   penalties → estimator → modulation → tokens, with loss weights, on the whole batch
    loss(logprobs, …)       objective + KL − entropy bonus, per token, on any rows of it
    value_loss(values, …)   the critic's loss per token, likewise; None without a critic
"""

from collections.abc import Callable
from typing import NamedTuple

from empg_jax.algorithms.contract import LossResult
from empg_jax.algorithms.credit import make_credit
from empg_jax.algorithms.loss import make_loss, make_value_loss
from empg_jax.algorithms.recipe import Recipe
from empg_jax.types import Batch, Credit, Scores


class Algorithm(NamedTuple):
    """The functions of an algorithm that the learner executes.

    Attributes:
      credit: ``(batch, scores) -> Credit``, on the whole global batch, before any split.
      loss: ``(logprobs, entropies, batch_rows, scores_rows, advantages) -> (loss, metrics)``: loss per
        token, KL and entropy bonus included, 0 off the loss mask; metrics per token, to be averaged over the
        loss mask. The training loss is ``sum(loss * loss_weights)``. The learner gives rows whose loss mask
        holds only tokens with a weight: what credit left out moves no ratio of a turn or sequence.
      value_loss: ``(values, batch_rows, scores_rows, value_targets) -> (loss, metrics)``, added to ``loss``,
        its coefficient included. With it, ``scores.values`` must be there. None without a critic.
      detach_critic: whether the critic's gradient stops at its head.
    """

    credit: Callable[[Batch, Scores], Credit]
    loss: Callable[..., LossResult]
    value_loss: Callable[..., LossResult] | None = None
    detach_critic: bool = False


def build(recipe: Recipe, *, num_minibatches: int = 1) -> Algorithm:
    """Compose the pure functions of a recipe.

    Args:
      recipe: the algorithm.
      num_minibatches: optimizer steps that each batch is split into, at least 1.

    Raises:
      ValueError: for fewer than one mini-batch.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches={num_minibatches} must be at least 1")
    return Algorithm(
        credit=make_credit(recipe, num_minibatches=num_minibatches),
        loss=make_loss(recipe),
        value_loss=make_value_loss(recipe),
        detach_critic=bool(getattr(recipe.critic, "options", {}).get("detach", False)),
    )
