"""The test runner inside a sandbox, which reports the status of each test on descriptor 3.

It is started as ``python -I``. The tree under test, ``PYTHON*`` variables and ``sitecustomize`` therefore
have no effect before the test framework is loaded, and never precede the standard library. The request is
JSON on stdin: ``runner`` (``pytest`` or ``unittest``), ``root``, ``paths``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import unittest
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Say = Callable[[str, str], None]

REPORT_FD = 3
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


class PytestReporter:
    """A pytest plugin that reports the same statuses as ``-rA`` prints."""

    def __init__(self, report: Say) -> None:
        """Store the function ``report``, which is called with test id and status."""
        self._report = report

    def pytest_collection_finish(self) -> None:
        """Exclude loaded objects from later garbage collections, which disturb tests that compare times."""
        gc.collect()
        gc.freeze()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Report the status after a phase of a test."""
        expected = hasattr(report, "wasxfail")
        if report.failed:
            self._report(report.nodeid, "FAILED" if report.when == "call" else "ERROR")
        elif report.skipped:
            self._report(report.nodeid, "XFAIL" if expected else "SKIPPED")
        elif report.when == "call":
            self._report(report.nodeid, "XPASS" if expected else "PASSED")


class UnittestReporter(unittest.TestResult):
    """A test result that reports each test with the id that pytest would give it."""

    def __init__(self, report: Say, path: str) -> None:
        """Store ``report`` and the path of the test file, relative to the root."""
        super().__init__()
        self._report, self._path = report, path

    def _say(self, test: Any, status: str) -> None:
        method = getattr(test, "_testMethodName", None)
        name = f"{type(test).__name__}::{method}" if method else str(test)
        self._report(f"{self._path}::{name}", status)

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


def run_unittest(root: str, paths: Iterable[str], report: Say) -> None:
    """Run the test cases of files (``test_*.py`` below a folder)."""
    for path in _test_files(root, paths):
        name = os.path.splitext(path)[0].replace(os.sep, ".")
        result = UnittestReporter(report, path)
        try:
            spec = importlib.util.spec_from_file_location(name, os.path.join(root, path))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
        except Exception as error:
            report(path, "ERROR")
            print(f"ERROR {path}: {type(error).__name__}: {error}")
            continue
        unittest.defaultTestLoader.loadTestsFromModule(module).run(result)
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


def main() -> None:
    """Read the request, run the tests, and report their statuses."""
    request = json.loads(sys.stdin.buffer.read())
    root, paths = request["root"], request["paths"]
    report = Report()
    if request["runner"] == "pytest":
        import pytest
    # The tree comes after the standard library, but before installed packages: these may contain a release
    # of the same project.
    standard = [path for path in sys.path if not path.endswith("-packages")]
    installed = [path for path in sys.path if path.endswith("-packages")]
    sys.path[:] = [*standard, f"{root}/src", root, *installed]
    os.chdir(root)
    sys.argv = [request["runner"], *paths]
    if request["runner"] == "pytest":
        sys.exit(pytest.main([*OPTIONS, *paths], plugins=[PytestReporter(report)]))
    run_unittest(root, paths, report)


if __name__ == "__main__":
    main()
