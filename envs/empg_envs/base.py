"""What every environment, prompt builder and action parser looks like.

An environment talks text: Gymnasium's reset and five-tuple step over strings, plus a listing of its
task panels. Prompts and parsing stand beside an engine, never inside it, so that one engine serves a
growing transcript and a fresh windowed prompt alike. Nothing here knows of models, tokens or JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Message = dict[str, str]


@runtime_checkable
class TextEnv(Protocol):
    """One episode at a time, text in and text out.

    ``info`` holds JSON-able values only: ``task`` (the goal sentence), ``won`` (bool), optionally
    ``admissible`` (sorted list of commands) and ``metrics`` (dict of floats). An environment that has
    an expert also offers ``expert_action(self) -> str``.
    """

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode of task ``index`` of ``split``; return its first observation and info."""
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return observation, reward, terminated, truncated, info. Any text is a defined action."""
        ...

    def close(self) -> None:
        """Release what the environment holds; may be called more than once."""
        ...

    def list_splits(self) -> list[str]:
        """Return the names of the task panels."""
        ...

    def num_tasks(self, split: str) -> int:
        """Return the number of tasks of a panel."""
        ...

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a JSON-able description of one task, with its ``content_hash``."""
        ...


class PromptBuilder(Protocol):
    """Turns observations into chat messages, for either context style."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Transcript style: the first messages, ending with a user message."""
        ...

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Transcript style: content of the next user message."""
        ...

    def window(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Window style: a fresh prompt.

        Args:
          history: the last ``h`` pairs (observation, action), oldest first.
          observation: what is to be answered now.
          info: the info that came with the observation.
          turn: number of actions taken so far.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a response means to the environment.

    Attributes:
      action: the text handed to ``step``; may be nonsense when not valid.
      is_valid: whether the response is well formed (it need not be admissible in the current state).
    """

    action: str
    is_valid: bool


class ActionParser(Protocol):
    """Reads the action out of a model's response."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Never raises; a malformed response gives ``is_valid=False``."""
        ...


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """An environment with what stands beside it.

    Attributes:
      name: the key in ``ENVS``.
      make: builds the environment from ``env.options``.
      prompts: builds the prompt builder from ``env.prompt_options``.
      parser: builds the action parser from ``env.prompt_options``.
      phrases: from ``env.options``, the closed vocabulary for a small tokenizer (phrases may hold
        spaces); None where there is none.
    """

    name: str
    make: Callable[..., TextEnv]
    prompts: Callable[..., PromptBuilder]
    parser: Callable[..., ActionParser]
    phrases: Callable[..., list[str]] | None = None


def quote_turns(history: Sequence[tuple[str, str]], turn: int) -> str:
    """Return the remembered (observation, action) pairs before turn ``turn`` (from 0): a numbered line each."""
    return "\n".join(
        f"[Observation {number}: '{seen}', Action {number}: '{done}']"
        for number, (seen, done) in enumerate(history, start=turn - len(history) + 1)
    )


class PlainPrompts:
    """The observation is the user message, and nothing else is said."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return one user message: the observation."""
        return [{"role": "user", "content": observation}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation."""
        return observation

    def window(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return the remembered turns as user and assistant messages, then the observation."""
        messages = []
        for past_observation, past_action in history:
            messages.append({"role": "user", "content": past_observation})
            messages.append({"role": "assistant", "content": past_action})
        return [*messages, {"role": "user", "content": observation}]


class PlainParser:
    """The stripped first line of the response is the action; an empty one is invalid."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the first line that is not blank."""
        lines = response.strip().splitlines()
        action = lines[0].strip() if lines else ""
        return ParsedAction(action=action, is_valid=bool(action))
