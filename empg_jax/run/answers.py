"""The scores of known answers in a run, for algorithms that pay turns by them."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError
from empg_jax.learner.answers import score_answers
from empg_jax.learner.passes import Scorer
from empg_jax.rollout.thread import Delivery
from empg_jax.run.assembly import needs_answers
from empg_jax.run.environment import find_spec
from empg_jax.run.parts import Parts, RunState

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_answers(config: Config) -> None:
    """Refuse an algorithm that needs known answers where an environment of ours tells none.

    Raises:
      ConfigError: it tells none.
    """
    if needs_answers(config) and find_spec(config).tells_answers is False:
        raise ConfigError(_refusal(config))


def with_answers(parts: Parts, run: RunState, scorer: Scorer, delivery: Delivery) -> Delivery:
    """Score the known answer after every prompt of a delivery, where the algorithm needs it.

    Raises:
      ConfigError: there is no answer among the first episodes of a run.
    """
    config = parts.config
    if not needs_answers(config):
        return delivery
    if not run.update and all(trajectory.answer is None for trajectory in delivery.trajectories):
        raise ConfigError(_refusal(config))
    score = functools.partial(scorer.read_logprobs, run.state.params, run.reference)
    encode = parts.language.renderer.encode_answer
    scored = score_answers(delivery.trajectories, encode, parts.shape, score)
    return dataclasses.replace(delivery, trajectories=scored)


def _refusal(config: Config) -> str:
    source = f"env.{'entry_point' if config.env.entry_point else 'name'}={config.env.target}"
    if config.rollout.stored is not None:
        source = f"rollout.stored={config.rollout.stored}"
    return (
        f"algorithm.name={config.algorithm.name} pays turns by the probability of known answers, and "
        f"{source} has none; deepsearch has them (info['known_answer'] at the reset: the words that lead to "
        "an answer, and the answer)"
    )
