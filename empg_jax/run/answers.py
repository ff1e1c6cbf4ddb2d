"""The scores of known answers in a run, for algorithms that pay turns by them."""

from __future__ import annotations

import dataclasses
import functools

from empg_jax.errors import ConfigError
from empg_jax.learner.answers import score_answers
from empg_jax.learner.passes import Scorer
from empg_jax.rollout.thread import Delivery
from empg_jax.run.assembly import needs_answers
from empg_jax.run.parts import Parts, RunState


def with_answers(parts: Parts, run: RunState, scorer: Scorer, delivery: Delivery) -> Delivery:
    """Score the known answer after every prompt of a delivery, where the algorithm needs it.

    Raises:
      ConfigError: the environment tells no answers.
    """
    config = parts.config
    if not needs_answers(config):
        return delivery
    if all(trajectory.answer is None for trajectory in delivery.trajectories):
        raise ConfigError(
            f"algorithm.name={config.algorithm.name} pays turns by the probability of known answers, and "
            f"{config.env.target} tells none; deepsearch does (info['known_answer'] at the reset: the words "
            "that lead to an answer, and the answer)"
        )
    score = functools.partial(scorer.read_logprobs, run.state.params, run.reference)
    scored = score_answers(delivery.trajectories, parts.language.tokenizer.encode, parts.shape, score)
    return dataclasses.replace(delivery, trajectories=scored)
