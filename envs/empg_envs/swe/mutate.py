"""Small bugs for Python source code: single syntactic changes, grouped in families.

Every mutation edits the text of one node of the syntax tree. The rest of the file keeps its layout, so that
the gold patch is as small as a real one.
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from empg_envs.swe.syntax import parse
from empg_envs.swe.tree import File, Tree, is_test


class Mutation(NamedTuple):
    """A mutation: the name of its family, its line (from 1), and the whole changed source."""

    family: str
    line: int
    source: str


class _Edit(NamedTuple):
    """A replacement of ``source[start:end]`` by ``text``."""

    start: int
    end: int
    text: str


COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "%"),
    ast.Mod: ("%", "//"),
}
BOOLEANS = {ast.And: ("and", "or"), ast.Or: ("or", "and")}


class Source:
    """A source text with the offsets of its lines."""

    def __init__(self, text: str) -> None:
        """Parse the text.

        Raises:
          SyntaxError: the text does not parse.
        """
        self.text = text
        self.tree = parse(text)
        self._starts = [0]
        for line in text.split("\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)
        self._lines = text.split("\n")

    def start(self, node: ast.expr | ast.stmt) -> int:
        """Return the offset of a node's first character."""
        return self._offset(node.lineno, node.col_offset)

    def line_start(self, number: int) -> int:
        """Return the offset of a line's first character; lines count from 1."""
        return self._starts[number - 1]

    def end(self, node: ast.expr | ast.stmt) -> int:
        """Return the offset after a node's last character."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self._offset(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.expr | ast.stmt) -> str:
        """Return a node's text."""
        return self.text[self.start(node) : self.end(node)]

    def _offset(self, line: int, column: int) -> int:
        # The columns of syntax trees count UTF-8 bytes, not characters.
        characters = len(self._lines[line - 1].encode()[:column].decode())
        return self._starts[line - 1] + characters


def mutations(text: str) -> list[Mutation]:
    """Return every single-change bug of a source text that still parses, in the order of the text.

    The families are ``compare``, ``boolean``, ``arithmetic``, ``constant``, ``condition`` (negated),
    ``guard`` (an ``if`` without ``else`` is dropped) and ``arguments`` (two arguments of a call are swapped).
    Docstrings and annotations are not changed.

    Raises:
      SyntaxError: the text does not parse.
    """
    source = Source(text)
    found = []
    for node in _nodes(source.tree):
        for family, edits in FAMILIES.items():
            for edit in edits(source, node):
                changed = text[: edit.start] + edit.text + text[edit.end :]
                if changed != text and _parses(changed):
                    found.append(Mutation(family, text.count("\n", 0, edit.start) + 1, changed))
    return sorted(found, key=lambda mutation: (mutation.line, mutation.family, mutation.source))


def bugs(tree: Tree, seed: int, *, one_line: bool = False) -> Iterator[tuple[str, str, int, Tree]]:
    """Yield family, path, line and broken tree of every mutation outside of tests, in a seeded order."""
    found = []
    for path, file in tree.items():
        if not path.endswith(".py") or is_test(path) or path in ("setup.py", "conftest.py"):
            continue
        if path.startswith(("docs/", "doc/", "examples/", "benchmarks/", "bench/")):
            continue
        try:
            changes = mutations(file.data.decode("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found += [(change, path) for change in changes]
    random.Random(seed).shuffle(found)
    for change, path in found:
        before = tree[path]
        after = change.source.encode()
        if one_line and after.count(b"\n") != before.data.count(b"\n"):
            continue
        yield change.family, path, change.line, {**tree, path: File(after, before.mode)}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those of annotations, decorators and ``__name__`` guards."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.If) and "__name__" in ast.dump(child.test):
                continue
            if isinstance(child, ast.AST):
                yield child
                yield from _nodes(child)


def _parses(text: str) -> bool:
    try:
        parse(text)
    except SyntaxError:
        return False
    return True


def _between(source: Source, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[_Edit]:
    """Yield the edit that replaces the operator between two operands."""
    start, end = source.end(left), source.start(right)
    edge = r"\b" if old[0].isalpha() else ""
    pattern = edge + r"\s+".join(map(re.escape, old.split())) + edge
    matches = list(re.finditer(pattern, source.text[start:end]))
    if len(matches) == 1:  # with several matches, one may be in a comment
        yield _Edit(start + matches[0].start(), start + matches[0].end(), new)


def _compare(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.Compare):
        for left, operator, right in zip(
            [node.left, *node.comparators], node.ops, node.comparators, strict=False
        ):
            yield from _between(source, left, right, *COMPARISONS[type(operator)])


def _boolean(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from _between(source, left, right, *BOOLEANS[type(node.op)])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _Edit(source.start(node), source.end(node), source.segment(node.operand))


def _arithmetic(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
        yield from _between(source, node.left, node.right, *ARITHMETIC[type(node.op)])
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        old, new = ARITHMETIC[type(node.op)]
        yield from _between(source, node.target, node.value, f"{old}=", f"{new}=")


def _is_text(node: ast.BinOp) -> bool:
    return any(
        isinstance(side, ast.Constant | ast.JoinedStr) and _holds_text(side)
        for side in (node.left, node.right)
    )


def _holds_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def _constant(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if not isinstance(node, ast.Constant):
        return
    if isinstance(node.value, bool):
        yield _Edit(source.start(node), source.end(node), str(not node.value))
    elif isinstance(node.value, int) and source.segment(node).isdigit():
        for value in {node.value + 1, max(0, node.value - 1)} - {node.value}:
            yield _Edit(source.start(node), source.end(node), str(value))


def _condition(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.UnaryOp):
        text = source.segment(node.test)
        wrapped = text if isinstance(node.test, ast.Name | ast.Call | ast.Attribute) else f"({text})"
        yield _Edit(source.start(node.test), source.end(node.test), f"not {wrapped}")


def _guard(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.If) and not node.orelse:
        start, end = source.start(node), source.end(node)
        if source.text[start : start + 2] == "if":  # dropping an elif would break its chain
            yield _Edit(start, end, "pass")


def _arguments(source: Source, node: ast.AST) -> Iterator[_Edit]:
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        one, two = node.args[0], node.args[1]
        if not isinstance(one, ast.Starred) and not isinstance(two, ast.Starred):
            between = source.text[source.end(one) : source.start(two)]
            text = source.segment(two) + between + source.segment(one)
            yield _Edit(source.start(one), source.end(two), text)


FAMILIES: dict[str, Callable[[Source, ast.AST], Iterator[_Edit]]] = {
    "compare": _compare,
    "boolean": _boolean,
    "arithmetic": _arithmetic,
    "constant": _constant,
    "condition": _condition,
    "guard": _guard,
    "arguments": _arguments,
}
