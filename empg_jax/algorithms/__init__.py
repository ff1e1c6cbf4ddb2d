"""Credit assignment and objectives for multi-turn agents: pure JAX, arrays in and out.

The functions stand alone in any JAX loop; `make_algorithm` composes them into the pair that a learner
executes.
"""

from empg_jax.algorithms.advantages import grpo as grpo
from empg_jax.algorithms.advantages import grpo_turn_rows as grpo_turn_rows
from empg_jax.algorithms.advantages import has_spread as has_spread
from empg_jax.algorithms.advantages import overlong_penalty as overlong_penalty
from empg_jax.algorithms.advantages import reinforce as reinforce
from empg_jax.algorithms.advantages import rloo as rloo
from empg_jax.algorithms.aggregation import loss_weights as loss_weights
from empg_jax.algorithms.clipped import decoupled_ppo as decoupled_ppo
from empg_jax.algorithms.clipped import gspo as gspo
from empg_jax.algorithms.clipped import ppo_clip as ppo_clip
from empg_jax.algorithms.clipped import turn_ratio_clip as turn_ratio_clip
from empg_jax.algorithms.compose import Algorithm as Algorithm
from empg_jax.algorithms.compose import build as build
from empg_jax.algorithms.corrections import effective_sample_size as effective_sample_size
from empg_jax.algorithms.corrections import mis_mask as mis_mask
from empg_jax.algorithms.corrections import offpolicy_sequence_mask as offpolicy_sequence_mask
from empg_jax.algorithms.corrections import tis_weights as tis_weights
from empg_jax.algorithms.gigpo import gigpo as gigpo
from empg_jax.algorithms.gigpo import similarity_anchors as similarity_anchors
from empg_jax.algorithms.losses import cispo as cispo
from empg_jax.algorithms.losses import kl_penalty as kl_penalty
from empg_jax.algorithms.losses import reinforce_loss as reinforce_loss
from empg_jax.algorithms.losses import sapo as sapo
from empg_jax.algorithms.losses import value_loss as value_loss
from empg_jax.algorithms.masking import whiten as whiten
from empg_jax.algorithms.modulation import aem as aem
from empg_jax.algorithms.modulation import empg as empg
from empg_jax.algorithms.objectives import OBJECTIVES as OBJECTIVES
from empg_jax.algorithms.recipe import AemSettings as AemSettings
from empg_jax.algorithms.recipe import Correction as Correction
from empg_jax.algorithms.recipe import CriticSettings as CriticSettings
from empg_jax.algorithms.recipe import EmpgSettings as EmpgSettings
from empg_jax.algorithms.recipe import Recipe as Recipe
from empg_jax.algorithms.recipes import ALGORITHMS as ALGORITHMS
from empg_jax.algorithms.recipes import make_algorithm as make_algorithm
from empg_jax.algorithms.returns import discounted_returns as discounted_returns
from empg_jax.algorithms.returns import gae as gae
from empg_jax.algorithms.returns import reinforce_pp as reinforce_pp
from empg_jax.algorithms.segments import compute_turn_entropies as compute_turn_entropies
from empg_jax.algorithms.segments import count_turn_tokens as count_turn_tokens
from empg_jax.algorithms.segments import turns_to_tokens as turns_to_tokens
from empg_jax.algorithms.theory import entropy_drift as entropy_drift
from empg_jax.algorithms.theory import renyi2_entropy as renyi2_entropy
from empg_jax.algorithms.theory import score_norm_sq as score_norm_sq
