"""The test runner inside a sandbox, which reports the status of each test.

It is started as ``python -I``. The tree under test, ``PYTHON*`` variables and ``sitecustomize`` therefore
have no effect before the test framework is loaded, and never precede the standard library.

An agent's own tests run by `main`: the request is JSON on stdin (``runner``: ``pytest`` or ``unittest``,
``root``, ``paths``), and the statuses go to descriptor 3. A judge's tests run by `play`, in a process that
`empg_envs.swe.guest.warden` forks; there the statuses are *claims*, which the judge compares with other
facts.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import random
import sys
import unittest
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

Say = Callable[[str, str], None]

REPORT_FD = 3
RED = ("FAILED", "ERROR")
OPTIONS = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=",
    "--tb=short",
    "--color=no",
    "--continue-on-collection-errors",
)


class Report:
    """A writer of one JSON line per status; the last line about a test counts."""

    def __init__(self) -> None:
        """Move the descriptor, so that processes of the tests do not inherit it."""
        self._number = os.dup(REPORT_FD)
        os.close(REPORT_FD)

    def __call__(self, name: str, status: str) -> None:
        """Write the status of a test."""
        os.write(self._number, json.dumps([name, status]).encode() + b"\n")


class Claims:
    """A writer of a session's claims: lines that hold the session's nonce and count up without a gap."""

    def __init__(self, number: int, nonce: str) -> None:
        """Move the pipe to a descriptor that cannot be guessed, and not be inherited."""
        self._number = random.SystemRandom().randrange(40, 240)
        os.dup2(number, self._number, inheritable=False)
        os.close(number)
        self._nonce, self._count, self._has_failed, self._pid = nonce, 0, False, os.getpid()

    def __call__(self, name: str, status: str) -> None:
        """Claim the status of a test."""
        self._has_failed |= status in RED
        self._write(["test", name, status])

    def end(self, broken: list[str]) -> int:
        """Claim the end of the session, with the names of broken seals; return the exit code that fits."""
        self._write(["end", *broken])
        return int(self._has_failed)

    def _write(self, what: list[str]) -> None:
        if os.getpid() != self._pid:  # a test forked, and its child went on as if it were the runner
            return
        self._count += 1
        os.write(self._number, f"{self._nonce} {self._count} {json.dumps(what)}\n".encode())


class PytestReporter:
    """A pytest plugin that reports the statuses that ``-rA`` prints, once per test, after its teardown.

    A test has a report per phase, and with subtests more of the same name, in any order: one failure is a
    failure of the test.
    """

    def __init__(self, report: Say, only: Collection[str] | None = None) -> None:
        """Store ``report``, which is called with test id and status, and the ids to run (None: all)."""
        self._report, self._only = report, only
        self._statuses: dict[str, str] = {}
        self._said: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Drop the tests that are not asked for."""
        if self._only is not None:
            items[:] = [item for item in items if item.nodeid in self._only]

    def pytest_collectreport(self, report: Any) -> None:
        """Report a file that cannot be collected."""
        if report.failed:
            self._report(report.nodeid, "ERROR")

    def pytest_collection_finish(self) -> None:
        """Exclude loaded objects from later garbage collections, which disturb tests that compare times."""
        gc.collect()
        gc.freeze()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note the status of a phase or subtest; report the test's status after its teardown."""
        name, status = report.nodeid, self._status(report)
        if status is not None and self._statuses.get(name) not in RED:
            self._statuses[name] = status
        if report.when == "teardown" and name in self._statuses:
            status = self._statuses[name]
            if self._said.get(name) != status:  # else it ran again, as it does where it is collected twice
                self._said[name] = status
                self._report(name, status)

    @staticmethod
    def _status(report: Any) -> str | None:
        expected = hasattr(report, "wasxfail")
        if report.failed:
            return "FAILED" if report.when == "call" else "ERROR"
        if report.skipped:
            return "XFAIL" if expected else "SKIPPED"
        if report.passed and report.when == "call":  # a plugin that runs tests again has outcomes of its own
            return "XPASS" if expected else "PASSED"
        return None


