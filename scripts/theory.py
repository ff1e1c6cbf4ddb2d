"""Checks the propositions that EMPG and AEM rest on, on softmax policies and on a language model; draws them.

1. EMPG: the expected squared norm of the score is ``1 - exp(-H2)``, H2 the Renyi entropy of order 2: exactly,
   and by sampling actions.
2. AEM: reinforcing one action moves entropy at the rate ``A (S - H)``: against the derivative of entropy
   along the natural-gradient flow that the law assumes, and, on the model, along a plain gradient step on its
   weights, where the law is an approximation.

The model is a small random decoder of this project, or any folder that it can load:
``python scripts/theory.py --model FOLDER --out theory.png``. Prints one JSON object with the
largest deviations.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from empg_jax.algorithms import entropy_drift, renyi2_entropy, score_norm_sq
from empg_jax.hf.load import load_hf
from empg_jax.models.decoder import DecoderConfig, forward, init_params, output_embedding


def entropy(logprobs: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def softmax_policies(key: jax.Array, count: int, actions: int) -> jax.Array:
    """Logits from nearly uniform to nearly deterministic."""
    return jnp.logspace(-1, 1, count)[:, None] * jax.random.normal(key, (count, actions))


def last_logits(params: Any, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Next-token logits after each row of tokens, [rows, V]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = forward(params, config, tokens, positions, jnp.ones_like(tokens))
    return hidden[:, -1] @ output_embedding(params).T


def sampled_score_norms(key: jax.Array, logits: jax.Array, samples: int) -> jax.Array:
    """Mean of ||e_a - pi||^2 over sampled actions."""
    probs = jax.nn.softmax(logits)
    actions = jax.random.categorical(key, logits, shape=(samples, logits.shape[0]))
    chosen = jnp.take_along_axis(probs[None], actions[..., None], axis=-1)[..., 0]
    return jnp.mean(1 - 2 * chosen + jnp.sum(probs**2, axis=-1)[None], axis=0)


def flow_drift(logits: jax.Array, actions: jax.Array, advantages: jax.Array) -> jax.Array:
    """Derivative of the entropy along d pi(b) = A (1[b = a] - pi(b))."""
    probs = jax.nn.softmax(logits)
    flow = advantages[:, None] * (jax.nn.one_hot(actions, logits.shape[-1]) - probs)
    return jax.jvp(lambda p: entropy(jnp.log(p)), (probs,), (flow,))[1]


def weight_drift(
    params: Any, config: DecoderConfig, tokens: jax.Array, actions: jax.Array, advantages: jax.Array
) -> jax.Array:
    """Derivative of the entropy after each row along the gradient of A log pi(a) on all weights."""

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, action, advantage = inputs

        def logprobs(weights: Any) -> jax.Array:
            return jax.nn.log_softmax(last_logits(weights, config, row[None])[0])

        direction = jax.grad(lambda weights: advantage * logprobs(weights)[action])(params)
        # The derivative along it, by the gradient: the model's own rules are for reverse mode.
        slope = jax.grad(lambda weights: entropy(logprobs(weights)))(params)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)), jnp.float32(0))

    return jax.lax.map(one, (tokens, actions, advantages))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder of a model; by default a small random one")
    parser.add_argument("--out", default="theory.png", help="file of the plot")
    parser.add_argument("--states", type=int, default=128, help="policies, and contexts of the model")
    parser.add_argument("--samples", type=int, default=4096, help="actions sampled for each expectation")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    keys = iter(jax.random.split(jax.random.key(arguments.seed), 8))

    if arguments.model:
        config, params = load_hf(arguments.model)
    else:
        config = DecoderConfig(vocab_size=64, remat="none")
        params = init_params(next(keys), config)
        # Random heads are nearly uniform; a sharper one has states of high and of low entropy.
        params["final_norm"]["scale"] *= 3.0
    tokens = jax.random.randint(next(keys), (arguments.states, 12), 0, config.vocab_size)
    policies = {
        "softmax": softmax_policies(next(keys), arguments.states, 32),
        "model": jax.jit(lambda p: last_logits(p, config, tokens))(params),
    }

    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    result: dict[str, Any] = {"model": arguments.model or "random", "states": arguments.states}
    for column, (name, logits) in enumerate(policies.items()):
        renyi = np.asarray(renyi2_entropy(logits))
        exact, law = np.asarray(score_norm_sq(logits)), 1 - np.exp(-renyi)
        sampled = np.asarray(sampled_score_norms(next(keys), logits, arguments.samples))
        result[f"{name}_score_norm_error"] = float(np.abs(exact - law).max())
        result[f"{name}_score_norm_sampling_error"] = float(np.abs(sampled - law).max())
        order = np.argsort(renyi)
        axis = axes[0, column]
        axis.plot(renyi[order], law[order], color="0.6", label="1 - exp(-H2)")
        axis.plot(renyi, sampled, ".", label=f"{arguments.samples} samples")
        axis.set(xlabel="Renyi-2 entropy (nats)", ylabel="E ||score||^2", title=f"EMPG, {name}")
        axis.legend()

    for column, (name, logits) in enumerate(policies.items()):
        actions = jax.random.categorical(next(keys), logits)
        advantages = jnp.where(jnp.arange(arguments.states) % 2 == 0, 1.0, -1.0)
        predicted = np.asarray(entropy_drift(logits, actions, advantages))
        flow = np.asarray(flow_drift(logits, actions, advantages))
        result[f"{name}_drift_error"] = float(np.abs(flow - predicted).max())
        axis = axes[1, column]
        axis.axline((0, 0), slope=1, color="0.6")
        axis.plot(predicted, flow, ".", label="natural-gradient flow")
        if name == "model":
            weights = jax.jit(lambda p, a, v: weight_drift(p, config, tokens, a, v))
            measured = np.asarray(weights(params, actions, advantages))
            scale = np.abs(predicted).mean() / np.abs(measured).mean()
            axis.plot(predicted, scale * measured, "x", label="gradient step on the weights (scaled)")
            result["model_weight_step_correlation"] = float(np.corrcoef(predicted, measured)[0, 1])
            result["model_weight_step_sign_agreement"] = float(
                np.mean(np.sign(predicted) == np.sign(measured))
            )
        axis.set(xlabel="A (S - H)", ylabel="dH/dt", title=f"AEM, {name}")
        axis.legend()
    figure.savefig(arguments.out, dpi=120)
    print(json.dumps(result | {"plot": arguments.out}, indent=2))


if __name__ == "__main__":
    main()
