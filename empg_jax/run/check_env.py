"""`empg-jax check-env`: the conformance suite on a user's environment, told line by line. Starts no JAX."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from empg_envs import check_options, resolve_spec
from empg_envs.conformance import Subject, run_checks
from empg_jax.config.yaml import apply_override, check_option
from empg_jax.errors import ConfigError

WIDTH = 110


def check_env(target: str, options: Sequence[str], episodes: int, say: Callable[[str], None]) -> bool:
    """Check an environment, and tell of every check whether it passed, or what to do.

    Args:
      target: name or entry point of the environment.
      options: its options as ``key=value``, also spelled ``env.options.key=value``; those of its prompts as
        ``env.prompt_options.key=value``.
      episodes: number of tasks of each split that are played.
      say: receives the lines to show.

    Returns:
      Whether all passed that training relies on.

    Raises:
      ConfigError: there is no such environment or option, or the environment cannot be built.
    """
    values: dict[str, Any] = {}
    for option in options:
        check_option(option)
        is_full = option.startswith(("env.options.", "env.prompt_options."))
        apply_override(values, option if is_full else f"env.options.{option}")
    env = values.get("env", {})
    subject = Subject(target, env.get("options", {}), env.get("prompt_options", {}), episodes)
    _build(subject)
    failed = advised = 0
    for result in run_checks(subject):
        if not result.message:
            say(f"pass    {result.name}")
            continue
        failed, advised = failed + result.check.is_required, advised + (not result.check.is_required)
        say(f"{'FAIL' if result.check.is_required else 'advice':6}  {result.name}")
        for word, text in (("found", result.message), ("do", result.check.advice)):
            indent = f"        {word}: "
            # A message may quote the environment's own text, so it is one paragraph here.
            say(
                textwrap.fill(
                    " ".join(text.split()), WIDTH, initial_indent=indent, subsequent_indent=" " * 10
                )
            )
    say(f"{target}: {_count(failed, 'failure')}, {_count(advised, 'piece')} of advice")
    return not failed


def _build(subject: Subject) -> None:
    """Build the environment once.

    Raises:
      ConfigError: it cannot be built.
    """
    try:
        spec = resolve_spec(subject.target)
        check_options(spec, subject.options, subject.prompt_options)
        subject.make().close()
    except Exception as error:  # the user's own code
        message = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{subject.target}: {message}") from None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
