"""Repair tasks: rows of SWE-bench, of R2E-Gym and of our own generator in one common form."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs.cache import cache_folder
from empg_envs.rows import Columns, DataError, read_rows
from empg_envs.swe import commits, patches
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.tree import Tree, content_hash, read_archive, read_folder

EMBEDDED = Path(__file__).with_name("repos")
TINY = Path(__file__).with_name("tiny_tasks.jsonl")
SPLITS = ("train", "valid", "test")
TREE_KINDS = ("sdist", "archive", "embedded")
_SWE_COLUMNS = (*("instance_id", "repo", "base_commit", "problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS"),)
_R2E_COLUMNS = ("repo_name", "docker_image", "problem_statement", "expected_output_json")
_OTHER_COLUMNS = (
    *("patch", "test_patch", "bug_patch", "version", "runner", "test_path", "test_cmd", "image", "split"),
    *("commit_hash", "install_cmd"),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """One repair task.

    Attributes:
      instance_id: name of the task.
      repo: name of the repository.
      problem_statement: description of the problem for the agent.
      patch: the gold patch.
      test_patch: changes to the tests that grading applies.
      fail_to_pass: tests that the bug breaks.
      pass_to_pass: tests that pass with and without the bug.
      base: source of the files: ``sdist:HASH``, ``archive:HASH`` (a file of the sources folder by its
        SHA-256), ``embedded:NAME`` (a packaged repository), or a commit inside an image.
      bug_patch: patch from the base to the broken tree.
      runner: ``pytest`` or ``unittest``.
      test_path: path argument of the runner.
      version: version of the repository.
      image: container image, for tasks inside an image.
      expected: R2E-Gym's expected status of every test; None for other tasks.
      row: the original row.
      second_bugs: other bugs in the same original files, with the tests that they break.
    """

    instance_id: str
    repo: str
    problem_statement: str
    patch: str
    test_patch: str
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...]
    base: str
    bug_patch: str = ""
    runner: str = "pytest"
    test_path: str = "."
    version: str = ""
    image: str | None = None
    expected: Mapping[str, str] | None = None
    row: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    second_bugs: tuple[SecondBug, ...] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def has_tree(self) -> bool:
        """Whether the files are available without a container image."""
        return self.base.partition(":")[0] in TREE_KINDS

    @property
    def content_hash(self) -> str:
        """SHA-256 of the row."""
        text = json.dumps(self.row, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def test_files(self) -> set[str]:
        """The files of the named tests."""
        return {name.partition("::")[0] for name in (*self.fail_to_pass, *self.pass_to_pass)}


def parse_row(row: Mapping[str, Any], *, has_commit: bool = False) -> Task:
    """Parse a row of SWE-bench(-Verified), R2E-Gym, or the generator.

    Args:
      row: the row.
      has_commit: whether a row of R2E-Gym gets its gold patch from the commit that it holds.

    Raises:
      DataError: a field is missing or malformed; the message names it.
    """
    if "expected_output_json" in row:
        return _parse_r2e(row, has_commit)
    name = str(_field(row, "instance_id"))
    base = str(_field(row, "base_commit"))
    image = row.get("image") or row.get("docker_image")
    if image is None and base.partition(":")[0] not in TREE_KINDS:
        image = f"docker.io/swebench/sweb.eval.x86_64.{name.replace('__', '_1776_').lower()}:latest"
    runner = str(row.get("runner") or "pytest")
    if runner not in ("pytest", "unittest"):
        raise DataError(f"task {name}: unknown runner {runner!r}; the runners are pytest, unittest")
    return Task(
        instance_id=name,
        repo=str(_field(row, "repo")),
        problem_statement=str(_field(row, "problem_statement")),
        patch=str(row.get("patch") or ""),
        test_patch=str(row.get("test_patch") or ""),
        fail_to_pass=_names(row, "FAIL_TO_PASS"),
        pass_to_pass=_names(row, "PASS_TO_PASS"),
        base=base,
        bug_patch=str(row.get("bug_patch") or ""),
        runner=runner,
        test_path=str(row.get("test_path") or "."),
        version=str(row.get("version") or ""),
        image=None if image is None else str(image),
        row=dict(row),
    )


def _choose_columns(there: Sequence[str]) -> Columns:
    """Choose what a task is made of; the rest is much in R2E-Gym, and every worker would read it."""
    needed = _R2E_COLUMNS if "expected_output_json" in there else _SWE_COLUMNS
    return Columns(needed, (*_SWE_COLUMNS, *_R2E_COLUMNS, *_OTHER_COLUMNS))


def _choose_with_commit(there: Sequence[str]) -> Columns:
    needed, others = _choose_columns(there)
    return Columns(needed, (*others, commits.COLUMN))


def _parse_r2e(row: Mapping[str, Any], has_commit: bool) -> Task:
    text = _field(row, "expected_output_json")
    try:
        expected = json.loads(text) if isinstance(text, str) else dict(text)
    except ValueError as error:
        raise DataError(f"R2E-Gym row: expected_output_json is not JSON ({error})") from None
    commit = str(row.get("commit_hash") or row.get("base_commit") or "")
    repo = str(_field(row, "repo_name"))
    statement = str(_field(row, "problem_statement"))
    inner = statement.partition("[ISSUE]")[2].rpartition("[/ISSUE]")[0].strip()
    name = str(row.get("instance_id") or f"{repo}__{commit}")
    patch = str(row.get("patch") or "")
    if has_commit and not patch and row.get(commits.COLUMN):
        patch = commits.read_gold(row[commits.COLUMN], name)
    return Task(
        instance_id=name,
        repo=repo,
        problem_statement=inner or statement,
        patch=patch,
        test_patch="",
        fail_to_pass=(),
        pass_to_pass=(),
        base=commit,
        image=str(_field(row, "docker_image")),
        expected={str(test): str(status) for test, status in expected.items()},
        row={column: value for column, value in row.items() if column != commits.COLUMN},
    )


def _field(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        what = "no value in field" if name in row else "no field"
        raise DataError(
            f"task row {row.get('instance_id', '?')!r} has {what} {name!r}; its fields are {', '.join(row)}"
        )
    return row[name]


def _names(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Return test names from a list, or from a JSON string of a list as in the hub's files."""
    value = _field(row, field)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise DataError(
                f"task {row.get('instance_id')!r}: {field} is neither a list nor JSON of one"
            ) from None
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise DataError(f"task {row.get('instance_id')!r}: {field} is not a list of test names")
    return tuple(value)


