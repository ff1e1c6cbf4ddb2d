"""Measurements and plot of `theory.py`, in a module of their own so that its ``--help`` does not load JAX."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from empg_jax.algorithms import entropy_drift, renyi2_entropy, score_norm_sq
from empg_jax.hf.load import load_hf
from empg_jax.models.decoder import DecoderConfig, forward, init_params, output_embedding


def entropy(logprobs: jax.Array) -> jax.Array:
    return -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)


def softmax_policies(key: jax.Array, count: int, actions: int) -> jax.Array:
    """Draw logits from nearly uniform to nearly deterministic."""
    return jnp.logspace(-1, 1, count)[:, None] * jax.random.normal(key, (count, actions))


def last_logits(params: Any, config: DecoderConfig, tokens: jax.Array) -> jax.Array:
    """Compute the next-token logits after each row of tokens, [rows, V]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    hidden = forward(params, config, tokens, positions, jnp.ones_like(tokens))
    return hidden[:, -1] @ output_embedding(params).T


def sampled_score_norms(key: jax.Array, logits: jax.Array, samples: int) -> jax.Array:
    """Average ||e_a - pi||^2 over sampled actions."""
    probs = jax.nn.softmax(logits)
    actions = jax.random.categorical(key, logits, shape=(samples, logits.shape[0]))
    chosen = jnp.take_along_axis(probs[None], actions[..., None], axis=-1)[..., 0]
    return jnp.mean(1 - 2 * chosen + jnp.sum(probs**2, axis=-1)[None], axis=0)


def flow_drift(logits: jax.Array, actions: jax.Array, advantages: jax.Array) -> jax.Array:
    """Compute the derivative of the entropy along d pi(b) = A (1[b = a] - pi(b))."""
    probs = jax.nn.softmax(logits)
    flow = advantages[:, None] * (jax.nn.one_hot(actions, logits.shape[-1]) - probs)
    return jax.jvp(lambda p: entropy(jnp.log(p)), (probs,), (flow,))[1]


def weight_drift(
    params: Any, config: DecoderConfig, tokens: jax.Array, actions: jax.Array, advantages: jax.Array
) -> jax.Array:
    """Compute the derivative of each row's entropy along the gradient of A log pi(a) on all weights."""

    def one(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        row, action, advantage = inputs

        def logprobs(weights: Any) -> jax.Array:
            return jax.nn.log_softmax(last_logits(weights, config, row[None])[0])

        direction = jax.grad(lambda weights: advantage * logprobs(weights)[action])(params)
        # The derivative along it, by the gradient: the model's own rules are for reverse mode.
        slope = jax.grad(lambda weights: entropy(logprobs(weights)))(params)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, direction)), jnp.float32(0))

    return jax.lax.map(one, (tokens, actions, advantages))


@dataclasses.dataclass(frozen=True)
class Subject:
    """The policies under test, and the model behind some of them."""

    config: DecoderConfig
    params: Any
    tokens: jax.Array
    policies: dict[str, jax.Array]


def make_subject(model: str | None, states: int, keys: Any) -> Subject:
    if model:
        config, params = load_hf(model)
    else:
        config = DecoderConfig(vocab_size=64, remat="none")
        params = init_params(next(keys), config)
        # Random heads are nearly uniform; a sharper one has states of high and of low entropy.
        params["final_norm"]["scale"] *= 3.0
    tokens = jax.random.randint(next(keys), (states, 12), 0, config.vocab_size)
    policies = {
        "softmax": softmax_policies(next(keys), states, 32),
        "model": jax.jit(lambda p: last_logits(p, config, tokens))(params),
    }
    return Subject(config, params, tokens, policies)


def check_empg(axis: Axes, name: str, logits: jax.Array, key: jax.Array, samples: int) -> dict[str, float]:
    renyi = np.asarray(renyi2_entropy(logits))
    exact, law = np.asarray(score_norm_sq(logits)), 1 - np.exp(-renyi)
    sampled = np.asarray(sampled_score_norms(key, logits, samples))
    order = np.argsort(renyi)
    axis.plot(renyi[order], law[order], color="0.6", label="1 - exp(-H2)")
    axis.plot(renyi, sampled, ".", label=f"{samples} samples")
    axis.set(xlabel="Renyi-2 entropy (nats)", ylabel="E ||score||^2", title=f"EMPG, {name}")
    axis.legend()
    return {
        f"{name}_score_norm_error": float(np.abs(exact - law).max()),
        f"{name}_score_norm_sampling_error": float(np.abs(sampled - law).max()),
    }


def check_aem(axis: Axes, name: str, subject: Subject, key: jax.Array) -> dict[str, float]:
    logits = subject.policies[name]
    actions = jax.random.categorical(key, logits)
    advantages = jnp.where(jnp.arange(len(logits)) % 2 == 0, 1.0, -1.0)
    predicted = np.asarray(entropy_drift(logits, actions, advantages))
    flow = np.asarray(flow_drift(logits, actions, advantages))
    result = {f"{name}_drift_error": float(np.abs(flow - predicted).max())}
    axis.axline((0, 0), slope=1, color="0.6")
    axis.plot(predicted, flow, ".", label="natural-gradient flow")
    if name == "model":
        weights = jax.jit(lambda p, a, v: weight_drift(p, subject.config, subject.tokens, a, v))
        measured = np.asarray(weights(subject.params, actions, advantages))
        scale = np.abs(predicted).mean() / np.abs(measured).mean()
        axis.plot(predicted, scale * measured, "x", label="gradient step on the weights (scaled)")
        result["model_weight_step_correlation"] = float(np.corrcoef(predicted, measured)[0, 1])
        result["model_weight_step_sign_agreement"] = float(np.mean(np.sign(predicted) == np.sign(measured)))
    axis.set(xlabel="A (S - H)", ylabel="dH/dt", title=f"AEM, {name}")
    axis.legend()
    return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Draw the plot; return the largest deviations."""
    keys = iter(jax.random.split(jax.random.key(arguments.seed), 8))
    subject = make_subject(arguments.model, arguments.states, keys)
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    result: dict[str, Any] = {"model": arguments.model or "random", "states": arguments.states}
    for column, (name, logits) in enumerate(subject.policies.items()):
        result |= check_empg(axes[0, column], name, logits, next(keys), arguments.samples)
    for column, name in enumerate(subject.policies):
        result |= check_aem(axes[1, column], name, subject, next(keys))
    figure.savefig(arguments.out, dpi=120)
    return result | {"plot": arguments.out}
