"""What the terse tools show of a line: the same on every version of Python."""

import dataclasses
import io
import sys
import tokenize
import types
from pathlib import Path

import pytest

from empg_envs.swe import patches, terse
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.sandbox import ExecResult
from empg_envs.swe.tasks import Task, broken_tree


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ("  return f\"{a} of {b!r:>{n}}\" + rb'x\\'y'", ["return", 'f"{a} of {b!r:>{n}}"', "+", "rb'x\\'y'"]),
        ("x **= 1_000.5e-3j  # a comment", ["x", "**=", "1_000.5e-3j"]),
        ("if (n := 0x_ff) != .5 -> ...:", ["if", "(", "n", ":=", "0x_ff", ")", "!=", ".5", "->", "...", ":"]),
        ('y = """whole""" + f"""{z}"""', ["y", "=", '"""whole"""', "+", 'f"""{z}"""']),
        ('"""Begins here', []),
        ('z = """and goes on', ["z", "="]),
        ("don't ask", ["don", "'", "t", "ask"]),
        ("a = b + \\", ["a", "=", "b", "+"]),
        ("", []),
    ],
)
def test_tokens(line, tokens):
    assert terse.code_tokens(line) == tokens


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="f-strings are several tokens since Python 3.12")
def test_lines_of_code_have_the_tokens_of_the_language():
    skipped = {tokenize.NEWLINE, tokenize.ENDMARKER, tokenize.COMMENT, tokenize.NL}
    seen = 0
    for file in Path(terse.__file__).parent.glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                compile(line.strip(), "line", "exec")
            except SyntaxError:
                continue
            read = tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)
            assert terse.code_tokens(line) == [each.string for each in read if each.type not in skipped]
            seen += 1
    assert seen > 1000


@pytest.mark.parametrize("runner", ["pytest", "unittest"])
def test_red_tests_did_run(backend: TreeBackend, task: Task, runner: str) -> None:
    task = dataclasses.replace(task, runner=runner)
    sandbox = backend.open(task)
    tools = terse.TerseTools(sandbox, task, backend.test_command)
    assert tools.run("test", 60).text == f"{terse.failing(task.fail_to_pass)} ."
    for path, file in patches.apply(broken_tree(task), task.patch).items():
        sandbox.write(path, file.data)
    assert tools.run("test", 60).text == "all tests pass ."
    sandbox.write("spans.py", b"import os\nos._exit(1)\n")
    assert tools.run("test", 60).text == "the tests did not run ."
    sandbox.close()


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (ExecResult("", 1, report=b'["t.py::test_a", "FAILED"]\n'), "failing test_a ."),
        (ExecResult("", 0, report=b'["t.py::test_a", "PASSED"]\n'), "all tests pass ."),
        (ExecResult("", -9, "timeout", report=b'["t.py::test_a", "PASSED"]\n'), "the tests did not run ."),
        (ExecResult("", -11, report=b'["t.py::test_a", "PASSED"]\n'), "the tests did not run ."),
        (ExecResult("", 4), "the tests did not run ."),
    ],
)
def test_what_a_run_of_tests_says(task: Task, result: ExecResult, says: str) -> None:
    sandbox = types.SimpleNamespace(root="/testbed", exec=lambda *_, **__: result)
    assert terse.TerseTools(sandbox, task, "run").run("test", 60).text == says
