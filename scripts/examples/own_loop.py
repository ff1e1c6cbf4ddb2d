"""Credit and loss in a JAX loop of your own: pure functions, no trainer. Say: python own_loop.py

The policy is a table of logits. An episode has three turns of one token each, and pays at its end only.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from empg_jax.algorithms import empg, grpo, loss_weights, ppo_clip

TURNS, TOKENS, TASKS, ATTEMPTS = 3, 6, 8, 8
SECRET = jnp.array([4, 1, 3])  # what to say in each turn


def play(logits, key):
    """Samples tokens int[N, K]; returns them with their log-probabilities, entropies, and the returns."""
    tokens = jax.random.categorical(key, logits, shape=(TASKS * ATTEMPTS, TURNS))
    logprobs = jax.nn.log_softmax(logits)
    entropies = -(jnp.exp(logprobs) * logprobs).sum(-1)
    said = logprobs[jnp.arange(TURNS)[None, :], tokens]
    returns = (tokens == SECRET[None, :]).mean(-1)
    return tokens, said, jnp.broadcast_to(entropies[None, :], tokens.shape), returns


def loss_of(logits, tokens, old_logprobs, advantages, weights):
    logprobs = jax.nn.log_softmax(logits)[jnp.arange(TURNS)[None, :], tokens]
    return (ppo_clip(logprobs, old_logprobs, advantages) * weights).sum()


OPTIMIZER = optax.adam(0.1)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(logits, state, key):
    tokens, old_logprobs, entropies, returns = play(logits, key)
    mask = jnp.ones(tokens.shape, bool)  # turns that exist; also the tokens that are trained
    base = grpo(returns, jnp.repeat(jnp.arange(TASKS), ATTEMPTS))  # float[N]
    advantages = empg(jnp.broadcast_to(base[:, None], mask.shape), entropies, mask, zeta=0.05)
    weights = loss_weights(mask, mode="token-mean")
    gradient = jax.grad(loss_of)(logits, tokens, old_logprobs, advantages, weights)
    change, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(logits, change), state, returns.mean()


if __name__ == "__main__":
    logits = jnp.zeros((TURNS, TOKENS))
    state = OPTIMIZER.init(logits)
    for step in range(60):
        logits, state, mean_return = update(logits, state, jax.random.key(step))
        if step % 10 == 9:
            print(f"update {step + 1}: mean return {mean_return:.2f}")
