"""Recognition of the task family and of the object classes of a PDDL goal.

A goal is compared with the formula of each of the six families. The comparison ignores names of variables,
the order of parts, and the nesting of quantifiers. A goal that matches has exactly the meaning of the
`HouseholdGoal`; all other goals are refused.
"""

from __future__ import annotations

import collections
import functools

from empg_envs.alfworld.problem import DIFFER, GameFileError, Literal, Problem, parse_goal
from empg_envs.household.goals import HouseholdGoal
from empg_envs.household.tables import CLEAN, COOL, EXAMINE, HEAT, PICK, PICK_TWO

_IN = "(inreceptacle ?o ?r) (objecttype ?o {thing}) (receptacletype ?r {target})"
FORMULAS = {
    PICK: f"(exists (?r - receptacle ?o - object) (and {_IN}))",
    CLEAN: f"(exists (?r - receptacle ?o - object) (and (cleanable ?o) (isclean ?o) {_IN}))",
    HEAT: f"(exists (?r - receptacle ?o - object) (and (heatable ?o) (ishot ?o) {_IN}))",
    COOL: f"(exists (?r - receptacle ?o - object) (and (coolable ?o) (iscool ?o) {_IN}))",
    PICK_TWO: (
        f"(exists (?r - receptacle ?o - object) (and {_IN} (exists (?p - object) (and "
        "(not (= ?o ?p)) (objecttype ?p {thing}) (inreceptacle ?p ?r)))))"
    ),
    EXAMINE: (
        "(exists (?t - object ?r - receptacle ?a - agent ?l - location) (and (objecttype ?t {target}) "
        "(toggleable ?t) (istoggled ?t) (receptacleatlocation ?r ?l) (atlocation ?a ?l) "
        "(inreceptacle ?t ?r))) "
        "(exists (?o - object ?b - agent) (and (objecttype ?o {thing}) (holds ?b ?o)))"
    ),
}
TYPE_SUFFIX = "type"


def recognize(problem: Problem) -> HouseholdGoal:
    """Recognize the goal of a problem.

    Raises:
      GameFileError: the goal belongs to no family, or refers to classes that the problem does not declare.
    """
    unknown = sorted(
        name
        for literal in problem.goal
        for name in literal[1:]
        if not name.startswith("?") and name not in problem.objects
    )
    if unknown:
        raise GameFileError(f"the goal names the undeclared object {unknown[0]!r}")
    family = _shapes().get(_shape(problem.goal))
    if family is None:
        raise GameFileError("the goal is of none of the six task families")
    if family == EXAMINE:
        lamps = {
            variable for name, *variables in problem.goal if name == "istoggled" for variable in variables
        }
        types = {variable: kind for name, variable, kind in _typed(problem.goal, "objecttype")}
        (lamp,) = lamps
        (thing,) = set(types) - lamps
        return HouseholdGoal(family, class_name(types[thing]), class_name(types[lamp]))
    things = {kind for _, _, kind in _typed(problem.goal, "objecttype")}
    targets = {kind for _, _, kind in _typed(problem.goal, "receptacletype")}
    if len(things) != 1 or len(targets) != 1:
        raise GameFileError("the goal wants objects of different types, which is none of the six families")
    return HouseholdGoal(family, class_name(things.pop()), class_name(targets.pop()))


def class_name(kind: str) -> str:
    """Return the object class of a PDDL type: ``mugtype`` is ``mug``."""
    return kind.removesuffix(TYPE_SUFFIX)


def _typed(goal: frozenset[Literal], predicate: str) -> list[Literal]:
    return [literal for literal in goal if literal[0] == predicate]


@functools.cache
def _shapes() -> dict[tuple, str]:
    """Return the family of each formula, by the formula's shape."""
    return {
        _shape(frozenset(parse_goal(f"(:goal (and {text}))".format(thing="x", target="y")))): family
        for family, text in FORMULAS.items()
    }


def _shape(goal: frozenset[Literal]) -> tuple:
    """Return a form of a goal that does not depend on the names of variables.

    A variable is replaced by the list of all places (predicate, position) where it occurs.
    """
    places: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for predicate, *arguments in goal:
        for position, name in enumerate(arguments):
            # An inequality is symmetric, so both sides count as one position.
            places[name].append((predicate, 0 if predicate == DIFFER else position))

    def describe(name: str) -> tuple:
        return tuple(sorted(places[name])) if name.startswith("?") else ("constant",)

    shape = []
    for predicate, *arguments in goal:
        described = [describe(name) for name in arguments]
        shape.append((predicate, tuple(map(str, sorted(described) if predicate == DIFFER else described))))
    return tuple(sorted(shape))
