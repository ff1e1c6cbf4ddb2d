"""One episode of an environment in the terminal: a person, a file of actions, or the expert is the agent."""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from empg_envs import TextEnv, check_options, resolve_spec
from empg_envs.answers import GarbageError, check_answer, describe
from empg_jax.config.yaml import apply_override
from empg_jax.errors import ConfigError, RunError, first_line, nearest

WIDTH = 110
HOW = "Type an action, or the number of one; a line that ends in \\ goes on in the next; Ctrl-D leaves."

Say = Callable[[str], None]


def play_episode(
    target: str,
    options: Sequence[str],
    *,
    split: str | None,
    task: int | None,
    seed: int,
    is_expert: bool,
    say: Say,
) -> None:
    """Play one episode and tell of every turn and of the outcome.

    Args:
      target: name or entry point of the environment.
      options: its options as ``key=value``, also spelled ``env.options.key=value``.
      split: panel of tasks (default: the environment's first).
      task: number of the task (default: drawn with ``seed``).
      seed: seed of the episode.
      is_expert: whether the environment's expert acts. Else actions are read from stdin, a line each.
      say: receives the lines to show.

    Raises:
      ConfigError: there is no such environment, option, panel or task, or it has no expert.
      RunError: the environment fails.
    """
    values: dict[str, Any] = {}
    for option in options:
        apply_override(values, option.removeprefix("env.options."))
    with open_env(target, values) as env:
        where = choose_task(env, target, split, task, seed)
        if is_expert and not hasattr(env, "expert_action"):
            raise ConfigError(f"--expert: environment {target} has no expert (no expert_action method)")
        agent = _Expert(env, target, say) if is_expert else _Person(say)
        play_task(env, target, where, agent, seed=seed, say=say)


class Agent(Protocol):
    """Whoever acts in an episode."""

    def start(self) -> None:
        """Tell how to act, before the first observation is shown."""
        ...

    def act(self, observation: str, info: Mapping[str, Any]) -> str | None:
        """Return an action and show it, where nobody sees it yet; None ends the episode."""
        ...


