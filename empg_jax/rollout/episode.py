"""One episode: the steps from an observation to the next prompt, and the ways in which it ends.

An `Episode` takes the answers of environment and engine and returns the next prompt or action. It does no
input or output itself, so its rules can be read and tested without an environment or an engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from empg_envs.base import whole_characters
from empg_jax.engine.engine import Response
from empg_jax.errors import RunError
from empg_jax.rollout.context import EpisodeContext, PromptDelta
from empg_jax.types import Outcome, Status, Trajectory, Turn, share_prompts
from empg_jax.workers.faults import Tell

MAX_DETAIL = 500  # characters of a failure's text in the event log; full tracebacks would flood it


@dataclasses.dataclass(frozen=True, slots=True)
class Attempt:
    """One try at a task: member ``member`` of group ``group_id``; ``retry`` counts refills."""

    split: str
    task: int
    group_id: int
    member: int
    retry: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class EpisodeRules:
    """The limits that end an episode.

    Attributes:
      max_turns: responses after which the episode is truncated.
      timeout_outcome: treatment of an episode that exceeded its time: ``discard`` or ``zero`` (scored zero).
      anchor: what a state is told by: the ``observation``, or the environment's ``info["state"]``.
    """

    max_turns: int
    timeout_outcome: str = "discard"
    anchor: str = "observation"


class Episode:
    """The state of one attempt.

    Its methods raise `RunError` where the rules want a state that the environment does not tell.
    """

    def __init__(self, attempt: Attempt, context: EpisodeContext, parser: Any, rules: EpisodeRules) -> None:
        self.attempt = attempt
        self._context, self._parser, self._rules = context, parser, rules
        self._turns: list[Turn] = []
        self._observation = ""
        self._last: str | None = None  # the observation that the episode ended in
        self._last_anchor: int | None = None
        self._info: Mapping[str, Any] = {}
        self._answer: tuple[str, str] | None = None  # what leads to a known answer, and the answer
        self._action = ""
        self._is_valid = True
        self._response: Response | None = None
        self._text = ""

    @property
    def num_turns(self) -> int:
        """Number of responses so far."""
        return len(self._turns)

    @property
    def num_tokens(self) -> int:
        """Number of tokens sampled in the turns so far."""
        return sum(len(turn.response_tokens) for turn in self._turns)

    def on_reset(self, observation: str, info: Mapping[str, Any]) -> PromptDelta:
        """Take the environment's first observation; return the first prompt."""
        if "known_answer" in info:
            lead, answer = info["known_answer"]
            self._answer = (lead, answer)
            # Neither prompt nor parser sees it.
            info = {name: value for name, value in info.items() if name != "known_answer"}
        self._observation, self._info = observation, info
        return self._context.start(observation, info)

    def on_response(self, response: Response, text: str) -> str:
        """Take the policy's response; return the action for the environment."""
        parsed = self._parser(text, self._info)
        self._response, self._text = response, text
        self._action, self._is_valid = whole_characters(parsed.action), parsed.is_valid
        return self._action

    def on_step(
        self, observation: str, reward: float, terminated: bool, truncated: bool, info: Mapping[str, Any]
    ) -> PromptDelta | Trajectory:
        """Take the environment's answer; return the next prompt, or the finished trajectory."""
        response = self._take_response(reward, milestone=bool(info.get("milestone", False)))
        if terminated or truncated or len(self._turns) >= self._rules.max_turns:
            won = bool(info.get("won", False))
            usual = "won" if won else "ended" if terminated else "turn_limit"
            reason, detail = str(info.get("outcome", usual)), str(info.get("detail", ""))
            self._last, self._last_anchor = observation, self._key(observation, info)
            return self._finish(Status.TRAINED, reason, info, won, terminated, not terminated, detail=detail)
        delta = self._context.follow(
            response.tokens.tolist(),
            self._text,
            response.finish_reason == "stop",
            self._action,
            observation,
            info,
        )
        self._observation, self._info = observation, info
        return delta

    def on_context_limit(self) -> Trajectory:
        """End the episode as scored zero, because the next prompt leaves no room for a response."""
        self._last, self._last_anchor = self._observation, self._key(self._observation, self._info)
        return self._finish(Status.SCORED_ZERO, "context_limit", {}, False, False, True)

    def on_failure(self, reason: str, detail: str) -> Trajectory:
        """End the episode because the environment or its worker failed, or time ran out.

        Where an overrun is scored zero, the action that the environment was at counts among the turns: it may
        be the cause. Before the first action there is nothing to train on, so the episode is discarded.
        """
        is_zero = reason == "timeout" and self._rules.timeout_outcome == "zero"
        if is_zero and self._response is not None:
            self._take_response(0.0)
        if is_zero and self._turns:
            return self._finish(Status.SCORED_ZERO, reason, {}, False, False, True, detail=detail)
        return self._finish(Status.DISCARDED, reason, {}, False, False, True, detail=detail)

    def _take_response(self, reward: float, *, milestone: bool = False) -> Response:
        response = self._response
        assert response is not None, "the environment answered before the policy acted"
        self._turns.append(
            Turn(
                prompt_tokens=response.prompt_tokens,
                response_tokens=response.tokens,
                behavior_logprobs=response.logprobs,
                entropies=response.entropies,
                reward=float(reward),
                version=int(response.versions.min()),
                anchor=self._key(self._observation, self._info),
                is_valid=self._is_valid,
                finish_reason=response.finish_reason,
                observation=self._observation,
                response=self._text,
                versions=response.versions if np.ptp(response.versions) else None,
                action=self._action,
                milestone=milestone,
            )
        )
        self._response = None
        return response

    def _finish(
        self,
        status: Status,
        reason: str,
        info: Mapping[str, Any],
        won: bool,
        terminated: bool,
        truncated: bool,
        *,
        detail: str = "",
    ) -> Trajectory:
        return Trajectory(
            task=self.attempt.task,
            split=self.attempt.split,
            group_id=self.attempt.group_id,
            member=self.attempt.member,
            turns=share_prompts(self._turns),
            outcome=Outcome(status, reason, detail),
            episode_return=float(sum(turn.reward for turn in self._turns)),
            is_success=won,
            terminated=terminated,
            truncated=truncated,
            metrics={name: float(value) for name, value in (info.get("metrics") or {}).items()},
            # The task's kind is known from the start; an episode that a limit ends has no last info.
            group=str(self._info.get("group") or ""),
            last_anchor=self._last_anchor,
            last_observation=self._last or "",
            answer=self._answer,
        )

    def _key(self, observation: str, info: Mapping[str, Any]) -> int:
        """Return the key of the state that the policy is in."""
        if self._rules.anchor == "observation":
            return anchor_of(observation)
        if not isinstance(info.get("state"), str):
            raise RunError(
                f'env.anchor={self._rules.anchor}, but the environment tells no text as info["state"]: use '
                "env.anchor=observation"
            )
        return anchor_of(info["state"])


def tell_discarded(tell: Tell, attempt: Attempt, outcome: Outcome) -> None:
    """Record a discarded attempt in the run's event log."""
    tell(
        "episode_discarded",
        reason=outcome.reason,
        split=attempt.split,
        task=attempt.task,
        group_id=attempt.group_id,
        member=attempt.member,
        detail=outcome.detail[:MAX_DETAIL],
    )


def anchor_of(observation: str) -> int:
    """Hash an observation to 64 bits: equal texts have equal keys, in every process."""
    # Not Python's hash: it differs from process to process, and a resumed run must find the same keys.
    return int.from_bytes(hashlib.blake2b(observation.encode(), digest_size=8).digest(), "big")
