"""What a judge does inside a container before it runs tests there: the same protections as over local files.

A container holds a whole repository with its history. So only the files that matter are read out of it: those
that a patch changes, and the test files that get canaries.
"""

from __future__ import annotations

import dataclasses
import random
import shlex
from collections.abc import Iterable

from empg_envs.swe import grading, patches
from empg_envs.swe.containers import ROOT
from empg_envs.swe.judge import canaries
from empg_envs.swe.judge.canaries import Planted
from empg_envs.swe.judge.reading import read_changes
from empg_envs.swe.sandbox import FileError, Sandbox
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import File, Tree

GIT = f"git -c core.fileMode=false -c safe.directory={ROOT}"
GIT_SECONDS = 120.0
PRUNE_SECONDS = 600.0
# Branches, tags, remotes and the log of references may lead to commits after the one that an agent starts
# from, the real repair among them. Objects that nothing leads to are removed only where there are any,
# because this packs the whole repository anew.
PRUNE = f"""
later=$({GIT} rev-list --all --reflog --not HEAD -n 1 2>/dev/null)
here=$({GIT} symbolic-ref -q HEAD)
{GIT} remote | while read -r name; do {GIT} remote remove "$name"; done
{GIT} for-each-ref --format='%(refname)' | while read -r name; do
  [ "$name" = "$here" ] || {GIT} update-ref -d "$name"
done
{GIT} reflog expire --expire=now --all
rm -f .git/FETCH_HEAD .git/ORIG_HEAD
[ -z "$later" ] || {GIT} -c gc.auto=0 gc --quiet --prune=now
true
"""


@dataclasses.dataclass(frozen=True)
class Checked:
    """What came of checking a patch inside a container.

    Attributes:
      marks: what the reading found.
      dropped: changed files that were put back.
      planted: the canaries.
    """

    marks: tuple[str, ...]
    dropped: tuple[str, ...]
    planted: Planted = dataclasses.field(default_factory=lambda: Planted({}))


def prune(sandbox: Sandbox) -> str:
    """Remove the history after the present commit; return that commit."""
    sandbox.exec(PRUNE, PRUNE_SECONDS)
    found = sandbox.exec(f"{GIT} rev-parse HEAD", GIT_SECONDS)
    return found.output.strip() if found.returncode == 0 else "HEAD"


def check_patch(task: Task, sandbox: Sandbox, patch: str, *, is_reading: bool) -> Checked:
    """Read an applied patch, and put back what controls tests.

    Files that the gold patch changes stay as the agent left them: real repairs do touch configuration.

    Args:
      task: the task.
      sandbox: a container in which the patch is applied.
      patch: the patch.
      is_reading: whether the patch is read.

    Raises:
      PatchError: the patch cannot be parsed.
    """
    changed = patches.touched(patch)
    gold = patches.touched(task.patch) if task.patch else set()
    tops = sandbox.exec(f"{GIT} ls-tree --name-only HEAD . src/", GIT_SECONDS).output.split("\n")
    known: Tree = {name: File(b"") for name in tops if name}
    shadows = [path for path in changed if grading.shadows(path, known)]
    drop = sorted(path for path in changed - gold if grading.protected(path, task) or path in shadows)
    marks: list[str] = []
    if is_reading:
        before, after = _before(sandbox, changed | gold), _now(sandbox, changed)
        names = (*task.fail_to_pass, *task.pass_to_pass)
        try:
            repaired = patches.apply(before, task.patch) if task.patch else before
        except patches.PatchError:  # it may need files that cannot be read, such as large ones
            repaired = before
        old = {path: file for path, file in before.items() if path in changed}
        marks = read_changes(old, after, repaired, names=names, shadows=shadows)
    if drop:
        quoted = " ".join(map(shlex.quote, drop))
        sandbox.exec(
            f'for f in {quoted}; do {GIT} checkout -q HEAD -- "$f" || rm -rf -- "$f"; done', GIT_SECONDS
        )
    return Checked(tuple(marks), tuple(drop))


def plant(task: Task, sandbox: Sandbox, draw: random.Random) -> Planted:
    """Plant canaries in the files of the broken tests."""
    files = {name.partition("::")[0] for name in task.fail_to_pass if "::" in name}
    planted = canaries.plant(_now(sandbox, files), task.fail_to_pass, draw)
    for path, file in planted.tree.items():
        sandbox.write(path, file.data)
    return planted


def _now(sandbox: Sandbox, paths: Iterable[str]) -> Tree:
    """Read files as they are; those that do not exist or are too large are left out."""
    found: Tree = {}
    for path in sorted(paths):
        try:
            found[path] = File(sandbox.read(path))
        except FileError:
            continue
    return found


def _before(sandbox: Sandbox, paths: Iterable[str]) -> Tree:
    """Read files as they are in the commit."""
    found: Tree = {}
    for path in sorted(paths):
        shown = sandbox.exec(f"{GIT} show HEAD:{shlex.quote(path)}", GIT_SECONDS)
        if shown.returncode == 0 and not shown.omitted:
            found[path] = File(shown.output.encode())
    return found
