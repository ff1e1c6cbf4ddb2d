"""What a judge does inside a container before it runs tests there: the same protections as over local files.

A container holds a whole repository with its history. So only the files that matter are read out of it: those
that a patch changes, and the test files that get canaries.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from empg_envs.rows import DataError
from empg_envs.swe import grading, patches, reports
from empg_envs.swe.containers import READ_BYTES, ROOT
from empg_envs.swe.guest import witness
from empg_envs.swe.judge.reading import TOO_LARGE, find_strays, read_changes
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.sandbox import FileError, LostSandboxError, Sandbox, SandboxError
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import ArchiveError, File, Tree, check_path, is_test

# An image's files may have other modes than its commit has, which is no change. But a patch is applied to the
# files as they are: else git takes the permission to execute from those that it changes.
GIT = f"git -c core.fileMode=false -c safe.directory={ROOT}"
APPLY = f"git -c core.fileMode=true -c safe.directory={ROOT} apply --verbose"
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


# Stages all changes; of new files also whether they can be executed. A git command of the agent that was
# ended at its limit leaves its lock.
STAGE = f"""rm -f .git/index.lock; {GIT} add -A || exit 1
{GIT} diff --cached --name-only -z --diff-filter=A HEAD | while IFS= read -r -d '' name; do
  [ ! -x "$name" ] || [ -h "$name" ] || printf '%s\\0' "$name"
