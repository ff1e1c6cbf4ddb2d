"""Generate repair tasks from a repository with tests: insert one bug, and keep it if it breaks some tests.

    python -m empg_envs.swe.generate path/to/repository --out tasks.jsonl --count 20
    python -m empg_envs.swe.generate archive-1.0.tar.gz --out tasks.jsonl --tests tests
    python -m empg_envs.swe.generate embedded:spans --out tasks.jsonl --runner unittest
    python -m empg_envs.swe.generate pypi:toolz==1.0.0 --out tasks.jsonl --tests toolz

Every task is verified by three test runs in separate sandboxes: with the original files, with the broken
files, and with the gold patch by the grader.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from empg_envs.swe import grading, mutate, patches
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.fetch import fetch_sdist
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.refusals import FAILED, check_out, one_line
from empg_envs.swe.tasks import EMBEDDED, Task, default_sources, hashed_split, load_base, parse_row
from empg_envs.swe.tree import Tree, content_hash, pack, read_archive, read_folder

MAX_BROKEN_SHARE = 0.5  # a bug that breaks a larger share of the tests is too easy to find


@dataclasses.dataclass(frozen=True)
class Repository:
    """The original files of a repository, its name, and the source to load them again."""

    name: str
    base: str
    tree: Tree


def open_repository(source: str, sources: Path) -> Repository:
    """Read a folder, an archive, ``embedded:NAME`` or ``pypi:NAME==VERSION``.

    Its archive is stored in ``sources``, where tasks find it later.

    Raises:
      DataError, ArchiveError, FileNotFoundError, FetchError, ValueError: the repository cannot be read.
    """
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        tree = load_base(source)
        return Repository(rest, f"embedded:{rest}@{content_hash(tree)}", tree)
    if kind == "pypi":
        name, _, version = rest.partition("==")
        if not name or not version:
            raise ValueError(f"{source} names no release; expected pypi:NAME==VERSION")
        data = fetch_sdist(name, version, None, sources).read_bytes()
        return Repository(
            f"{name}-{version}", f"sdist:{hashlib.sha256(data).hexdigest()}", read_archive(data)
        )
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"no folder or archive {source}; a source is one of these, embedded:NAME or pypi:NAME==VERSION"
        )
    tree = read_folder(path) if path.is_dir() else read_archive(path)
    data = pack(tree)
    digest = hashlib.sha256(data).hexdigest()
    sources.mkdir(parents=True, exist_ok=True)
    fresh = sources / f".{digest}.{os.getpid()}"
    fresh.write_bytes(data)
    fresh.replace(sources / f"{digest}.tar.gz")
    name = path.resolve().name.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")
    return Repository(name, f"archive:{digest}", tree)


def generate(
    repository: Repository,
    backend: TreeBackend,
    *,
    count: int,
    seed: int = 0,
    runner: str = "pytest",
    test_path: str = ".",
    timeout: float = 120.0,
    one_line: bool = False,
    tries: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of verified tasks.

    Args:
      repository: the original files.
      backend: the backend that runs the tests.
      count: largest number of tasks.
      seed: seed of the order in which bugs are tried.
      runner: ``pytest`` or ``unittest``.
      test_path: path argument of the runner.
      timeout: time limit of a test run in seconds.
      one_line: whether to use only bugs that keep the number of lines.
      tries: largest number of bugs to try.

    Raises:
      ValueError: no test of the original files passes.
    """
    probe = Task(repository.name, repository.name, "", "", "", (), (), repository.base)
    probe = dataclasses.replace(probe, runner=runner, test_path=test_path)
    started = time.monotonic()
    sound = backend.run_tests(probe, repository.tree, timeout)
    # A bug may cause an endless loop, so broken files get a limit based on the time of the original run.
    patience = min(timeout, 5.0 + 10.0 * (time.monotonic() - started))
    passing = {name for name, status in sound.statuses.items() if status == "PASSED"}
    if not passing:
        raise ValueError(f"no test of {repository.name} passes ({sound.reason}): {sound.output[-500:]}")
    rows: list[dict[str, Any]] = []
    for number, (family, path, _, broken) in enumerate(mutate.bugs(repository.tree, seed, one_line=one_line)):
        if len(rows) >= count or (tries is not None and number >= tries):
            return
        result = backend.run_tests(probe, broken, patience)
        if result.reason not in ("resolved", "unresolved"):  # the tests exceeded a limit
            continue
        failing = sorted(name for name in passing if result.statuses.get(name) not in grading.KEPT)
        if not failing or len(failing) > MAX_BROKEN_SHARE * len(passing):
            continue
        row = _row(repository, family, path, broken, failing, sorted(passing - set(failing)))
        row |= {"runner": runner, "test_path": test_path}
        siblings = tuple(SecondBug(made["bug_patch"], tuple(made["FAIL_TO_PASS"])) for made in rows)
        task = dataclasses.replace(parse_row(row), second_bugs=siblings)
        if backend.grade(task, task.patch, timeout).resolved:
            rows.append(row)
            yield row


