"""One episode of an environment in the terminal: a person, a file of actions, or the expert is the agent."""

from __future__ import annotations

import contextlib
import random
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from empg_envs import TextEnv, check_options, resolve_spec
from empg_jax.config.yaml import apply_override
from empg_jax.errors import ConfigError, RunError, nearest

WIDTH = 110
HOW = "Type an action, or the number of one; a line that ends in \\ goes on in the next; Ctrl-D leaves."


def play_episode(
    target: str,
    options: Sequence[str],
    *,
    split: str | None,
    task: int | None,
    seed: int,
    is_expert: bool,
    say: Callable[[str], None],
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
    env = _make(target, options)
    try:
        split, task = _choose(env, split, task, seed)
        if is_expert and not hasattr(env, "expert_action"):
            raise ConfigError(f"--expert: environment {target} has no expert (no expert_action method)")
        with _failing(target, f"at the start of task {split}/{task}"):
            observation, info = env.reset(seed, split=split, index=task)
        say(f"{target}, task {task} of {split}: {_plain(str(info.get('task', '')))}")
        if not is_expert:
            say(HOW)
        _play(env, target, observation, info, is_expert, say)
    finally:
        env.close()


def _play(
    env: TextEnv,
    target: str,
    observation: str,
    info: Mapping[str, Any],
    is_expert: bool,
    say: Callable[[str], None],
) -> None:
    """Play from the first observation to the end."""
    total, turns = 0.0, 0
    while True:
        _show(observation, info, say)
        action = _ask_expert(env, target) if is_expert else _read_action(info.get("admissible") or ())
        if action is None:
            say(f"left after {_count(turns)}, return {total:g}: there is no further action")
            return
        if is_expert or not sys.stdin.isatty():
            say(f"> {_plain(action)}")
        with _failing(target, f"at action {turns + 1}"):
            observation, reward, terminated, truncated, info = env.step(action)
        total, turns = total + float(reward), turns + 1
        if terminated or truncated:
            break
    _show(observation, {}, say)
    won = bool(info.get("won", False))
    verdict = "won" if won else "not won" if terminated else "out of turns"
    say(f"{verdict} after {_count(turns)}, return {total:g}")
    if info.get("metrics"):
        say(", ".join(f"{name} {value:g}" for name, value in info["metrics"].items()))


def _make(target: str, options: Sequence[str]) -> TextEnv:
    values: dict[str, Any] = {}
    for option in options:
        apply_override(values, option.removeprefix("env.options."))
    try:
        spec = resolve_spec(target)
        check_options(spec, values)
        return spec.make(**values)
    except Exception as error:  # an option of the wrong kind, data or programs that are not here
        raise ConfigError(f"{target}: {' '.join(str(error).split())}") from None


def _choose(env: TextEnv, split: str | None, task: int | None, seed: int) -> tuple[str, int]:
    """Return panel and task; check that they exist."""
    splits = env.list_splits()
    if split is not None and split not in splits:
        raise ConfigError(f"--split {split}: unknown{nearest(split, splits)}; choose {', '.join(splits)}")
    split = splits[0] if split is None else split
    count = env.num_tasks(split)
    if task is None:
        return split, random.Random(seed).randrange(count)
    if not 0 <= task < count:
        raise ConfigError(f"--task {task}: {split} has the tasks 0 to {count - 1}")
    return split, task


def _show(observation: str, info: Mapping[str, Any], say: Callable[[str], None]) -> None:
    say(f"\n{_plain(observation)}")
    if actions := info.get("admissible"):
        offered = "  ".join(f"[{number}] {_plain(each)}" for number, each in enumerate(actions, start=1))
        say(textwrap.fill(offered, WIDTH, break_long_words=False, break_on_hyphens=False))


def _read_action(admissible: Sequence[str]) -> str | None:
    """Read an action from stdin, by its words or by its number; None at the end of the input."""
    lines: list[str] = []
    while True:
        line = _read_line("> " if not lines else "  ")
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


def _read_line(prompt: str) -> str | None:
    if sys.stdin.isatty():
        try:
            return input(prompt)
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _ask_expert(env: TextEnv, target: str) -> str:
    with _failing(target, "when its expert was asked"):
        return str(env.expert_action())  # type: ignore[attr-defined]


@contextlib.contextmanager
def _failing(target: str, when: str) -> Iterator[None]:
    """Turn whatever an environment raises into one message."""
    try:
        yield
    except Exception as error:
        raise RunError(f"environment {target} failed {when}: {type(error).__name__}: {error}") from error


def _plain(text: str) -> str:
    """Show control characters, which could write elsewhere on the terminal, as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _count(turns: int) -> str:
    return "1 action" if turns == 1 else f"{turns} actions"