done | {GIT} update-index --chmod=+x -z --stdin"""
# In R2E-Gym's images the tests are next to the repository; an agent must not see them.
HIDE = f"rm -rf /r2e_tests {ROOT}/r2e_tests {ROOT}/run_tests.sh /run_tests.sh"
_FIND_R2E = (
    f"for d in {ROOT} /root /; do if [ -f $d/run_tests.sh ]; then script=$d/run_tests.sh; break; fi; done; "
)
# What R2E-Gym's images have besides the repository, and judge by. An agent sees the last one only.
JUDGES = ("run_tests.sh", "r2e_tests", ".venv")
_PLACE_R2E = f'[ -e {ROOT}/r2e_tests ] || ln -s /r2e_tests {ROOT}/r2e_tests; grep -q pytest "$script"'
PATCH_FILE, TEST_PATCH_FILE = "/tmp/agent.patch", "/tmp/tests.patch"
BATCH_BYTES = 50_000  # of names in one command
# Files that are changed after the mark have a later time, whatever a patch says about them; the probe, which
# is last, shows that all were looked at. The clock of files may stand still for some milliseconds.
MARK, PROBE = "/tmp/empg-jax-mark", "/tmp/empg-jax-probe"
DELETED = f"{GIT} ls-files -z --deleted"
SET_MARK = f"touch {MARK} && sleep 0.05 && {DELETED}"
FIND_CHANGED = (
    f"touch {PROBE}; find . {PROBE} \\( -type f -o -type l \\) -cnewer {MARK} -print0 2>/dev/null; {DELETED}"
)
# A file of the commit as it is there, and no other.
RESTORE = (
    f'if {GIT} cat-file -e "HEAD:$f" 2>/dev/null; then {GIT} --literal-pathspecs checkout -q HEAD -- "$f"; '
    'else rm -rf -- "$f"; fi || exit 1'
)
# What is in the image, but not in its commit: programs, packages and tests that judge.
FOREIGN = (
    f'if [ -e "$f" ] || [ -h "$f" ]; then {GIT} cat-file -e "HEAD:$f" 2>/dev/null || printf "%s\\0" "$f"; fi'
)
WITNESS_HOME = ".git/empg-jax"  # where neither git nor the tests look


class Applied(NamedTuple):
    """What came of applying a patch inside a container.

    Attributes:
      wrong: why it does not apply, or None.
      changed: the files that it changed, as they are found in the container.
    """

    wrong: str | None
    changed: frozenset[str] = frozenset()


class Checked(NamedTuple):
    """What came of checking a patch inside a container.

    Attributes:
      marks: what the reading found.
      dropped: changed files that were put back.
    """

    marks: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Suite:
    """The tests of a task inside a container.

    Attributes:
      command: shell command that runs tests, without its arguments.
      targets: arguments that run all tests of the task.
      parser: reads the statuses in its output.
      has_code: whether its exit code is that of the tests.
      has_witness: whether it runs pytest, which can load `empg_envs.swe.guest.witness`.
      repo: name of the repository, which decides about the form of arguments.
    """

    command: str
    targets: tuple[str, ...]
    parser: reports.Parser
    has_code: bool
    has_witness: bool
    repo: str

    def line(self, files: Iterable[str] = (), names: Sequence[str] = ()) -> str:
        """Return the command for some tests of some files; without files for all tests.

        It runs no others of those files where it takes the tests' names: pytest does, if they are whole.
        """
        chosen = reports.test_targets(self.repo, set(files)) or self.targets
        if files and self.has_witness and names and all(map(reports.is_id, names)):
            chosen = list(names)
        # Its own exit code is the command's last word: the engine reports it, and no output can change it.
        line = " ".join([self.command, *map(shlex.quote, chosen), "2>&1"])
        if not self.has_witness:
            return line
        home = f"{ROOT}/{WITNESS_HOME}"
        options = f'PYTEST_ADDOPTS="-p {witness.MODULE} $PYTEST_ADDOPTS"'
        return f'export PYTHONPATH="{home}${{PYTHONPATH:+:$PYTHONPATH}}" {options}; {line}'


def prune(sandbox: Sandbox) -> str:
    """Remove the history after the present commit; return that commit."""
    sandbox.exec(PRUNE, PRUNE_SECONDS)
    found = sandbox.exec(f"{GIT} rev-parse HEAD", GIT_SECONDS)
    return found.output.strip() if found.returncode == 0 else "HEAD"


def check_patch(task: Task, sandbox: Sandbox, changed: frozenset[str], *, is_reading: bool) -> Checked:
    """Read an applied patch, and put back what controls tests.

    Files that the gold patch changes stay as the agent left them: real repairs do touch configuration.

    Args:
      task: the task.
      sandbox: a container in which the patch is applied.
      changed: the files that it changed.
      is_reading: whether the patch is read.

    Raises:
      LostSandboxError: a file cannot be put back.
    """
    with grading.fitting(task, "patch"):
        gold = patches.touched(task.patch, is_trusted=True)
    tops = sandbox.exec(f"{GIT} ls-tree --name-only HEAD . src/", GIT_SECONDS).output.split("\n")
    known: Tree = {name: File(b"") for name in tops if name}
    shadows = [path for path in changed if grading.shadows(path, known)]
    drop = sorted(path for path in changed - gold if grading.protected(path, task) or path in shadows)
    marks: list[str] = []
    if is_reading:
        before, after = _before(sandbox, changed | gold), read_files(sandbox, changed)
        names = (*task.fail_to_pass, *task.pass_to_pass)
        try:
            repaired = patches.apply(before, task.patch) if task.patch else before
        except patches.PatchError:  # it may need files that cannot be read, such as large ones
            repaired = before
        old = {path: file for path, file in before.items() if path in changed}
        strays = find_strays(old, after, repaired, names=names, dropped=drop)
        drop += sorted(strays)
        rest = {path: file for path, file in after.items() if path not in strays}
        own = grading.own_tools(known)
        marks = read_changes(old, rest, repaired, names=names, shadows=shadows, own=own)
        # A file that is gone hides nothing, nor does the change of one that could not be read before.
        marks += [f"{path}: {TOO_LARGE}" for path in _unread(sandbox, changed - after.keys(), before)]
    for batch in _batches(drop):
        done = sandbox.exec(f"for f in {batch}; do {RESTORE}; done", GIT_SECONDS)
        if done.returncode:  # the patch may have brought that about
            raise LostSandboxError(f"files cannot be put back: {done.output[-500:]}")
    return Checked(tuple(marks), tuple(drop))


def _batches(paths: Iterable[str]) -> Iterator[str]:
    """Yield names for a shell, as many at a time as fit into a command."""
    batch: list[str] = []
    size = 0
    for word in map(shlex.quote, paths):
        length = len(word.encode()) + 1
        if batch and size + length > BATCH_BYTES:
            yield " ".join(batch)
            batch, size = [], 0
        batch.append(word)
        size += length
    if batch:
        yield " ".join(batch)


def apply_patch(task: Task, sandbox: Sandbox, patch: str) -> Applied:
    """Apply an agent's patch as the official harness does.

    Only what our parser reads in it is applied, and the container tells which files that changed. Changes of
    what the image has besides its commit are left out.

    Raises:
      PatchError: it cannot be parsed, or changes the repository's own data, by which it could run commands.
      SandboxError: the container does not tell what was changed.
    """
    named = patches.touched(patches.render(patch))
    for path in named:
        _check_place(path)
    judges = {path for path in named if task.expected is not None and path.partition("/")[0] in JUDGES}
    text = patches.render(patch, without=judges | _foreign(sandbox, named))
    named = patches.touched(text)
    sandbox.write(PATCH_FILE, text.encode())
    gone = _names(sandbox, SET_MARK)
    script = f"{APPLY} {PATCH_FILE} || patch --batch --no-backup-if-mismatch --fuzz=5 -p1 -i {PATCH_FILE}"
    applied = sandbox.exec(script, GIT_SECONDS)
    if applied.returncode:
        return Applied(applied.output)
    found = _names(sandbox, FIND_CHANGED)
    if PROBE not in found:
        raise SandboxError("find does not list the changed files of a container")
    changed = {path.removeprefix("./") for path in found - gone - {PROBE}}
    for path in changed:
        _check_place(path)
    return Applied(None, frozenset(changed | named))


def _foreign(sandbox: Sandbox, paths: set[str]) -> set[str]:
    """Return the paths of which a container has files that its commit has not."""
    batches = _batches(sorted(paths))
    return set[str]().union(
        *(_names(sandbox, f"for f in {batch}; do {FOREIGN}; done; true") for batch in batches)
    )


def _names(sandbox: Sandbox, command: str) -> set[str]:
    """Return the names that a command prints."""
    said = sandbox.exec(command, GIT_SECONDS)
    if said.returncode or said.omitted:
        raise SandboxError(f"the files of a container cannot be listed: {said.output[-500:]}")
    return set(filter(None, said.output.split("\0")))


def _check_place(path: str) -> None:
    if ".git" in PurePosixPath(path).parts:
        raise patches.PatchError(f"{path}: a patch may not change git's own files")
    try:
        check_path(path)
    except ArchiveError as error:
        raise patches.PatchError(str(error)) from None


def place_tests(task: Task, sandbox: Sandbox) -> Suite:
    """Restore the tests in a container, and add the witness.

    Raises:
      DataError: the task's test patch does not apply.
    """
    sandbox.write(f"{WITNESS_HOME}/{witness.MODULE}.py", Path(witness.__file__).read_bytes())
    if task.expected is not None:
        is_pytest = sandbox.exec(f"{_FIND_R2E}{_PLACE_R2E}", GIT_SECONDS).returncode == 0
        return Suite(f'{_FIND_R2E}bash "$script"', (), reports.parse_r2e, False, is_pytest, task.repo)
    with grading.fitting(task, "test_patch"):
        sections = patches.parse(task.test_patch, is_trusted=True)
    files = {path for section in sections for path in (section.old, section.new) if path is not None}
    if task.test_patch:
        names = " ".join(map(shlex.quote, sorted(files)))
        sandbox.write(TEST_PATCH_FILE, task.test_patch.encode())
        # Restore each file separately, because files that the test patch adds do not exist in git yet.
        restore = f"for f in {names}; do {GIT} checkout {shlex.quote(task.base)} -- $f || rm -f $f; done"
        placed = sandbox.exec(f"{restore}; {APPLY} {TEST_PATCH_FILE}", GIT_SECONDS)
        if placed.returncode:
            raise DataError(f"task {task.instance_id}: its test patch does not apply: {placed.output[-500:]}")
    command = str(task.row.get("test_cmd") or reports.command_of(task.repo))
    left = {section.new for section in sections if section.new is not None}  # no file has its old name now
    targets = tuple(reports.test_targets(task.repo, left or task.test_files))
    # The exit code of a pipe or of an alternative is not that of the tests.
    has_code, is_pytest = "|" not in command, "pytest" in command
    return Suite(command, targets, reports.parser_of(task.repo), has_code, is_pytest, task.repo)


def files_to_read(task: Task, bugs: Iterable[SecondBug]) -> set[str]:
    """Return the files that a trial may change: those of named tests, and those with second bugs."""
    named = {name.partition("::")[0] for name in (*task.fail_to_pass, *task.pass_to_pass) if "::" in name}
    return named.union(*(patches.touched(bug.patch) for bug in bugs))


def put(sandbox: Sandbox, tree: Tree, now: Tree) -> None:
    """Write the files of a tree that are not as they are now."""
    for path, file in tree.items():
        if now.get(path) != file:
            sandbox.write(path, file.data)


def read_files(sandbox: Sandbox, paths: Iterable[str]) -> Tree:
    """Read files as they are; those that do not exist or are too large are left out."""
    found: Tree = {}
    for path in sorted(paths):
        try:
            found[path] = File(sandbox.read(path))
        except FileError:
            continue
    return found


def _unread(sandbox: Sandbox, paths: Iterable[str], before: Tree) -> list[str]:
    """Return the sources among paths that have become too large to be read."""
    small = sorted(path for path in paths if path.endswith(".py") and not is_test(path))
    small = [path for path in small if path not in before or len(before[path].data) <= READ_BYTES]
    return [
        path for path in small if not sandbox.exec(f"test -e {shlex.quote(path)}", GIT_SECONDS).returncode
    ]


def _before(sandbox: Sandbox, paths: Iterable[str]) -> Tree:
    """Read files as they are in the commit."""
    found: Tree = {}
    for path in sorted(paths):
        shown = sandbox.exec(f"{GIT} show HEAD:{shlex.quote(path)}", GIT_SECONDS)
        if shown.returncode == 0 and not shown.omitted:
            found[path] = File(shown.output.encode())
    return found
