"""One wrong expectation in a copy of a test, chosen so that the copy must fail where the test passes."""

from __future__ import annotations

import ast
import math
import random
import string
from typing import NamedTuple

from empg_envs.swe.mutate import Source


class Spoil(NamedTuple):
    """An edit that spoils a test.

    Attributes:
      start: offset of the text that is replaced.
      end: offset after it.
      text: the new text.
      is_sure: whether even wrong code fails the spoiled test, because it cannot hit on the wrong value.
    """

    start: int
    end: int
    text: str
    is_sure: bool


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


def spoiled(
    source: Source, function: ast.FunctionDef | ast.AsyncFunctionDef, draw: random.Random
) -> Spoil | None:
    """Return an edit that makes a test fail wherever it passes; None if there is none.

    Only statements of the test's own body count, which are always reached. Sure ones are preferred. (An
    opposite, ``assertFalse`` for ``assertTrue``, passes with wrong code.)

    Args:
      source: the file.
      function: the test.
      draw: chooses the statement and the wrong value.
    """
    if any(isinstance(node, ast.Yield | ast.YieldFrom | ast.Return) for node in ast.walk(function)):
        return None
    found = []
    for statement in function.body:
        spoil = _of_equality(source, statement, draw) or _of_opposite(source, statement)
        if spoil is not None:
            found.append(spoil)
    best = [spoil for spoil in found if spoil.is_sure] or found
    return draw.choice(best) if best else None


def _of_equality(source: Source, statement: ast.stmt, draw: random.Random) -> Spoil | None:
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
    return Spoil(source.start(side), source.end(side), _wrong(source, side, draw), True)


def _of_opposite(source: Source, statement: ast.stmt) -> Spoil | None:
    match statement:
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=attr) as func)):
            if attr in OPPOSITES:
                return Spoil(source.end(func) - len(attr), source.end(func), OPPOSITES[attr], False)
        case ast.With(items=[ast.withitem(context_expr=ast.Call(func=ast.Attribute(attr=attr)))], body=body):
            if attr in RAISING:  # nothing raises any more
                return Spoil(source.start(body[0]), source.end(body[-1]), "pass", True)
        case ast.Assert(test=test):
            return Spoil(source.start(test), source.end(test), f"not ({source.segment(test)})", False)
    return None


def _is_plain(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant | ast.List | ast.Tuple | ast.Dict | ast.Set) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant)
    )


def _wrong(source: Source, node: ast.expr, draw: random.Random) -> str:
    """Return the source of a value of the same kind that no code hits on by mistake."""
    text, extra = source.segment(node), "".join(draw.choices(string.ascii_letters, k=4))
    match node:
        case ast.Constant(value=bool()):
            return f"[{extra!r}]"
        case ast.Constant(value=int(value)):
            return repr(value + draw.randrange(10_000, 99_999))
        case ast.Constant(value=float(value)) if math.isfinite(value):
            return repr(2 * value + draw.randrange(10_000, 99_999))  # a sum alone is lost in a large number
        case ast.Constant(value=str(value)):
            return repr(value + extra)
        case ast.Constant(value=bytes(value)):
            return repr(value + extra.encode())
        case ast.List():
            return f"[*{text}, {extra!r}]"
        case ast.Tuple():
            return f"(*{text if text.startswith('(') else f'({text})'}, {extra!r})"
        case ast.Dict():
            return f"{{**{text}, {extra!r}: {extra!r}}}"
        case ast.Set():
            return f"{{*{text}, {extra!r}}}"
    return f"[{extra!r}]"
