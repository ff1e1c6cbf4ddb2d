"""Credit assignment and objectives for multi-turn agents: pure JAX, arrays in and out.

The functions work alone in any JAX loop. `parts` binds them to their settings, a `Recipe` composes parts, and
`make_algorithm` returns the functions that a learner executes. See README.md beside this file.

Names are imported when they are first used: a configuration reads `keys` and `signatures` without loading
JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empg_jax.algorithms import parts as parts
    from empg_jax.algorithms.advantages import grpo as grpo
    from empg_jax.algorithms.advantages import grpo_turn_rows as grpo_turn_rows
    from empg_jax.algorithms.advantages import has_spread as has_spread
    from empg_jax.algorithms.advantages import overlong_penalty as overlong_penalty
    from empg_jax.algorithms.advantages import reinforce as reinforce
    from empg_jax.algorithms.advantages import rloo as rloo
    from empg_jax.algorithms.aggregation import loss_weights as loss_weights
    from empg_jax.algorithms.anchors import gigpo as gigpo
    from empg_jax.algorithms.anchors import similarity_anchors as similarity_anchors
    from empg_jax.algorithms.compose import Algorithm as Algorithm
    from empg_jax.algorithms.compose import build as build
    from empg_jax.algorithms.contract import LossResult as LossResult
    from empg_jax.algorithms.contract import Modulation as Modulation
    from empg_jax.algorithms.contract import Penalties as Penalties
    from empg_jax.algorithms.contract import TokenCredit as TokenCredit
    from empg_jax.algorithms.contract import Turns as Turns
    from empg_jax.algorithms.contract import Worth as Worth
    from empg_jax.algorithms.corrections import effective_sample_size as effective_sample_size
    from empg_jax.algorithms.corrections import entropy_ratio_mask as entropy_ratio_mask
    from empg_jax.algorithms.corrections import mis_mask as mis_mask
    from empg_jax.algorithms.corrections import offpolicy_sequence_mask as offpolicy_sequence_mask
    from empg_jax.algorithms.corrections import tis_weights as tis_weights
    from empg_jax.algorithms.describe import describe_recipe as describe_recipe
    from empg_jax.algorithms.entry import load_recipe as load_recipe
    from empg_jax.algorithms.gains import a2tgpo as a2tgpo
    from empg_jax.algorithms.gains import igpo as igpo
    from empg_jax.algorithms.gains import information_gains as information_gains
    from empg_jax.algorithms.graph import closure_values as closure_values
    from empg_jax.algorithms.graph_credit import crbc as crbc
    from empg_jax.algorithms.graph_credit import graft as graft
    from empg_jax.algorithms.graph_credit import graph_gpo as graph_gpo
    from empg_jax.algorithms.graph_credit import graph_hca as graph_hca
    from empg_jax.algorithms.histories import hgpo as hgpo
    from empg_jax.algorithms.losses import cispo as cispo
    from empg_jax.algorithms.losses import kl_penalty as kl_penalty
    from empg_jax.algorithms.losses import reinforce_loss as reinforce_loss
    from empg_jax.algorithms.losses import sapo as sapo
    from empg_jax.algorithms.losses import value_loss as value_loss
    from empg_jax.algorithms.masking import whiten as whiten
    from empg_jax.algorithms.milestones import beacon as beacon
    from empg_jax.algorithms.modulation import aem as aem
    from empg_jax.algorithms.modulation import empg as empg
    from empg_jax.algorithms.part import Correction as Correction
    from empg_jax.algorithms.part import Part as Part
    from empg_jax.algorithms.recipe import Recipe as Recipe
    from empg_jax.algorithms.recipes import ALGORITHMS as ALGORITHMS
    from empg_jax.algorithms.recipes import RECIPES as RECIPES
    from empg_jax.algorithms.recipes import make_algorithm as make_algorithm
    from empg_jax.algorithms.recipes import make_recipe as make_recipe
    from empg_jax.algorithms.returns import discounted_returns as discounted_returns
    from empg_jax.algorithms.returns import gae as gae
    from empg_jax.algorithms.returns import reinforce_pp as reinforce_pp
    from empg_jax.algorithms.segments import compute_turn_entropies as compute_turn_entropies
    from empg_jax.algorithms.segments import count_turn_tokens as count_turn_tokens
    from empg_jax.algorithms.segments import turns_to_tokens as turns_to_tokens
    from empg_jax.algorithms.surrogates import decoupled_ppo as decoupled_ppo
    from empg_jax.algorithms.surrogates import gspo as gspo
    from empg_jax.algorithms.surrogates import ppo_clip as ppo_clip
    from empg_jax.algorithms.surrogates import turn_ratio_clip as turn_ratio_clip
    from empg_jax.algorithms.theory import entropy_drift as entropy_drift
    from empg_jax.algorithms.theory import renyi2_entropy as renyi2_entropy
    from empg_jax.algorithms.theory import score_norm_sq as score_norm_sq
    from empg_jax.algorithms.turn_values import gagpo as gagpo
    from empg_jax.algorithms.turn_values import turn_gae as turn_gae

_HOMES = {
    "advantages": ("grpo", "grpo_turn_rows", "has_spread", "overlong_penalty", "reinforce", "rloo"),
    "aggregation": ("loss_weights",),
    "compose": ("Algorithm", "build"),
    "contract": ("LossResult", "Modulation", "Penalties", "TokenCredit", "Turns", "Worth"),
    "corrections": (
        "effective_sample_size",
        "entropy_ratio_mask",
        "mis_mask",
        "offpolicy_sequence_mask",
        "tis_weights",
    ),
    "describe": ("describe_recipe",),
    "entry": ("load_recipe",),
    "anchors": ("gigpo", "similarity_anchors"),
    "gains": ("a2tgpo", "igpo", "information_gains"),
    "graph": ("closure_values",),
    "graph_credit": ("crbc", "graft", "graph_gpo", "graph_hca"),
    "histories": ("hgpo",),
    "losses": ("cispo", "kl_penalty", "reinforce_loss", "sapo", "value_loss"),
    "masking": ("whiten",),
    "milestones": ("beacon",),
    "modulation": ("aem", "empg"),
    "part": ("Correction", "Part"),
    "recipe": ("Recipe",),
    "recipes": ("ALGORITHMS", "RECIPES", "make_algorithm", "make_recipe"),
    "returns": ("discounted_returns", "gae", "reinforce_pp"),
    "segments": ("compute_turn_entropies", "count_turn_tokens", "turns_to_tokens"),
    "surrogates": ("decoupled_ppo", "gspo", "ppo_clip", "turn_ratio_clip"),
    "turn_values": ("gagpo", "turn_gae"),
    "theory": ("entropy_drift", "renyi2_entropy", "score_norm_sq"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF, "parts"])
