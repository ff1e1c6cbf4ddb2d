"""A look at the observations of a run: what makes them mean other things than they say is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from empg_jax.algorithms.recipe import compares_states
from empg_jax.run.assembly import make_recipe_from
from empg_jax.text.tokenizer import Tokenizer
from empg_jax.workers.faults import Tell

if TYPE_CHECKING:
    from empg_jax.config import Config

_MOST_STATES = 1 << 16  # kept at once


class Observer:
    """Tells of control tokens in observations, and of observations that stand for several states.

    The latter matters to credit that compares states: the values of all of them become one. It is found
    where observations are compared (``env.anchor=observation``) and the environment tells states apart better
    (``info["state"]``).
    """

    def __init__(self, config: Config, tokenizer: Tokenizer, tell: Tell, *, for_credit: bool) -> None:
        """Set whose observations are looked at, who is told, and whether credit is given for the episodes."""
        self._target, self._tokenizer, self._tell = config.env.target, tokenizer, tell
        self._name = config.algorithm.name
        by_text = config.env.anchor == "observation" and compares_states(make_recipe_from(config).estimate)
        self._compares = for_credit and by_text
        self._states: dict[tuple[int, str], Any] = {}  # by group and observation

    def __call__(self, group_id: int, observation: str, info: Mapping[str, Any]) -> None:
        """Look at an observation of an attempt of a group."""
        self._look_for_control(observation)
        if self._compares and "state" in info:
            self._compare_states(group_id, observation, info["state"])

    def _look_for_control(self, observation: str) -> None:
        if (found := self._tokenizer.find_control(observation)) is None:
            return
        token, start = found
        place = observation[max(0, start - 20) : start + len(token) + 20]
        detail = (
            f"an observation of {self._target} holds {token}, which the model reads as a control token, not "
            f"as text: {place!r}, at character {start}"
        )
        self._tell("control_token_observed", environment=self._target, token=token, detail=detail)

    def _compare_states(self, group_id: int, observation: str, state: Any) -> None:
        if len(self._states) >= _MOST_STATES:
            self._states.clear()
        if self._states.setdefault((group_id, observation), state) == state:
            return
        detail = (
            f"{self._target} says {observation[:60]!r} in several states of a task, and "
            f"algorithm.name={self._name} takes them for one: env.anchor=state tells them apart"
        )
        self._tell("states_merged", environment=self._target, observation=observation[:60], detail=detail)
        self._compares = False
        self._states.clear()
