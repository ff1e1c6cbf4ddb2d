"""One trial of a patch: what is run, and what follows from the outcome."""

from __future__ import annotations

import dataclasses
import logging
import random
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from empg_envs.swe import grading
from empg_envs.swe.grading import Grade
from empg_envs.swe.judge import canaries, second, sessions
from empg_envs.swe.judge.canaries import Planted
from empg_envs.swe.judge.second import SecondBug, SecondTree
from empg_envs.swe.sandbox import ExecResult
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import Tree

_log = logging.getLogger(__name__)

OUTPUT_CHARS = 4000
OTHERS = 1  # tests with twins besides those that the patch has to repair
LAYERS = frozenset(("reading", "canaries", "second", "sessions"))


class Outcome(Protocol):
    """What came of one session, whatever the channel of its statuses."""

    @property
    def is_sound(self) -> bool:
        """Whether the session ran its tests to the end."""
        ...

    @property
    def statuses(self) -> Mapping[str, str]:
        """Status of each test."""
        ...


@dataclasses.dataclass(frozen=True)
class Trial:
    """The sessions of one trial, with their secrets.

    Attributes:
      planted: the tree of the first session.
      second: the tree of the second session, if there is one.
      unfit: number of second bugs that were given, where none of them fits into the tree.
      places: folder name of each session's tree.
      nonces: secret of each session.
      end: secret of the report.
      is_reversed: whether the second session runs first.
    """

    planted: Planted
    second: SecondTree | None
    unfit: int = 0
    places: tuple[str, str] = dataclasses.field(default_factory=lambda: (_secret(), _secret()))
    nonces: tuple[str, str] = dataclasses.field(default_factory=lambda: (_secret(), _secret()))
    end: str = dataclasses.field(default_factory=lambda: _secret())
    is_reversed: bool = dataclasses.field(default_factory=lambda: secrets.randbelow(2) == 1)

    @property
    def tree(self) -> Tree:
        """The files of all sessions, each tree in its folder."""
        trees = [self.planted.tree] if self.second is None else [self.planted.tree, self.second.tree]
        return {
            f"{place}/{path}": file
            for place, tree in zip(self.places, trees, strict=False)
            for path, file in tree.items()
        }

    @property
    def reds(self) -> list[str]:
        """Ids under which the tests of the second session run."""
        return [] if self.second is None else [self.planted.reported(name) for name in self.second.red]


def prepare(
    task: Task, tree: Tree, bugs: Sequence[SecondBug], draw: random.Random, layers: frozenset[str] = LAYERS
) -> Trial:
    """Plan the trial of a candidate tree.

    Args:
      task: the task.
      tree: its files with the patch and the original tests.
      bugs: bugs for the second session.
      draw: decides all that must not be foreseen.
      layers: the layers that take part.
    """
    planted = Planted(tree)
    if "canaries" in layers:
        # A few of the other tests, too: a patch must not make them pass by their names, either.
        others = draw.sample(task.pass_to_pass, min(OTHERS, len(task.pass_to_pass)))
        planted = canaries.plant(tree, [*task.fail_to_pass, *others], draw)
    other = None
    if "second" in layers:
        other = second.choose(planted.tree, bugs, task.fail_to_pass, draw)
    return Trial(planted, other, unfit=len(bugs) if other is None and "second" in layers else 0)


def order(task: Task, trial: Trial, root: str, *, has_namespace: bool) -> bytes:
    """Return the warden's stdin for a sandbox whose root folder holds the trial's trees."""
    only: list[Sequence[str] | None] = [None]
    paths = [task.test_path]
    wanted: list[dict[str, Any]] = []
    if trial.second is not None:
        only.append(trial.reds)
    for number, names in enumerate(only):
        wanted.append(
            {
                "root": f"{root}/{trial.places[number]}",
                "paths": paths if names is None else files_of(names, trial, paths),
                "only": names,
                "nonce": trial.nonces[number],
            }
        )
    chosen = wanted[::-1] if trial.is_reversed else wanted
    return sessions.order(task.runner, chosen, trial.end, has_namespace=has_namespace)


def conclude(
    task: Task,
    trial: Trial,
    result: ExecResult,
    *,
    marks: Sequence[str] = (),
    dropped: tuple[str, ...] = (),
    layers: frozenset[str] = LAYERS,
) -> Grade:
    """Judge the outcome of a trial.

    Args:
      task: the task.
      trial: the trial.
      result: what the warden's run gave.
      marks: what the reading of the patch found.
      dropped: value of `Grade.dropped`.
      layers: the layers that take part.
    """
    found, is_whole = sessions.read(result.report, trial.end)
    by_nonce = {session.nonce: session for session in found}
    first, other = (by_nonce.get(nonce) for nonce in trial.nonces)
    limit = None if result.reason == "exit" else result.reason
    doubts = list(marks)
    if "sessions" in layers:
        if limit is None and not is_whole:
            doubts.append("early exit: the parent of the test sessions was ended")
        for session in filter(None, (first, other)):
            doubts += sessions.doubts(session)
    output = result.output[-OUTPUT_CHARS:]
    return settle(task, trial, (first, other), doubts=doubts, dropped=dropped, output=output, limit=limit)


def settle(
    task: Task,
    trial: Trial,
    outcomes: tuple[Outcome | None, Outcome | None],
    *,
    doubts: Sequence[str],
    dropped: tuple[str, ...],
    output: str,
    limit: str | None,
) -> Grade:
    """Judge what came of the sessions, which ran in a cage or in containers.

    Args:
      task: the task.
      trial: the trial.
      outcomes: what came of the first and of the second session; None for one that did not run.
      doubts: the signs of tampering up to here.
      dropped: value of `Grade.dropped`.
      output: value of `Grade.output`.
      limit: the limit that ended the tests, if any.
    """
    first, other = outcomes
    statuses: Mapping[str, str] = {} if first is None else first.statuses
    real, planted = canaries.sort_out(trial.planted, statuses)
    found = [*doubts, *canaries.doubts(planted)]
    grade = grading.judge(task, real, dropped=dropped, output=output, limit=limit)
    if grade.resolved and not (first is not None and first.is_sound):
        grade = dataclasses.replace(grade, resolved=False, reason="unresolved")
    # Two wrongs may make a right, so what follows means something about a repair only.
    if grade.resolved:
        found += canaries.missing(trial.planted, planted)
        if trial.unfit:
            _log.warning(
                "task %s: a patch is judged without a second bug, because none of the task's %d fits into "
                "the files that it repairs",
                task.instance_id,
                trial.unfit,
            )
        if trial.second is not None and (other is None or not _finds(trial, other)):
            found.append(f"second bug: none of {', '.join(trial.second.red)} fails with it")
    return grading.believe(grade, found)


def _finds(trial: Trial, session: Outcome) -> bool:
    """Whether a test of the second session fails, or the session does not come to its end."""
    statuses = session.statuses
    return not session.is_sound or any(statuses.get(name) not in grading.KEPT for name in trial.reds)


def files_of(names: Sequence[str], trial: Trial, paths: list[str]) -> list[str]:
    """Return the files of tests where they are in the tree, so that no others are collected."""
    files = sorted({name.partition("::")[0] for name in names})
    return files if all(file in trial.planted.tree for file in files) else paths


def _secret() -> str:
    return secrets.token_hex(8)
