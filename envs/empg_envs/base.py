"""The interfaces of environments, prompt builders and action parsers.

An environment reads and writes text: Gymnasium's ``reset`` and five-tuple ``step`` over strings, and a
listing of its task panels. Prompts and parsing are separate from the environment, so that it works with a
growing transcript and with a fresh windowed prompt. Nothing here depends on models, tokens or JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

Message = dict[str, str]


@runtime_checkable
class TextEnv(Protocol):
    """A text environment that plays one episode at a time.

    ``info`` contains only JSON-able values: ``task`` (the goal sentence), ``won`` (bool), and optionally
    ``admissible`` (sorted list of commands), ``metrics`` (dict of floats), and ``group`` (str), the kind of
    the task, for which success is also reported by itself, ``state`` (str), a key that tells states apart
    better than the observation does (``env.anchor=state``), and ``tools`` (list, as OpenAI's wire has them,
    the same through an episode): functions that the policy may call. The model's chat template tells them
    where it can, and every observation after the first is then the result of a call; elsewhere words in front
    of the prompt tell them. ``milestone`` (bool) tells that a step reached a subgoal. At the end of an
    episode it may name an ``outcome`` of its own (a word that is counted, in place of ``won``, ``ended`` or
    ``turn_limit``) and say more in ``detail``. At the start it may name a ``known_answer``, for the trainer
    alone: the words that lead to an answer in a response, and the answer. An environment with an expert also
    has the method ``expert_action(self) -> str``.

    What a class or an instance may declare besides (attributes, each true by default):

    ``replayable``: the same task, seed and actions give the same answers in another process. When a worker
    dies, its episodes are replayed in a new one; where this is false, they are lost at once. Such an instance
    is also closed and dropped when the caller ends its episode, because others may need what it holds.

    ``threads``: instances in several threads do not disturb each other. One instance is used by one thread
    at a time, but not always by the same one, and instances are built one at a time. Where this is false, a
    worker runs one command after another, and a slow one holds up its neighbors. Code that needs the main
    thread (``signal.signal``) must set it to false.

    ``bounded``: the worker may limit its address space, so that a leap of memory is a MemoryError. Programs
    that an environment starts inherit the limit; Node and Java do not start under it, so set it to false.

    An environment may have ``snapshot(self)``, which returns its state as JSON types, and ``restore(self,
    state)``, which brings a new instance into that state. They are used in place of a replay; ``snapshot`` is
    called after every reset and step, so it should be quick and small.
    """

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode of task ``index`` of ``split``; return its first observation and info."""
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out an action; return observation, reward, terminated, truncated, info.

        Every text is a valid argument: the environment defines a result even for nonsense.
        """
        ...

    def close(self) -> None:
        """Release the environment's resources; it may be called more than once."""
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


class EnvFault(Exception):
    """A failure of an episode with a name of its own, in place of ``env_error``.

    Args:
      reason: a short name, as it is counted in metrics and events.
      detail: what happened, for the user.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class PromptBuilder(Protocol):
    """A builder of chat messages from observations, for both context styles (transcript and window)."""

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return the first messages of a transcript; the last one is a user message."""
        ...

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the content of a transcript's next user message."""
        ...

    def window(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return a fresh prompt with a window of the last turns.

        Args:
          history: the last ``h`` pairs (observation, action), oldest first.
          observation: the current observation, which the model answers.
          info: the info of the current observation.
          turn: number of actions taken so far.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class ParsedAction:
    """The action in a model's response.

    Attributes:
      action: the text that is passed to ``step``; it may be nonsense if the response is not valid.
      is_valid: whether the response is well formed. A valid action may still be impossible in the current
        state.
    """

    action: str
    is_valid: bool


class ActionParser(Protocol):
    """A parser of the action in a model's response."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse a response; a malformed one gives ``is_valid=False`` and never an exception.

        An exception costs the episode, which is not trained on.
        """
        ...


@dataclasses.dataclass(frozen=True)
class EnvSpec:
    """The factories of an environment, its prompts, its parser and its vocabulary.

    Attributes:
      name: the key in ``ENVS``.
      make: builds the environment from ``env.options``.
      prompts: builds the prompt builder from those of ``env.prompt_options`` that its signature names.
      parser: likewise the action parser.
      phrases: returns the closed vocabulary for a small tokenizer, given ``env.options``; phrases may contain
        spaces. None for an environment without a closed vocabulary.
      has_calls: each observation is a call of a program, whose whole conversation is ``info["messages"]`` and
        whose tools are ``info["tools"]``; the prompt builder is not used.
      is_tried: one is built before a run, so that options which it refuses are told at once; that must be
        quick and start nothing.
      texts: prompt options that name a file of text, such as a template, whose content a run keeps.
      places: options of the environment that name files or folders, alone or inside lists and mappings. A run
        keeps the absolute paths of those that exist when it begins.
      tells_answers: its first info has a ``known_answer``; None where that is not known.
      timeout_outcome: treatment of an episode that exceeds its time: ``discard``, or ``zero`` where an agent
        could bring that about to be rid of a lost episode.
      check_turns: called with ``env.max_turns`` and ``env.options`` before a run; raises ValueError where
        they do not go together.
    """

    name: str
    make: Callable[..., TextEnv]
    prompts: Callable[..., PromptBuilder]
    parser: Callable[..., ActionParser]
    phrases: Callable[..., list[str]] | None = None
    has_calls: bool = False
    is_tried: bool = False
    texts: tuple[str, ...] = ()
    places: tuple[str, ...] = ()
    timeout_outcome: str = "discard"
    tells_answers: bool | None = None
    check_turns: Callable[..., None] | None = None


def quote_turns(history: Sequence[tuple[str, str]], turn: int) -> str:
    """Return a numbered line for each (observation, action) pair of the window before turn ``turn``."""
    return "\n".join(
        f"[Observation {number}: '{seen}', Action {number}: '{done}']"
        for number, (seen, done) in enumerate(history, start=turn - len(history) + 1)
    )


class PlainPrompts:
    """A prompt builder whose user messages are the bare observations.

    It is the base of other prompt builders, which override `start`, `follow` and `recall`.
    """

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
        """Return a fresh prompt: `start` at the first turn, `recall` at every later one."""
        return self.start(observation, info) if turn == 0 else self.recall(history, observation, info, turn)

    def recall(
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
        return [*messages, {"role": "user", "content": self.follow(observation, info)}]


def after_thought(response: str) -> str:
    """Return what follows the thought ``<think>…</think>`` of a response; all of it where there is none.

    A thought without an end is followed by nothing. The tag that opens it may be missing, because some chat
    templates write it into the prompt.
    """
    rest = response.rpartition("</think>")[2]
    return "" if rest.lstrip().startswith("<think>") else rest


def whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can escape and no file takes, by question marks."""
    return text.encode("utf-8", "replace").decode()


def first_line(response: str) -> str:
    """Return the first non-blank line behind the thought, stripped; empty where there is none."""
    lines = after_thought(response).strip().splitlines()
    return lines[0].strip() if lines else ""


class PlainParser:
    """A parser that takes the first non-blank line behind the thought; a response without one is invalid."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Return the first non-blank line as the action."""
        action = first_line(response)
        return ParsedAction(action=action, is_valid=bool(action))
