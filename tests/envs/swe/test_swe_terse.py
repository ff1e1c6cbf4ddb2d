"""What the terse tools show of a line: the same on every version of Python."""

import io
import sys
import tokenize
from pathlib import Path

import pytest

from empg_envs.swe import terse


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
