"""Grading by the rules of SWE-bench and of R2E-Gym, and the selection of the changes that are graded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from empg_envs.rows import DataError
from empg_envs.swe import patches, reports
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import Tree, is_test

_COLOR = re.compile(r"\x1b\[\d+m")
PASSED = frozenset(("PASSED", "XFAIL"))
KEPT = PASSED | {"SKIPPED"}  # accepted statuses of a test that passed before
MAX_PATCH_CHARS = 2 << 20
SUSPECT = "suspect"  # reason of a grade that is not believed; see empg_envs.swe.judge

# Files that control the collection and execution of tests. Grading ignores an agent's changes to them.
CONFIGURATION = frozenset(
    (
        *("conftest.py", "sitecustomize.py", "usercustomize.py", "pytest.ini", ".pytest.ini", "pytest.toml"),
        *(".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml"),
    )
)
TEST_TOOLS = frozenset(
    (
        *("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments", "exceptiongroup", "tomli"),
        *("hypothesis", "_hypothesis_pytestplugin", "_hypothesis_ftz_detector", "_hypothesis_globals"),
        *("sortedcontainers", "pytest_mock", "pytest_timeout", "xdist", "execnet", "attr", "attrs"),
    )
)


@dataclasses.dataclass(frozen=True)
class Grade:
    """The grade of one patch.

    Attributes:
      resolved: whether the task is solved.
      reason: ``resolved``, ``unresolved``, ``no_patch``, ``patch_does_not_apply``, ``patch_too_large``,
        ``does_not_fit`` (the files are too many for the sandbox), ``suspect`` (the patch or its run shows
        signs of tampering), or the limit that ended the tests (``timeout``, ``memory``, …).
      fail_to_pass: number of broken tests that pass now, and number of broken tests.
      pass_to_pass: the same numbers for tests that passed before.
      dropped: changed files that are ignored in grading.
      statuses: status of every reported test.
      output: end of the tests' output.
      doubts: the signs of tampering.
    """

    resolved: bool
    reason: str
    fail_to_pass: tuple[int, int] = (0, 0)
    pass_to_pass: tuple[int, int] = (0, 0)
    dropped: tuple[str, ...] = ()
    statuses: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    output: str = dataclasses.field(default="", repr=False)
    doubts: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Shares of the tests with the wanted status, and whether the grade is not believed."""
        return {
            "fail_to_pass": self.fail_to_pass[0] / max(1, self.fail_to_pass[1]),
            "pass_to_pass": self.pass_to_pass[0] / max(1, self.pass_to_pass[1]),
            "suspect": float(self.reason == SUSPECT),
        }


def judge(
    task: Task,
    statuses: Mapping[str, str],
    *,
    dropped: tuple[str, ...] = (),
    output: str = "",
    limit: str | None = None,
) -> Grade:
    """Apply the task's rule to the statuses of its tests.

    SWE-bench: every FAIL_TO_PASS test must be in {PASSED, XFAIL} and every PASS_TO_PASS test in {PASSED,
    XFAIL, SKIPPED}. A missing test counts as failed. R2E-Gym: the statuses must equal the expected ones.

    Args:
      task: the task, which defines the rule.
      statuses: reported status of each test.
      dropped: value of `Grade.dropped`.
      output: value of `Grade.output`.
      limit: the limit that ended the tests, if any; the task then counts as unresolved.
    """
    if task.expected is not None:
        expected = {short_name(name): status for name, status in task.expected.items()}
        # R2E-Gym also demands that no unexpected test is reported, hence the comparison with all statuses.
        # Files that cannot be collected have no name; their number is not known.
        right = sum(
            name in statuses and (statuses[name] == status or not name) for name, status in expected.items()
        )
        resolved = right == len(expected) == len(statuses) and bool(expected)
        fail, kept = (right, len(expected)), (0, 0)
    else:
        fixed = sum(find_status(name, statuses) in PASSED for name in task.fail_to_pass)
        still = sum(find_status(name, statuses) in KEPT for name in task.pass_to_pass)
        fail, kept = (fixed, len(task.fail_to_pass)), (still, len(task.pass_to_pass))
        resolved = fixed == fail[1] > 0 and still == kept[1]
    resolved = resolved and limit is None
    reason = limit or ("resolved" if resolved else "unresolved")
    return Grade(resolved, reason, fail, kept, dropped, statuses, output)