class _Person:
    """Somebody at the keyboard, or a file of actions."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def start(self) -> None:
        self._say(HOW)

    def act(self, observation: str, info: Mapping[str, Any]) -> str | None:
        action = _read_action(info.get("admissible") or ())
        if action is not None and not sys.stdin.isatty():
            self._say(f"> {plain(action)}")
        return action


class _Expert:
    def __init__(self, env: TextEnv, target: str, say: Say) -> None:
        self._env, self._target, self._say = env, target, say

    def start(self) -> None:
        pass

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        with _failing(self._target, "when its expert was asked"):
            action = str(self._env.expert_action())  # type: ignore[attr-defined]
        self._say(f"> {plain(action)}")
        return action


def play_task(
    env: TextEnv, target: str, where: tuple[str, int], agent: Agent, *, seed: int, say: Say
) -> None:
    """Play an episode from its reset to its end.

    Args:
      env: the environment.
      target: its name in messages.
      where: panel and task.
      agent: acts.
      seed: of the episode.
      say: receives the lines to show.

    Raises:
      RunError: the environment fails.
    """
    split, task = where
    with _failing(target, f"at the start of task {split}/{task}"):
        observation, info = env.reset(seed, split=split, index=task)
        _check_answer(observation, 0.0, False, False, info)
    say(f"{target}, task {task} of {split}: {plain(str(info.get('task', '')))}")
    agent.start()
    total, turns = 0.0, 0
    while True:
        _show(observation, info, say)
        action = agent.act(observation, info)
        if action is None:
            say(f"left after {_count(turns)}, return {total:g}: there is no further action")
            return
        with _failing(target, f"at action {turns + 1}"):
            observation, reward, terminated, truncated, info = env.step(action)
            _check_answer(observation, reward, terminated, truncated, info)
        total, turns = total + float(reward), turns + 1
        if terminated or truncated:
            break
    _show(observation, {}, say)
    won = bool(info.get("won", False))
    verdict = "won" if won else "not won" if terminated else "out of turns"
    say(f"{verdict} after {_count(turns)}, return {total:g}")
    if info.get("metrics"):
        say(", ".join(f"{name} {float(value):g}" for name, value in info["metrics"].items()))


def build_env(target: str, values: Mapping[str, Any]) -> TextEnv:
    """Build an environment with options.

    Raises:
      ConfigError: it does not exist, refuses an option, or misses data or programs.
    """
    try:
        spec = resolve_spec(target)
        check_options(spec, values)
        return spec.make(**values)
    except Exception as error:  # an option of the wrong kind, data or programs that are not here
        raise ConfigError(f"{target}: {' '.join(str(error).split())}") from None


@contextlib.contextmanager
def open_env(target: str, values: Mapping[str, Any]) -> Iterator[TextEnv]:
    """Build an environment, and close it in the end; like a worker, pass over what ``close`` raises.

    Raises:
      ConfigError: see `build_env`.
    """
    env = build_env(target, values)
    try:
        yield env
    finally:
        with contextlib.suppress(Exception):
            env.close()


def choose_task(env: TextEnv, target: str, split: str | None, task: int | None, seed: int) -> tuple[str, int]:
    """Return panel and task: the first panel and a drawn task, where they are not given.

    Args:
      env: the environment.
      target: its name in messages.
      split: panel of tasks, if chosen.
      task: number of the task, if chosen.
      seed: draws the task.

    Raises:
      ConfigError: there is no such panel or task, or there are none.
      RunError: the environment fails.
    """
    with _failing(target, "when asked for its splits"):
        splits = list(env.list_splits())
    if not splits:
        raise ConfigError(f"environment {target} has no tasks: its list_splits() is empty")
    if split is not None and split not in splits:
        raise ConfigError(f"--split {split}: unknown{nearest(split, splits)}; choose {', '.join(splits)}")
    split = splits[0] if split is None else split
    with _failing(target, f"when asked for the number of tasks of {split}"):
        count = operator.index(env.num_tasks(split))
    if count < 1:
        raise ConfigError(
            f"environment {target} has no tasks in {split}: its num_tasks({split!r}) is {count}"
        )
    if task is None:
        return split, random.Random(seed).randrange(count)
    if not 0 <= task < count:
        raise ConfigError(f"--task {task}: {split} has the tasks 0 to {count - 1}")
    return split, task


def _check_answer(observation: Any, reward: Any, terminated: Any, truncated: Any, info: Any) -> None:
    """Check an answer as a worker does, and the actions that are offered.

    Raises:
      GarbageError: a part has the wrong type.
    """
    check_answer(observation, reward, terminated, truncated, info)
    offered = info.get("admissible") or ()
    if not isinstance(offered, (list, tuple)) or not all(isinstance(each, str) for each in offered):
        raise GarbageError(f"info['admissible'] is {describe(offered)}; expected a list of texts")


def _show(observation: str, info: Mapping[str, Any], say: Say) -> None:
    say(f"\n{plain(observation)}")
    if actions := info.get("admissible"):
        offered = "  ".join(f"[{number}] {plain(each)}" for number, each in enumerate(actions, start=1))
        say(textwrap.fill(offered, WIDTH, break_long_words=False, break_on_hyphens=False))


def _read_action(admissible: Sequence[str]) -> str | None:
    """Read an action from stdin, by its words or by its number; None at the end of the input."""
    lines: list[str] = []
    while True:
        line = read_line("> " if not lines else "  ")
        if line is None:
            return "\n".join(lines) or None
        if line.endswith("\\"):
            lines.append(line[:-1])
        elif lines or line.strip():  # an empty line is no action
            action = "\n".join([*lines, line])
            is_number = action.isdecimal() and action not in admissible
            return (
                admissible[int(action) - 1] if is_number and 1 <= int(action) <= len(admissible) else action
            )


def read_line(prompt: str) -> str | None:
    """Read a line from stdin, with a prompt where a person types; None at its end."""
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


@contextlib.contextmanager
def _failing(target: str, when: str) -> Iterator[None]:
    """Turn whatever an environment raises into one message."""
    try:
        yield
    except Exception as error:
        what = str(error) if isinstance(error, GarbageError) else first_line(error)
        raise RunError(f"environment {target} failed {when}: {what}") from error


def plain(text: str) -> str:
    """Show control characters, which could write elsewhere on the terminal, as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _count(turns: int) -> str:
    return "1 action" if turns == 1 else f"{turns} actions"
