"""A parser of a game's PDDL problem: the initial facts, and the goal as a list of literals.

The parser supports only the PDDL of ALFWorld's problems: lower-cased S-expressions, an ``:init`` of ground
atoms, and a goal of nested ``and`` and ``exists`` over atoms and ``(not (= ?a ?b))``.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping

# An atom of the goal: predicate and arguments. Arguments that start with "?" are variables.
Literal = tuple[str, ...]
DIFFER = "not ="

_COMMENT = re.compile(r";[^\n]*")
_ATOM = re.compile(r"\(([^()]+)\)")
_TOKEN = re.compile(r"[()]|[^\s()]+")
# Costs of movement, which are no part of the state.
_IGNORED = frozenset({"distance", "total-cost", "="})


class GameFileError(ValueError):
    """A game file that cannot be played. The message gives the reason.

    Attributes:
      kind: ``malformed``, ``unsolvable`` or ``unsupported``.
    """

    def __init__(self, message: str, kind: str = "malformed") -> None:
        """Store the message and the ``kind`` of the reason."""
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Problem:
    """A parsed problem.

    Attributes:
      objects: all declared identifiers.
      facts: predicate -> argument tuples for which it holds at the start.
      goal: literals that must all hold for some binding of their variables. Variables of different scopes
        have different names.
    """

    objects: frozenset[str]
    facts: Mapping[str, list[Literal]]
    goal: frozenset[Literal]


def parse_problem(text: str) -> Problem:
    """Parse the text of a PDDL problem.

    Raises:
      GameFileError: the text is no PDDL problem, or its goal has an unsupported form.
    """
    if not text.isascii():
        raise GameFileError("pddl_problem holds characters outside ASCII")
    text = text.lower()
    if ";" in text:
        text = _COMMENT.sub("", text)
    if text.count("(") != text.count(")"):
        raise GameFileError("pddl_problem: its parentheses do not match (cut off?)")
    starts = [text.find(section) for section in ("(:objects", "(:init", "(:goal")]
    if -1 in starts or starts != sorted(starts):
        raise GameFileError("pddl_problem needs the sections (:objects, (:init and (:goal, in this order")
    objects, init, goal = starts
    facts: dict[str, list[Literal]] = collections.defaultdict(list)
    for atom in _ATOM.findall(text, init, goal):
        predicate, *arguments = atom.split() or [""]
        if predicate not in _IGNORED:
            facts[predicate].append(tuple(arguments))
    return Problem(
        objects=frozenset(text[objects:init].split()) - {"-"},
        facts=facts,
        goal=frozenset(parse_goal(text[goal:])),
    )


def parse_goal(text: str) -> list[Literal]:
    """Parse the literals of a ``(:goal …)`` section; text after its end is ignored.

    Raises:
      GameFileError: the goal is not a conjunction of atoms under ``exists``.
    """
    tokens = _TOKEN.finditer(text)
    tree = _read(tokens)
    if not isinstance(tree, list) or len(tree) != 2 or tree[0] != ":goal":
        raise GameFileError("pddl_problem: (:goal holds one formula")
    found: list[Literal] = []
    _flatten(tree[1], {}, found)
    return found


def _read(tokens: Iterator[re.Match[str]]) -> list | str:
    stack: list[list] = []
    for match in tokens:
        token = match.group()
        if token == "(":
            stack.append([])
        elif token != ")":
            if not stack:
                return token
            stack[-1].append(token)
        elif len(stack) == 1:
            return stack[0]
        else:
            done = stack.pop()
            stack[-1].append(done)
    raise GameFileError("pddl_problem: the goal is cut off")


def _flatten(tree: list | str, scope: dict[str, str], found: list[Literal]) -> None:
    """Append the literals of a formula to ``found``; ``scope`` maps its variables to unique names."""
    match tree:
        case ["and", *parts]:
            for part in parts:
                _flatten(part, scope, found)
        case ["exists", [*names], body]:
            renamed = {name: f"{name}.{len(found)}" for name in names if str(name).startswith("?")}
            _flatten(body, {**scope, **renamed}, found)
        case ["not", ["=", str(one), str(two)]]:
            found.append((DIFFER, *sorted((scope.get(one, one), scope.get(two, two)))))
        case ["or" | "not" | "forall" | "imply" as word, *_]:
            raise GameFileError(f"pddl_problem: this use of '{word}' is not understood in a goal")
        case [str(predicate), *arguments] if all(isinstance(argument, str) for argument in arguments):
            found.append((predicate, *(scope.get(str(name), str(name)) for name in arguments)))
        case _:
            raise GameFileError(f"pddl_problem: not understood in a goal: {str(tree)[:60]}")
