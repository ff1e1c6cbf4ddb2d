"""Parsers of test statuses in the output of test runners, for images, which have no better channel."""

from __future__ import annotations

import re
from collections.abc import Callable

Parser = Callable[[str], dict[str, str]]

_STATUSES = ("PASSED", "FAILED", "ERROR", "SKIPPED", "XFAIL", "XPASS")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_DJANGO = re.compile(r"(.+?) \.\.\. (ok|skipped|FAIL|ERROR|expected failure|unexpected success)\b")
_DJANGO_STATUSES = {
    "ok": "PASSED",
    "skipped": "SKIPPED",
    "FAIL": "FAILED",
    "ERROR": "ERROR",
    "expected failure": "XFAIL",
    "unexpected success": "XPASS",
}
_SYMPY = re.compile(r"(test_\w+)\s+(ok|F|E|f|s|X)\b")
_SYMPY_STATUSES = {"ok": "PASSED", "F": "FAILED", "E": "ERROR", "f": "XFAIL", "s": "SKIPPED", "X": "XPASS"}


def parse_pytest(log: str) -> dict[str, str]:
    """Parse the summary of ``-rA``: ``STATUS test id - message``; ids end at the first `` - ``."""
    found = {}
    for line in _COLOR.sub("", log).split("\n"):
        status, _, rest = line.strip().partition(" ")
        if status in _STATUSES and rest and not rest.startswith("["):
            found[rest.partition(" - ")[0].strip()] = status
    return found


def parse_r2e(log: str) -> dict[str, str]:
    """Parse the summary with R2E-Gym's names: ids without their file, with parts joined by dots."""
    return {".".join(name.split("::")[1:]) or name: status for name, status in parse_pytest(log).items()}


def parse_django(log: str) -> dict[str, str]:
    """Parse the verbose unittest runner: ``test_x (package.Class) ... ok``; later failures override."""
    found = {}
    for line in log.split("\n"):
        if match := _DJANGO.match(line.strip()):
            found[match[1].strip()] = _DJANGO_STATUSES[match[2]]
        for mark in ("FAIL", "ERROR"):
            if line.startswith(f"{mark}: "):
                found[line.removeprefix(f"{mark}: ").strip()] = _DJANGO_STATUSES[mark]
    return found


def parse_sympy(log: str) -> dict[str, str]:
    """Parse the lines of ``bin/test --verbose``: ``test_x ok``."""
    return {match[1]: _SYMPY_STATUSES[match[2]] for match in map(_SYMPY.match, log.split("\n")) if match}


# Repository → its test command in SWE-bench's images, and the parser of its output; all others run pytest.
COMMANDS: dict[str, tuple[str, Parser]] = {
    "django/django": (
        "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1",
        parse_django,
    ),
    "sympy/sympy": (
        "PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose",
        parse_sympy,
    ),
    "sphinx-doc/sphinx": ("tox --current-env -epy39 -v --", parse_pytest),
}
DEFAULT = ("pytest --no-header -rA", parse_pytest)


def test_targets(repo: str, files: set[str]) -> list[str]:
    """Return the arguments of the test command: the files, or Django's labels for them."""
    names = sorted(name for name in files if name.endswith(".py"))
    if repo == "django/django":
        return [name.removeprefix("tests/").removesuffix(".py").replace("/", ".") for name in names]
    return names