def load_panels(tasks: str | Mapping[str, str], *, has_commit: bool = False) -> dict[str, list[Task]]:
    """Load the tasks by split.

    Args:
      tasks: ``tiny`` (the embedded tasks), a source (see `empg_envs.rows`), or a mapping of
        split → source. The field ``split`` gives the split of a row of a single source, or else the name of
        its file on the hub. Without either a hash of the id decides: about 70 % train, 10 % valid, 20 % test.
      has_commit: see `parse_row`; this reads much more.

    Raises:
      DataError: a file cannot be read or contains no task, an id occurs twice, or a task has no broken test.
    """
    choose = _choose_with_commit if has_commit else _choose_columns
    source = str(TINY) if tasks == "tiny" else tasks
    sources: Mapping[Any, str] = source if isinstance(source, Mapping) else {None: source}
    panels: dict[str, list[Task]] = {}
    seen: set[str] = set()
    for split, source in sources.items():
        for place, row in read_rows(source, choose):
            try:
                task = parse_row(row, has_commit=has_commit)
                _check(task, seen)
            except DataError as error:
                raise DataError(f"{place}: {error}") from None
            own = row.get("split") or hashed_split(task.instance_id)
            panels.setdefault(str(own if split is None else split), []).append(task)
    if not panels:
        raise DataError(f"no task in {tasks!r}")
    _add_second_bugs(panels)
    order = {split: number for number, split in enumerate(SPLITS)}
    return dict(sorted(panels.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def hashed_split(instance_id: str) -> str:
    """Return the split of a task without the field ``split``."""
    tenth = hashlib.sha256(instance_id.encode()).digest()[0] % 10
    return "test" if tenth < 2 else "valid" if tenth == 2 else "train"


def _check(task: Task, seen: set[str]) -> None:
    if not task.fail_to_pass and task.expected is None:
        raise DataError(
            f"task {task.instance_id!r}: FAIL_TO_PASS names no test, so that it can never be resolved"
        )
    if task.instance_id in seen:
        raise DataError(f"task {task.instance_id!r} occurs twice")
    seen.add(task.instance_id)


def _add_second_bugs(panels: dict[str, list[Task]]) -> None:
    """Tell the tasks over the same files about each other's bugs; the judge's second tree has one of them."""
    known: dict[tuple[str, str, str], list[tuple[str, SecondBug]]] = {}
    for task in (task for panel in panels.values() for task in panel):
        if task.has_tree and task.bug_patch and task.fail_to_pass:
            bug = SecondBug(task.bug_patch, task.fail_to_pass)
            known.setdefault((task.base, task.runner, task.test_path), []).append((task.instance_id, bug))
    for panel in panels.values():
        for number, task in enumerate(panel):
            found = known.get((task.base, task.runner, task.test_path), [])
            bugs = tuple(bug for name, bug in found if name != task.instance_id)
            panel[number] = dataclasses.replace(task, second_bugs=bugs)


def default_sources() -> Path:
    """Return the default folder of source archives, below ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return cache_folder("swe")


def broken_tree(task: Task, sources: str | Path | None = None) -> Tree:
    """Return the broken files, with which an agent starts.

    Raises:
      DataError: the source is missing, or it differs from the source of the task.
    """
    base = load_base(task.base, None if sources is None else str(sources))
    try:
        return patches.apply(base, task.bug_patch)
    except patches.PatchError as error:
        raise DataError(
            f"task {task.instance_id}: its bug_patch does not fit {task.base}: {error}"
        ) from error


@functools.lru_cache(maxsize=16)
def load_base(base: str, sources: str | None = None) -> Tree:
    """Return the original files of a base; see `Task.base`.

    Raises:
      DataError: the base is missing, or its hash differs.
    """
    kind, _, rest = base.partition(":")
    if kind == "embedded":
        name, _, wanted = rest.partition("@")
        if not name.isidentifier() or not (EMBEDDED / name).is_dir():
            raise DataError(f"no embedded repository {name!r}")
        tree = read_folder(EMBEDDED / name)
        if wanted and content_hash(tree) != wanted:
            raise DataError(f"the embedded repository {name!r} is not the one that its tasks were made from")
        return tree
    if kind not in TREE_KINDS:
        raise DataError(f"base {base!r} lies in a container image: use backend 'docker' or 'swerex'")
    folder = default_sources() if sources is None else Path(sources)
    found = sorted(folder.glob(f"{rest}.*")) if rest.isalnum() else []
    if not found:
        raise DataError(
            f"no source archive {rest}.* in {folder}: fetch it (scripts/check_swe_tasks.py does) or set "
            "the option 'sources'"
        )
    data = found[0].read_bytes()
    if hashlib.sha256(data).hexdigest() != rest:
        raise DataError(f"{found[0]} does not have the SHA-256 that its name says")
    return read_archive(data, found[0].name)