def _row(
    repository: Repository, family: str, path: str, broken: Tree, failing: list[str], kept: list[str]
) -> dict[str, Any]:
    gold, _ = patches.diff(broken, repository.tree)
    bug, _ = patches.diff(repository.tree, broken)
    name = f"{repository.name}__{hashlib.sha256(bug.encode()).hexdigest()[:10]}"
    examples = " and ".join(f"`{test}`" for test in failing[:2])
    tests = "1 of its tests fails" if len(failing) == 1 else f"{len(failing)} of its tests fail"
    statement = (
        f"Something in {repository.name} does not work as it should: {tests}, for example {examples}. "
        "Find the cause in the code and mend it; the tests are right and stay as they are."
    )
    return {
        "instance_id": name,
        "repo": repository.name,
        "base_commit": repository.base,
        "problem_statement": statement,
        "patch": gold,
        "test_patch": "",
        "bug_patch": bug,
        "FAIL_TO_PASS": failing,
        "PASS_TO_PASS": kept,
        "family": family,
    }


def embedded_repositories() -> list[str]:
    """Return the names of the packaged repositories."""
    return sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir() and path.name.isidentifier())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("source", nargs="+", help="folder, archive, embedded:NAME or pypi:NAME==VERSION")
    parser.add_argument("--out", required=True, type=Path, help="JSON-lines file to write")
    parser.add_argument("--count", type=int, default=20, help="tasks per source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runner", choices=("pytest", "unittest"), default="pytest")
    parser.add_argument("--tests", default=".", help="path argument of the test runner")
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--python", default=None, help="interpreter with the repository's dependencies")
    parser.add_argument("--sources", type=Path, default=None, help="folder for source archives")
    parser.add_argument("--one-line", action="store_true", help="only bugs that keep the number of lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the module's text."""
    options = _parse(argv)
    sources = options.sources or default_sources()
    with one_line():
        check_out(options.out)
        # All of them before the first is worked on, which takes minutes.
        repositories = [open_repository(source, sources) for source in options.source]
        backend = TreeBackend(python=options.python, sources=sources)
    rows = []
    with one_line(FAILED):
        for repository in repositories:
            for row in generate(
                repository,
                backend,
                count=options.count,
                seed=options.seed,
                runner=options.runner,
                test_path=options.tests,
                timeout=options.timeout,
                one_line=options.one_line,
            ):
                rows.append({**row, "split": hashed_split(row["instance_id"])})
                print(
                    f"{row['instance_id']}: {row['family']}, {len(row['FAIL_TO_PASS'])} red", file=sys.stderr
                )
        fresh = options.out.with_name(options.out.name + ".new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        fresh.replace(options.out)
    print(f"{len(rows)} tasks in {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
