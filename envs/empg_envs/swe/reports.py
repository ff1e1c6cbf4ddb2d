"""Parsers of test statuses in the output of test runners, for images, which have no better channel.

They read what SWE-bench's own harness (version 5) reads, quirks included, because the lists of tests were
made with it; the package ``swebench`` is the oracle of their tests. A status is the first or the last word of
a line, so whatever is printed in that form counts: see `doubts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Parser = Callable[[str], dict[str, str]]

SUMMARY = "short test summary info"  # heading of what -rA lists
STATUSES = ("FAILED", "PASSED", "SKIPPED", "ERROR", "XFAIL")
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER_OF_COLOR = re.compile(r"\[\d+m")
_CONTROLS = dict.fromkeys(range(1, 32))
_COUNT = re.compile(r"\[\d+\]")


def _words(line: str) -> list[str]:
    """Return status and id of a summary line of pytest, as words; empty for any other line."""
    if not line.startswith(STATUSES):
        return []
    words = (line.replace(" - ", " ") if line.startswith("FAILED") else line).split()
    return [] if len(words) < 2 or _is_count(words) else words


def _is_count(words: list[str]) -> bool:
    """Whether the words are pytest's count of skipped tests of a place, ``SKIPPED [2] file:line: reason``.

    Only this: two lists of tests really contain the id ``[100%]``, which comes of a wrapped line.
    """
    return words[0] == "SKIPPED" and _COUNT.fullmatch(words[1]) is not None


def parse_pytest(log: str) -> dict[str, str]:
    """Parse the summary of ``-rA``: ``STATUS id - message``; an id ends at the first white space."""
    return {words[1]: words[0] for words in map(_words, log.split("\n")) if words}


def parse_pytest_options(log: str) -> dict[str, str]:
    """Parse as `parse_pytest`; of a parameter that is an absolute path only the last part remains."""
    return {_short_path(name): status for name, status in _pairs(log)}


def parse_matplotlib(log: str) -> dict[str, str]:
    """Parse as `parse_pytest`, with mouse buttons by their numbers."""
    return parse_pytest(log.replace("MouseButton.LEFT", "1").replace("MouseButton.RIGHT", "3"))


def _pairs(log: str) -> Iterator[tuple[str, str]]:
    return ((words[1], words[0]) for words in map(_words, log.split("\n")) if words)


def _short_path(name: str) -> str:
    start, end = name.find("["), name.rfind("]")
    if start < 0 or end < start:
        return name
    option = name[start + 1 : end]
    if option.startswith("/") and not option.startswith("//") and "*" not in option:
        option = option[option.rfind("/") :]
    return f"{name[:start]}[{option}]"


def parse_pytest_v2(log: str) -> dict[str, str]:
    """Parse the summary or the lines ``id STATUS`` of old releases; ids may contain spaces."""
    found = {}
    for line in log.split("\n"):
        line = _NUMBER_OF_COLOR.sub("", line).translate(_CONTROLS)
        if line.startswith(STATUSES):
            words = (line.partition(" - ")[0] if line.startswith("FAILED") else line).split()
            if len(words) > 1 and not _is_count(words):
                found[" ".join(words[1:])] = words[0]
        elif line.endswith(STATUSES):
            *name, status = line.split()
            if name:
                found[" ".join(name)] = status
    return found


def parse_seaborn(log: str) -> dict[str, str]:
    """Parse ``FAILED id``, ``PASSED id`` and ``id PASSED [ 50%]``."""
    found = {}
    for line in log.split("\n"):
        words = line.split()
        if len(words) < 2:
            continue
        if line.startswith("FAILED"):
            found[words[1]] = "FAILED"
        elif " PASSED " in line:
            if words[1] == "PASSED":
                found[words[0]] = "PASSED"
        elif line.startswith("PASSED"):
            found[words[1]] = "PASSED"
    return found


_DJANGO_GOOD = (" ... ok", " ... OK", " ...  OK")
_DJANGO_BAD = (("FAIL", "FAILED"), ("ERROR", "ERROR"))
# Output between a test's dots and its "ok" that hides the name from a reader of lines.
_DJANGO_SPLIT = tuple(
    re.compile(rf"^(.*?)\s\.\.\.\s{noise}\nok$", re.MULTILINE)
    for noise in (
        r"Testing against Django installed in (?s:.*?) silenced\)\.",
        r"Internal Server Error: /.*/",
        r"System check identified no issues \(0 silenced\)",
    )
)
_DJANGO_VERSION = "--version is equivalent to version"
_DJANGO_SITES = "Applying sites.0002_alter_domain_unique...test_no_migrations"


def parse_django(log: str) -> dict[str, str]:
    """Parse the verbose unittest runner: ``test_x (package.Class) ... ok``, also with output in between."""
    found: dict[str, str] = {}
    last = None
    for line in map(str.strip, log.split("\n")):
        if _DJANGO_VERSION in line:
            found[_DJANGO_VERSION] = "PASSED"
        if " ... " in line:
            last = line.partition(" ... ")[0]
        good = next((end for end in _DJANGO_GOOD if line.endswith(end)), None)
        if good is not None:
            if line.startswith(_DJANGO_SITES):
                line = line.partition("...")[2].strip()
            found[line.rpartition(good)[0] if good in line else line] = "PASSED"
        if " ... skipped" in line:
            found[line.partition(" ... skipped")[0]] = "SKIPPED"
        for word, status in _DJANGO_BAD:
            if line.endswith(f" ... {word}"):
                found[line.partition(f" ... {word}")[0]] = status
            if line.startswith(f"{word}:") and len(line.split()) > 1:
                found[line.split()[1]] = status
        if line.startswith("ok") and last is not None:
            found[last] = "PASSED"
    for pattern in _DJANGO_SPLIT:
        found |= {match[1]: "PASSED" for match in pattern.finditer(log)}
    return found


_SYMPY_HEAD = re.compile(r" (.*)\.py:(.*) ")
_SYMPY_ENDS = {" E": "ERROR", " F": "FAILED", " ok": "PASSED"}


def parse_sympy(log: str) -> dict[str, str]:
    """Parse the lines of ``bin/test --verbose``, ``test_x ok``, and the headings of failures."""
    found = {f"{file}.py:{name}": "FAILED" for file, name in _SYMPY_HEAD.findall(log)}
    for line in map(str.strip, log.split("\n")):
        for end, status in _SYMPY_ENDS.items():
            if line.startswith("test_") and line.endswith(end):
                found[line.split()[0]] = status
    return found


def parse_r2e(log: str) -> dict[str, str]:
    """Parse pytest's summary with R2E-Gym's names: ids without their file, with parts joined by dots.

    As there, nothing before the summary counts, no status but these three, and a file that cannot be
    collected has an empty name.
    """
    found = {}
    for line in _COLOR.sub("", log.rpartition(SUMMARY)[2] if SUMMARY in log else "").split("\n"):
        status, _, rest = line.strip().partition(" ")
        if status in ("PASSED", "FAILED", "ERROR"):
            found[".".join(rest.partition(" - ")[0].strip().split("::")[1:])] = status
    return found


# Repository → parser; all others are read by `parse_pytest`.
PARSERS: dict[str, Parser] = {
    "astropy/astropy": parse_pytest_v2,
    "django/django": parse_django,
    "matplotlib/matplotlib": parse_matplotlib,
    "mwaskom/seaborn": parse_seaborn,
    "psf/requests": parse_pytest_options,
    "pydicom/pydicom": parse_pytest_options,
    "pylint-dev/pylint": parse_pytest_options,
    "scikit-learn/scikit-learn": parse_pytest_v2,
    "sphinx-doc/sphinx": parse_pytest_v2,
    "sympy/sympy": parse_sympy,
}
# Repository → its test command in SWE-bench's images.
COMMANDS: dict[str, str] = {
    "astropy/astropy": "pytest -rA -vv -o console_output_style=classic --tb=no",
    "django/django": (  # Python before 3.7 takes ASCII where nothing else is said
        "LANG=C.UTF-8 LC_ALL=C.UTF-8 PYTHONIOENCODING=utf8 "
        "./tests/runtests.py --verbosity 2 --settings=test_sqlite --parallel 1"
    ),
    "mwaskom/seaborn": "pytest --no-header -rA",
    "sympy/sympy": ("PYTHONWARNINGS='ignore::UserWarning,ignore::SyntaxWarning' bin/test -C --verbose"),
    "sphinx-doc/sphinx": "tox --current-env -epy39 -v --",
}
DEFAULT_COMMAND = "pytest -rA"  # releases before 5.3 know no --no-header

# Repository → what its test command and its tests are run by, where that is the repository's own: files, and
# folders with a slash at their end.
RUNNERS: dict[str, tuple[str, ...]] = {
    # The folder of the command is where Python looks for modules first. Names of before 1.6 are last.
    "sympy/sympy": (
        *("bin/", "sympy/testing/"),
        *("sympy/utilities/runtests.py", "sympy/utilities/pytest.py", "sympy/utilities/randtest.py"),
    ),
}

# Repository → folders that its test commands write to.
WRITABLE: dict[str, tuple[str, ...]] = {
    "matplotlib/matplotlib": ("result_images",),
    "sphinx-doc/sphinx": (".tox",),
}


def parser_of(repo: str) -> Parser:
    """Return the parser of a repository's logs."""
    return PARSERS.get(repo, parse_pytest)