def believe(grade: Grade, doubts: Iterable[str]) -> Grade:
    """Return the grade, or a suspect one where there are doubts."""
    found = tuple(doubts)
    return dataclasses.replace(grade, resolved=False, reason=SUSPECT, doubts=found) if found else grade


def find_status(name: str, statuses: Mapping[str, str]) -> str | None:
    """Return the status of a test.

    A name that is cut off inside its parameters matches by prefix, if all matches agree on whether they pass.
    """
    # 676 names of SWE-bench Verified are cut off inside the parameters.
    if name in statuses or name.count("[") <= name.count("]"):
        return statuses.get(name)
    matching = [status for found, status in statuses.items() if found.startswith(name)]
    return matching[0] if len({status in PASSED for status in matching}) == 1 else None


def short_name(name: str) -> str:
    """Return a test's name in R2E-Gym's form: without file, message and color."""
    return _COLOR.sub("", name).partition(" - ")[0]


def read_report(report: bytes, root: str = "") -> dict[str, str]:
    """Parse the statuses in the runner's report; malformed lines are skipped, and the last status counts."""
    statuses = {}
    for line in report.split(b"\n"):
        try:
            name, status = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(name, str) and isinstance(status, str):
            statuses[name.removeprefix(f"{root}/")] = status
    return statuses


def protected(path: str, task: Task) -> bool:
    """Return whether a file is a test or controls how tests run; grading uses the original version."""
    parts = PurePosixPath(path).parts
    name = parts[-1]
    return (
        name in CONFIGURATION
        or is_test(path)
        or path in task.test_files
        or reports.is_runner(task.repo, path)
        or name.endswith((".pth", ".egg-link"))
        or any(part.endswith((".dist-info", ".egg-info")) for part in parts)
    )


def candidate(task: Task, broken: Tree, patch: str) -> tuple[Tree, tuple[str, ...]]:
    """Build the tree to be tested: the broken files with the patch, and the original tests and configuration.

    Files that the task's test patch changes are restored for it, whatever they are. New top-level
    modules with the name of a standard or testing module are left out, too.

    Returns:
      The tree, and the changed paths that were restored.

    Raises:
      PatchError: the patch does not apply.
      DataError: the task's test patch does not fit its files.
    """
    with fitting(task, "test_patch"):
        of_tests = patches.touched(task.test_patch)
    tree = patches.apply(broken, patch)
    changed = [path for path in sorted({*tree, *broken}) if tree.get(path) != broken.get(path)]
    dropped = [path for path in changed if path in of_tests or protected(path, task) or shadows(path, broken)]
    for path in dropped:
        if path in broken:
            tree[path] = broken[path]
        else:
            del tree[path]
    # The test patch comes last, because it applies to the original tests, which are restored now.
    return add_tests(task, tree), tuple(dropped)


def repair(task: Task, broken: Tree) -> Tree:
    """Apply the gold patch to the broken files; a task without one has these.

    Raises:
      DataError: it does not fit them.
    """
    with fitting(task, "patch"):
        return patches.apply(broken, task.patch) if task.patch else broken


def add_tests(task: Task, tree: Tree) -> Tree:
    """Apply the task's test patch, if there is one, to files with the original tests.

    Raises:
      DataError: it does not fit them.
    """
    with fitting(task, "test_patch"):
        return patches.apply(tree, task.test_patch) if task.test_patch else dict(sorted(tree.items()))


@contextlib.contextmanager
def fitting(task: Task, field: str) -> Iterator[None]:
    """Blame the task for a patch of its row that does not fit its files."""
    try:
        yield
    except patches.PatchError as error:
        raise DataError(
            f"task {task.instance_id}: its {field} does not fit the files of {task.base}: {error}"
        ) from error


def shadows(path: str, broken: Tree) -> bool:
    """Return whether a new file would take the place of a module of the interpreter or of the test tools.

    A new module such as `json.py` or `pytest.py` could replace the test tools and report success.
    """
    name = path.removeprefix("src/").partition("/")[0]
    module = name.partition(".")[0]
    if module not in sys.stdlib_module_names and module not in TEST_TOOLS:
        return False
    return module not in _modules(broken)


def own_tools(paths: Iterable[str]) -> frozenset[str]:
    """Return which of the test tools are the repository itself: a repair of pytest may use pytest."""
    return TEST_TOOLS & _modules(paths)


def _modules(paths: Iterable[str]) -> set[str]:
    return {path.removeprefix("src/").partition("/")[0].partition(".")[0] for path in paths}
