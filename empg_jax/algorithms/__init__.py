"""Credit assignment and objectives for multi-turn agents: pure JAX, arrays in and out.

The functions stand alone; `make_algorithm` composes them into the pair that a learner executes.
"""

from empg_jax.algorithms.advantages import grpo as grpo
from empg_jax.algorithms.advantages import rloo as rloo
from empg_jax.algorithms.compose import Algorithm as Algorithm
from empg_jax.algorithms.compose import Recipe as Recipe
from empg_jax.algorithms.compose import build as build
from empg_jax.algorithms.losses import kl_penalty as kl_penalty
from empg_jax.algorithms.losses import loss_weights as loss_weights
from empg_jax.algorithms.losses import ppo_clip as ppo_clip
from empg_jax.algorithms.masking import compute_turn_entropies as compute_turn_entropies
from empg_jax.algorithms.masking import count_turn_tokens as count_turn_tokens
from empg_jax.algorithms.masking import turns_to_tokens as turns_to_tokens
from empg_jax.algorithms.modulation import aem as aem
from empg_jax.algorithms.modulation import empg as empg
from empg_jax.algorithms.objectives import OBJECTIVES as OBJECTIVES
from empg_jax.algorithms.recipes import ALGORITHMS as ALGORITHMS
from empg_jax.algorithms.recipes import make_algorithm as make_algorithm
