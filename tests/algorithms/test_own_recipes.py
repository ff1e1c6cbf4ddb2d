"""Recipes of one's own: what the trial before a run finds, and under which name it tells it."""

import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.algorithms import Recipe, build, parts
from empg_jax.algorithms.contract import Modulation, Penalties
from empg_jax.algorithms.part import Correction, Part
from empg_jax.algorithms.recipes import RECIPES
from empg_jax.algorithms.trial import _small_batch, try_recipe

GRPO = parts.grpo()


def against_reference(logprobs, rows, scores, advantages):
    return -advantages * logprobs + 0.1 * (logprobs - scores.ref_logprobs), {}


def without_metrics(logprobs, rows, scores, advantages):
    return -advantages * logprobs


def steep(logprobs, rows, scores, advantages):
    return jnp.sqrt(jnp.abs(logprobs - scores.old_logprobs)) * advantages, {}


def raises(logprobs, rows, scores, advantages):
    raise ValueError("not yet written")


def nan_kl(logprobs, rows, scores):
    return logprobs * jnp.nan, 0.1


def scalar_kl(logprobs, rows, scores):
    return jnp.mean(logprobs), 0.1


def nan_factors(base, turns, batch):
    return Modulation(base, base * jnp.nan, base * 0)


def nan_penalty(batch, turns):
    return Penalties(turns.token_counts * jnp.nan, batch.returns * 0)


def of_rows(batch, kept, num_minibatches):
    return jnp.ones(kept.shape) / jnp.sum(kept, axis=1, keepdims=True)


OWN = {
    "reads the reference and does not say so": (
        {"objective": against_reference},
        r"own: TypeError: .*; scores.ref_logprobs is None unless a part says .* line \d+\)",
    ),
    "gives no metrics": (
        {"objective": without_metrics},
        r"own: without_metrics returned \w+; expected \(loss, metrics\)",
    ),
    "has no gradient": ({"objective": steep}, r"own: the gradient of the loss is not finite .*\(steep\)"),
    "raises": (
        {"objective": raises},
        r"own: ValueError: not yet written \(.*test_own_recipes.py, line \d+\)",
    ),
    "kl of NaN": ({"kl": nan_kl}, r"own: nan_kl returned numbers that are not finite"),
    "kl of one number": (
        {"kl": scalar_kl},
        r"own: scalar_kl \(kl\) returned shape \(\); expected float\[B, T\]",
    ),
    "factors of NaN": ({"modulate": nan_factors}, r"own: nan_factors returned numbers that are not finite"),
    "penalty of NaN": ({"penalise": nan_penalty}, r"own: nan_penalty returned numbers that are not finite"),
    "divides by rows without tokens": ({"aggregate": of_rows}, r"own: of_rows returned numbers that are not"),
    "weights of NaN": (
        {"correct": Correction("mine", weigh=lambda logprobs, *_: logprobs * jnp.nan)},
        r"own: mine returned numbers that are not finite",
    ),
    "one weight": (
        {"correct": Correction("mine", weigh=lambda logprobs, *_: jnp.float32(1.0))},
        r"own: mine \(weigh\) returned shape \(\); expected float\[B, T\]",
    ),
    "critic of one number": (
        {"estimate": parts.ppo(), "critic": lambda values, old, targets: (jnp.mean(values), 0.5)},
        r"own: .*lambda.* \(critic\) returned shape \(\)",
    ),
}


@pytest.mark.parametrize("what", OWN)
def test_what_is_wrong_is_told_with_the_functions_name(what):
    places, said = OWN[what]
    with pytest.raises(ValueError, match=said):
        try_recipe(Recipe(**{"estimate": GRPO, **places}), "own")


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_of_ours_is_refused(name):
    try_recipe(RECIPES[name], name)


def test_an_objective_that_says_so_gets_the_reference():
    """It had the policy's own log-probs in its place, and a divergence of 0."""
    recipe = Recipe(estimate=GRPO, objective=Part("mine", {}, against_reference, needs=("ref_logprobs",)))
    assert recipe.needs_reference and not Recipe(estimate=GRPO, objective=against_reference).needs_reference
    try_recipe(recipe, "own")
    batch, scores = _small_batch()
    credit = build(recipe).credit(batch, scores)
    losses, _ = build(recipe).loss(scores.old_logprobs, scores.entropies, batch, scores, credit.advantages)
    plain = -credit.advantages * scores.old_logprobs
    assert np.abs(np.where(batch.loss_mask, losses - plain, 0)).max() > 0.01
