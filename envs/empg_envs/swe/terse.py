"""Terse tools with a closed vocabulary, for models that are too small to spell words.

The commands are ``view FILE LINE``, ``edit FILE LINE : CODE`` (the line keeps its indentation), ``test`` and
``submit``. Code is written as Python tokens separated by single spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from empg_envs.swe import grading
from empg_envs.swe.sandbox import FileError, Sandbox
from empg_envs.swe.tasks import Task
from empg_envs.swe.tools import Reply
from empg_envs.swe.tree import Tree, is_test

AROUND = 3  # number of lines shown on either side
NAMED = 3  # largest number of failing tests in an observation
TEST_SECONDS = 30.0
_VIEW = re.compile(r"view (\S+) (\d{1,6})")
_EDIT = re.compile(r"edit (\S+) (\d{1,6}) ?: ?(.*)", re.DOTALL)
_PREFIX = r"(?:[rR][bBfF]?|[bBfF][rR]?|[uU])?"
_DIGITS = "[0-9](?:_?[0-9])*"
_TOKEN = re.compile(
    rf"""
    {_PREFIX}(?:"{{3}}(?:[^\\]|\\.)*?"{{3}}|'{{3}}(?:[^\\]|\\.)*?'{{3}})  # a string in three quotes
    | (?P<end>{_PREFIX}(?:"{{3}}|'{{3}})|\#|\\$)
    | {_PREFIX}(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | 0[xX](?:_?[0-9a-fA-F])+|0[oO](?:_?[0-7])+|0[bB](?:_?[01])+
    | (?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?{_DIGITS})?[jJ]?
    | \w+
    | \*\*=?|//=?|<<=?|>>=?|\.\.\.|->|:=|[-+*/%&@|^=<>]=|!=
    | \S
    """,
    re.VERBOSE,
)
_WORDS = {
    *("view", "edit", "test", "submit", ":", "fix", "failing", "nothing", ".", ",", "no", "such", "file"),
    *("line", "unknown", "command", "changed", "handed", "in", "tests", "did", "not", "run", "all"),
    *("pass", "the"),
}


def code_tokens(line: str) -> list[str]:
    """Return the Python tokens of a line, or its words if it is no Python code.

    A string is one token, with its prefix. A comment, and a string that goes on in the next line, end it.
    The module `tokenize` would not do: since Python 3.12 it takes f-strings apart, and stops at prose.
    """
    found = []
    for match in _TOKEN.finditer(line.strip()):
        if match.lastgroup == "end":
            break
        found.append(match.group())
    return found


def show_line(number: int, line: str) -> str:
    """Return ``12 : return a + b``."""
    return f"{number} : {' '.join(code_tokens(line))}".rstrip()


def short_test(name: str) -> str:
    """Return the last part of a test's id."""
    return name.rpartition("::")[2]


def opening(task: Task) -> str:
    """Return the first observation: the repository and the failing tests."""
    return f"fix {task.repo} . {failing(task.fail_to_pass)}"


def failing(names: Iterable[str]) -> str:
    """Return ``failing test_a , test_b``."""
    shown = sorted({short_test(name) for name in names})[:NAMED]
    return f"failing {' , '.join(shown)}" if shown else "failing nothing"


class TerseTools:
    """The terse tools of one sandbox."""

    def __init__(self, sandbox: Sandbox, task: Task, test_command: str) -> None:
        """Store sandbox and task; ``test_command`` is the test runner, which reads its request from stdin."""
        self._sandbox, self._task, self._test_command = sandbox, task, test_command

    def run(self, action: str, seconds: float) -> Reply:
        """Carry out one command; any other text gives the reply for unknown commands."""
        text = " ".join(action.split())
        if text == "submit":
            return Reply("handed in .", is_final=True)
        if text == "test":
            return Reply(self._test(min(seconds, TEST_SECONDS)))
        try:
            if match := _VIEW.fullmatch(text):
                return Reply(self._view(match[1], int(match[2])))
            if match := _EDIT.fullmatch(text):
                return Reply(self._edit(match[1], int(match[2]), match[3]))
        except (FileError, UnicodeDecodeError):
            return Reply("no such file .")
        return Reply("unknown command .")

    def _view(self, path: str, line: int) -> str:
        lines = self._sandbox.read(path).decode().split("\n")
        if not 1 <= line <= len(lines):
            return "no such line ."
        first, last = max(1, line - AROUND), min(len(lines), line + AROUND)
        return "\n".join(show_line(number, lines[number - 1]) for number in range(first, last + 1))

    def _edit(self, path: str, line: int, code: str) -> str:
        lines = self._sandbox.read(path).decode().split("\n")
        if not 1 <= line <= len(lines):
            return "no such line ."
        old = lines[line - 1]
        lines[line - 1] = old[: len(old) - len(old.lstrip())] + code
        self._sandbox.write(path, "\n".join(lines).encode("utf-8", "replace"))
        return f"changed . {show_line(line, lines[line - 1])}"

    def _test(self, seconds: float) -> str:
        request = {
            "runner": self._task.runner,
            "root": self._sandbox.root,
            "paths": [self._task.test_path],
        }
        result = self._sandbox.exec(self._test_command, seconds, stdin=json.dumps(request).encode())
        # Tests that fail make an exit code, too; a negative one is that of a crash.
        if result.reason != "exit" or result.returncode < 0 or not result.report:
            return "the tests did not run ."
        statuses = grading.read_report(result.report, self._sandbox.root)
        red = [name for name, status in statuses.items() if status not in grading.KEPT]
        return failing(red) + " ." if red else "all tests pass ."


def vocabulary(trees: Iterable[Tree]) -> list[str]:
    """Return all tokens that the terse tools can show for these trees and their one-token bugs, sorted."""
    found, longest = set(_WORDS), 0
    operators = (
        "<",
        "<=",
        ">",
        ">=",
        "==",
        "!=",
        "in",
        "is",
        "and",
        "or",
        "not",
        "+",
        "-",
        "*",
        "/",
        "//",
        "%",
    )
    found |= {*operators, "+=", "-=", "True", "False", "None", "(", ")"}
    for tree in trees:
        for path, file in tree.items():
            if not path.endswith(".py"):
                continue
            text = file.data.decode()
            if is_test(path):
                found |= set(re.findall(r"def (test_\w+)", text))
                continue
            found.add(path)
            longest = max(longest, text.count("\n") + 1)
            for line in text.split("\n"):
                for token in code_tokens(line):
                    found.add(token)
                    if token.isdigit():  # a mutation may change a constant to these values
                        found |= {str(int(token) + 1), str(max(0, int(token) - 1))}
            found.add(path.partition("/")[0].removesuffix(".py"))
    return sorted(found | {str(number) for number in range(longest + 1)})
