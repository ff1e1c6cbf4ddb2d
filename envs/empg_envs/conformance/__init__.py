"""What every environment must do: for our own tests, and for ``empg-jax check-env``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from empg_envs.conformance import checks
from empg_envs.conformance.subject import Subject

__all__ = ["CHECKS", "Check", "Result", "Subject", "run_checks"]


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of an environment.

    Attributes:
      run: the check.
      advice: what to do where it fails.
      is_required: whether training relies on it.
    """

    run: Callable[[Subject], None]
    advice: str
    is_required: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check found: no message where it passed."""

    name: str
    check: Check
    message: str = ""


def run_checks(subject: Subject) -> Iterator[Result]:
    """Run all checks; whatever an environment raises is a finding."""
    for name, check in CHECKS.items():
        try:
            check.run(subject)
        except AssertionError as error:
            yield Result(name, check, str(error) or checks.place_of(error))
        except Exception as error:
            yield Result(name, check, f"{type(error).__name__}: {error}{checks.place_of(error)}")
        else:
            yield Result(name, check)


CHECKS = {
    "types of everything that crosses": Check(
        checks.check_types,
        "return the types that empg_envs.base.TextEnv names; info and tasks hold JSON values only",
    ),
    "two instances agree": Check(
        checks.check_repetition,
        "draw only from generators that split, index and seed decide; or declare replayable = False, and "
        "episodes are lost with their worker",
    ),
    "another process agrees": Check(
        checks.check_other_process,
        "sort what comes out of sets, and use neither hash() nor the clock; import heavy packages nowhere",
    ),
    "an instance forgets its last episode": Check(
        checks.check_forgetting, "set every attribute anew in reset()"
    ),
    "episodes at the same time stay apart": Check(
        checks.check_live_episodes,
        "a worker holds many episodes at a time: keep what one changes on its instance, not on the class or "
        "in the module",
    ),
    "episodes in threads stay apart": Check(
        checks.check_threads,
        "share nothing between instances that threads cannot share; or declare threads = False",
    ),
    "a snapshot restores an episode": Check(
        checks.check_snapshots,
        "put all that an episode changes into snapshot(), as JSON values, and let restore() set it in a new "
        "instance; or leave both out",
    ),
    "every text gets a reply": Check(
        checks.check_any_text, "the policy may say anything: answer nonsense with an observation and reward 0"
    ),
    "the parser takes every response": Check(
        checks.check_parser, "return ParsedAction(text, False) for a response without an action"
    ),
    "prompts end with the user": Check(
        checks.check_prompts, "messages are {'role', 'content'}, and the last one is the user's"
    ),
    "splits share no task": Check(
        checks.check_splits, "make content_hash of what the task is, and hold tasks out by it"
    ),
    "close twice": Check(checks.check_closing, "let close() check what is still open"),
    "the seed decides a reset without an index": Check(
        checks.check_seeds, "draw the index from a generator that reset(seed) seeds", is_required=False
    ),
    "steps without an episode are refused": Check(
        checks.check_order,
        "raise RuntimeError('... call reset first') there, and end every episode",
        is_required=False,
    ),
    "unknown tasks are refused by name": Check(
        checks.check_unknown_tasks,
        "raise ValueError with the splits, and IndexError with the number of tasks",
        is_required=False,
    ),
    "the expert wins": Check(
        checks.check_expert,
        "a warm start learns from expert_action(): let it win, for a return of 1",
        is_required=False,
    ),
}