class UnittestReporter(unittest.TestResult):
    """A test result that reports each test with the id that pytest would give it."""

    def __init__(self, report: Say, path: str) -> None:
        """Store ``report`` and the path of the test file, relative to the root."""
        super().__init__()
        self._report, self._path = report, path

    def name_of(self, test: Any) -> str:
        """Return the id that pytest would give a test."""
        method = getattr(test, "_testMethodName", None)
        name = f"{type(test).__name__}::{method}" if method else str(test)
        return f"{self._path}::{name}"

    def _say(self, test: Any, status: str) -> None:
        self._report(self.name_of(test), status)

    def addSuccess(self, test: Any) -> None:
        """Report a passed test."""
        self._say(test, "PASSED")

    def addFailure(self, test: Any, error: Any) -> None:
        """Report a failed assertion."""
        super().addFailure(test, error)
        self._say(test, "FAILED")

    def addError(self, test: Any, error: Any) -> None:
        """Report an exception."""
        super().addError(test, error)
        self._say(test, "FAILED" if hasattr(test, "_testMethodName") else "ERROR")

    def addSkip(self, test: Any, reason: Any) -> None:
        """Report a skipped test."""
        self._say(test, "SKIPPED")

    def addExpectedFailure(self, test: Any, error: Any) -> None:
        """Report an expected failure."""
        self._say(test, "XFAIL")

    def addUnexpectedSuccess(self, test: Any) -> None:
        """Report an unexpected success."""
        self._say(test, "FAILED")

    def addSubTest(self, test: Any, subtest: Any, error: Any) -> None:
        """Report the status of a subtest."""
        super().addSubTest(test, subtest, error)
        if error is not None:
            self._say(test, "FAILED")


def run_unittest(root: str, paths: Iterable[str], report: Say, only: Collection[str] | None = None) -> None:
    """Run the test cases of files (``test_*.py`` below a folder), or those of them with an id in ``only``."""
    for path in _test_files(root, paths):
        name = os.path.splitext(path)[0].replace(os.sep, ".")
        result = UnittestReporter(report, path)
        try:
            spec = importlib.util.spec_from_file_location(name, os.path.join(root, path))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        except BaseException as error:  # SystemExit, too: it must not end the other files' tests
            report(path, "ERROR")
            print(f"ERROR {path}: {type(error).__name__}: {error}")
            continue
        suite = unittest.defaultTestLoader.loadTestsFromModule(module)
        if only is not None:
            suite = unittest.TestSuite(test for test in _flat(suite) if result.name_of(test) in only)
        suite.run(result)
        for test, trace in (*result.failures, *result.errors):
            print(f"FAILED {test}\n{trace}")


def _test_files(root: str, paths: Iterable[str]) -> Iterator[str]:
    for path in paths:
        whole = os.path.join(root, path)
        if os.path.isfile(whole):
            yield os.path.normpath(path)
            continue
        for folder, _, names in sorted(os.walk(whole)):
            for name in sorted(names):
                if name.startswith("test_") and name.endswith(".py"):
                    yield os.path.relpath(os.path.join(folder, name), root)


def _flat(suite: Any) -> Iterator[Any]:
    for test in suite:
        yield from _flat(test) if isinstance(test, unittest.TestSuite) else (test,)


def _enter(root: str, runner: str) -> None:
    """Make the tree importable and the current folder."""
    # The tree comes after the standard library, but before installed packages: these may contain a release
    # of the same project.
    standard = [path for path in sys.path if not path.endswith("-packages")]
    installed = [path for path in sys.path if path.endswith("-packages")]
    sys.path[:] = [*standard, f"{root}/src", root, *installed]
    os.chdir(root)
    sys.argv = [runner]


def play(order: dict[str, Any], number: int) -> int:
    """Run one session of a judge; return the exit code of its process.

    Args:
      order: ``runner``, ``root``, ``paths``, ``only`` (ids to run; None: all) and ``nonce``.
      number: descriptor of the claims.
    """
    from empg_envs.swe.guest.seals import Seals  # the agent's runner, `main`, stands alone

    claims, seals = Claims(number, order["nonce"]), Seals()
    root, paths, only = order["root"], order["paths"], order["only"]
    only = None if only is None else frozenset(only)
    os.environ["PYTHONPATH"] = f"{root}/src:{root}"
    _enter(root, order["runner"])
    if order["runner"] == "pytest":
        import pytest

        code = int(pytest.main([*OPTIONS, *paths], plugins=[PytestReporter(claims, only)]))
        claims.end(seals.broken())
    else:
        run_unittest(root, paths, claims, only)
        code = claims.end(seals.broken())
    sys.stdout.flush()
    return code


def main() -> None:
    """Read the request, run the tests, and report their statuses."""
    request = json.loads(sys.stdin.buffer.read())
    report = Report()
    if request["runner"] == "pytest":
        import pytest
    _enter(request["root"], request["runner"])
    if request["runner"] == "pytest":
        sys.exit(pytest.main([*OPTIONS, *request["paths"]], plugins=[PytestReporter(report)]))
    run_unittest(request["root"], request["paths"], report)


if __name__ == "__main__":
    main()
