"""The factories of a recipe's parts; each returns a bound pure function.

::

    Recipe(estimate=parts.gigpo(omega=1.0), modulate=parts.empg(zeta=0.05), correct=parts.tis(cap=2.0))

Their keywords are the keys of a configuration and their docstrings its help. Defaults that a pure function
has are read from it (`default_of`).
"""

from empg_jax.algorithms.parts.aggregate import seq_mean_token_const as seq_mean_token_const
from empg_jax.algorithms.parts.aggregate import seq_mean_token_mean as seq_mean_token_mean
from empg_jax.algorithms.parts.aggregate import seq_mean_token_sum as seq_mean_token_sum
from empg_jax.algorithms.parts.aggregate import seq_mean_token_sum_norm as seq_mean_token_sum_norm
from empg_jax.algorithms.parts.aggregate import token_mean as token_mean
from empg_jax.algorithms.parts.correct import entropy_ratio as entropy_ratio
from empg_jax.algorithms.parts.correct import mis as mis
from empg_jax.algorithms.parts.correct import sequence_mask as sequence_mask
from empg_jax.algorithms.parts.correct import tis as tis
from empg_jax.algorithms.parts.estimate import gigpo as gigpo
from empg_jax.algorithms.parts.estimate import grpo as grpo
from empg_jax.algorithms.parts.estimate import grpo_turn_rows as grpo_turn_rows
from empg_jax.algorithms.parts.estimate import ppo as ppo
from empg_jax.algorithms.parts.estimate import reinforce as reinforce
from empg_jax.algorithms.parts.estimate import reinforce_pp as reinforce_pp
from empg_jax.algorithms.parts.estimate import rloo as rloo
from empg_jax.algorithms.parts.keep import drop_uniform as drop_uniform
from empg_jax.algorithms.parts.keep import drop_void as drop_void
from empg_jax.algorithms.parts.keep import mask_truncated as mask_truncated
from empg_jax.algorithms.parts.modulate import aem as aem
from empg_jax.algorithms.parts.modulate import empg as empg
from empg_jax.algorithms.parts.objective import cispo as cispo
from empg_jax.algorithms.parts.objective import decoupled_ppo as decoupled_ppo
from empg_jax.algorithms.parts.objective import gspo as gspo
from empg_jax.algorithms.parts.objective import ppo_clip as ppo_clip
from empg_jax.algorithms.parts.objective import reinforce_loss as reinforce_loss
from empg_jax.algorithms.parts.objective import sapo as sapo
from empg_jax.algorithms.parts.objective import turn_ratio_clip as turn_ratio_clip
from empg_jax.algorithms.parts.penalise import overlong as overlong
from empg_jax.algorithms.parts.penalise import turn_penalty as turn_penalty
from empg_jax.algorithms.parts.regularize import critic as critic
from empg_jax.algorithms.parts.regularize import kl as kl
from empg_jax.algorithms.parts.stepwise import a2tgpo as a2tgpo
from empg_jax.algorithms.parts.stepwise import beacon as beacon
from empg_jax.algorithms.parts.stepwise import crbc as crbc
from empg_jax.algorithms.parts.stepwise import gagpo as gagpo
from empg_jax.algorithms.parts.stepwise import graft as graft
from empg_jax.algorithms.parts.stepwise import graph_gpo as graph_gpo
from empg_jax.algorithms.parts.stepwise import graph_hca as graph_hca
from empg_jax.algorithms.parts.stepwise import hgpo as hgpo
from empg_jax.algorithms.parts.stepwise import igpo as igpo
from empg_jax.algorithms.parts.stepwise import turn_ppo as turn_ppo
