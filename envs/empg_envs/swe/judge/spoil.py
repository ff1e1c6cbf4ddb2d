"""One wrong expectation in a copy of a test, chosen so that the copy must fail where the test passes."""

from __future__ import annotations

import ast
import math
import random
import string

from empg_envs.swe.mutate import Source

Edit = tuple[int, int, str]  # start, end, new text

EQUAL = frozenset(("assertEqual", "assertEquals", "assertListEqual", "assertTupleEqual", "assertDictEqual"))
RAISING = frozenset(("assertRaises", "assertRaisesRegex", "raises"))
OPPOSITES = {
    "assertTrue": "assertFalse",
    "assertIn": "assertNotIn",
    "assertIsNone": "assertIsNotNone",
    "assertGreater": "assertLessEqual",
    "assertLess": "assertGreaterEqual",
    "assertNotEqual": "assertEqual",
}
OPPOSITES |= {new: old for old, new in OPPOSITES.items()}


def spoiled(source: Source, function: ast.FunctionDef, draw: random.Random) -> Edit | None:
    """Return an edit that makes a test fail wherever it passes; None if there is none.

    Only statements of the test's own body count, which are always reached. Equalities are preferred: they
    also find objects that claim to equal everything.

    Args:
      source: the file.
      function: the test.
      draw: chooses the statement and the wrong value.
    """
    if any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Return) for node in ast.walk(function)):
        return None
    equal, other = [], []
    for statement in function.body:
        edit = _of_equality(source, statement, draw)
        if edit is not None:
            equal.append(edit)
        elif (edit := _of_opposite(source, statement)) is not None:
            other.append(edit)
    found = equal or other
    return draw.choice(found) if found else None


def _of_equality(source: Source, statement: ast.stmt, draw: random.Random) -> Edit | None:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr), args=args)):
            if attr not in EQUAL or len(args) < 2 or any(isinstance(arg, ast.Starred) for arg in args):
                return None
            sides = (args[0], args[1])
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            sides = (left, right)
        case _:
            return None
    # The expected value is usually the one that is written out.
    side = sides[0] if _is_plain(sides[0]) and not _is_plain(sides[1]) else sides[1]
    return source.start(side), source.end(side), _wrong(source, side, draw)


def _of_opposite(source: Source, statement: ast.stmt) -> Edit | None:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr) as func)):
            if attr in OPPOSITES:
                return source.end(func) - len(attr), source.end(func), OPPOSITES[attr]
        case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Attribute(attr=attr)))], body=body):
            if attr in RAISING:  # nothing raises any more
                return source.start(body[0]), source.end(body[-1]), "pass"
        case ast.Assert(test=test):
            return source.start(test), source.end(test), f"not ({source.segment(test)})"
    return None


def _is_plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.List | ast.Tuple | ast.Dict | ast.Set) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
    )


def _wrong(source: Source, node: ast.expr, draw: random.Random) -> str:
    """Return the source of a value of the same kind that differs."""
    text, extra = source.segment(node), "".join(draw.choices(string.ascii_letters, k=4))
    match node:
        case ast.Constant(value=bool(value)):
            return repr(not value)
        case ast.Constant(value=int(value)):
            return repr(value + draw.randrange(1, 9))
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return repr(2 * value + draw.randrange(1, 9))  # a sum alone is lost in a large number
        case ast.Constant(value=str(value)):
            return repr(value + extra[0])
        case ast.Constant(value=bytes(value)):
            return repr(value + extra[:1].encode())
        case ast.List():
            return f"[*{text}, {extra!r}]"
        case ast.Tuple():
            return f"(*{text if text.startswith('(') else f'({text})'}, {extra!r})"
        case ast.Dict():
            return f"{{**{text}, {extra!r}: {extra!r}}}"
        case ast.Set():
            return f"{{*{text}, {extra!r}}}"
    return f"[{extra!r}]"