def command_of(repo: str) -> str:
    """Return a repository's test command."""
    return COMMANDS.get(repo, DEFAULT_COMMAND)


def is_runner(repo: str, path: str) -> bool:
    """Whether a file belongs to the repository's own test runner."""
    return any(
        path.startswith(name) if name.endswith("/") else path == name for name in RUNNERS.get(repo, ())
    )


_BOTH = {"PASSED", "FAILED"}


def doubts(log: str, parser: Parser, code: int | None) -> list[str]:
    """Return what does not agree in a log: nothing for an honest one, however many tests fail.

    Args:
      log: the output of the test command.
      parser: its parser.
      code: exit code of the command, which the container's engine reports; None: not that of the tests.
    """
    said: dict[str, set[str]] = {}
    for line in log.split("\n"):
        for name, status in parser(f"{SUMMARY}\n{line}").items():
            said.setdefault(name, set()).add(status)
    # Passed with an error at its end is honest; passed and failed is not.
    found = [f"contradiction: {name} PASSED and FAILED" for name, all in said.items() if all >= _BOTH]
    # Before the summary stands what tests that passed have logged, errors among it.
    last = log[max(0, log.rfind(SUMMARY)) :]
    red = [name for name, status in parser(last).items() if status in ("FAILED", "ERROR")]
    if code == 0 and red:
        found.append(f"exit code 0 does not fit {len(red)} failures")
    return found


def is_believable(statuses: dict[str, str], code: int | None) -> bool:
    """Whether a command that failed also reports a failure, as the official harness demands."""
    return not code or not statuses or any(status in ("FAILED", "ERROR") for status in statuses.values())


def is_id(name: str) -> bool:
    """Whether a test's name is one that pytest takes: with its file, and not cut off in its parameters."""
    return ".py::" in name and name.count("[") <= name.count("]")


def test_targets(repo: str, files: set[str]) -> list[str]:
    """Return the arguments of the test command: the files, or Django's labels for them."""
    names = sorted(name for name in files if name.endswith(".py"))
    if repo == "django/django":
        return [name.removeprefix("tests/").removesuffix(".py").replace("/", ".") for name in names]
    return names
