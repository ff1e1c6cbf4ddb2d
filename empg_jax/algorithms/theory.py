"""The two propositions that the methods rest on, exact for a softmax policy.

They hold for the gradient with respect to the logits of one decision (one token, or one response seen as an
action). ``scripts/theory.py`` checks them by Monte Carlo and draws them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Real

from empg_jax.algorithms.masking import Arr, as_floats, as_ids


def score_norm_sq(logits: Real[Arr, "*batch V"]) -> Float[Array, "*batch"]:
    """Compute the score's expected squared norm over all actions: E_a ‖∇_z log π(a)‖² = E_a ‖e_a − π‖².

    EMPG's proposition 1 says that it is ``1 − exp(−H₂)`` (`renyi2_entropy`): a confident policy has small
    gradients. Source: EMPG, https://arxiv.org/abs/2509.09265.

    Args:
      logits: z.

    Returns:
      In [0, 1).
    """
    (logits,) = as_floats(logits)
    probs = jax.nn.softmax(logits, axis=-1)
    collision = jnp.sum(probs**2, axis=-1, keepdims=True)
    norms = 1 - 2 * probs + collision
    return jnp.sum(probs * norms, axis=-1)


def renyi2_entropy(logits: Real[Arr, "*batch V"]) -> Float[Array, "*batch"]:
    """Compute the Rényi entropy of order 2 of the softmax, in nats: H₂ = −log Σ_a π_a².

    Args:
      logits: z.
    """
    (logits,) = as_floats(logits)
    return -jax.nn.logsumexp(2 * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def entropy_drift(
    logits: Real[Arr, "*batch V"], action: ArrayLike, advantage: ArrayLike
) -> Float[Array, "*batch"]:
    """Compute how fast entropy moves when one sampled action is reinforced: dH/dt = A (S(a) − H).

    S = −log π(a) is the surprisal and H the entropy. It is the natural-gradient flow of the
    importance-weighted surrogate at π = π_old, ``dπ(b)/dt = A (1[b = a] − π(b))``: reinforcing a surprising
    action raises entropy, reinforcing an expected one lowers it. Source: AEM,
    https://arxiv.org/abs/2605.00425.

    Args:
      logits: z.
      action: a, int, of the batch shape (or one for all).
      advantage: A, of the batch shape (or one for all).

    Returns:
      Nats per unit of step size.
    """
    (logits,) = as_floats(logits)
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(logprobs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * logprobs, 0), axis=-1)
    batch = logits.shape[:-1]
    chosen = jnp.broadcast_to(as_ids(jnp.asarray(action)), batch)
    surprisal = -jnp.take_along_axis(logprobs, chosen[..., None], axis=-1)[..., 0]
    return jnp.broadcast_to(jnp.asarray(advantage, logits.dtype), batch) * (surprisal - entropy)
