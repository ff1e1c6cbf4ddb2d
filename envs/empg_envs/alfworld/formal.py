"""The PDDL domain and the text grammar for game files that this package writes.

The original TextWorld engine needs both to play a file; the native engine reads neither. The names of actions
and predicates are those of ALFWorld's format, release 2.1.2.
"""

from __future__ import annotations

import json

_PREDICATES = """
(atLocation ?a - agent ?l - location) (receptacleAtLocation ?r - receptacle ?l - location)
(objectAtLocation ?o - object ?l - location) (inReceptacle ?o - object ?r - receptacle)
(isReceptacleObject ?o - object) (inReceptacleObject ?i - object ?o - object)
(receptacleType ?r - receptacle ?t - rtype) (objectType ?o - object ?t - otype)
(canContain ?rt - rtype ?ot - otype) (holds ?a - agent ?o - object) (holdsAny ?a - agent)
(openable ?r - receptacle) (opened ?r - receptacle) (pickupable ?o - object) (checked ?x)
(cleanable ?o - object) (isClean ?o - object) (heatable ?o - object) (isHot ?o - object)
(coolable ?o - object) (isCool ?o - object) (toggleable ?o - object) (isToggled ?o - object)
(sliceable ?o - object) (isSliced ?o - object)
"""

_AT = "(atLocation ?a ?l) (receptacleAtLocation ?r ?l)"
_UNBLOCKED = "(or (not (openable ?r)) (opened ?r))"
_WHO = "?a - agent ?l - location ?r - receptacle"

# Action: parameters, precondition, effect, command, feedback.
_ACTIONS = {
    "look": ("?a - agent ?l - location", "(atLocation ?a ?l)", "(checked ?l)", "look", "#view#"),
    "inventory": ("?a - agent", "", "(checked ?a)", "inventory", "#carried#"),
    "help": ("?a - agent", "", "(checked ?a)", "help", "#commands#"),
    "examineReceptacle": (
        _WHO, _AT, "(checked ?r)", "examine {r}", "#inspection#",
    ),
    "examineObject": (
        "?a - agent ?o - object", "(holds ?a ?o)", "(checked ?o)", "examine {o}", "#state#",
    ),
    "GotoLocation": (
        "?a - agent ?from - location ?lend - location ?r - receptacle",
        "(atLocation ?a ?from) (receptacleAtLocation ?r ?lend) (not (= ?from ?lend))",
        "(not (atLocation ?a ?from)) (atLocation ?a ?lend)",
        "go to {r}", "You arrive at {r.name}. #inspection#",
    ),
    "OpenObject": (
        _WHO, f"(openable ?r) {_AT} (not (opened ?r))", "(opened ?r)",
        "open {r}", "You open the {r.name}. #inspection#",
    ),
    "CloseObject": (
        _WHO, f"(openable ?r) {_AT} (opened ?r)", "(not (opened ?r))",
        "close {r}", "You close the {r.name}.",
    ),
    "PickupObject": (
        f"{_WHO} ?o - object",
        f"(pickupable ?o) {_AT} (inReceptacle ?o ?r) (not (holdsAny ?a)) {_UNBLOCKED}",
        "(not (inReceptacle ?o ?r)) (not (objectAtLocation ?o ?l)) (holds ?a ?o) (holdsAny ?a)",
        "take {o} from {r}", "You pick up the {o.name} from the {r.name}.",
    ),
    "PutObject": (
        f"{_WHO} ?o - object ?ot - otype ?rt - rtype",
        f"(holds ?a ?o) {_AT} {_UNBLOCKED} (objectType ?o ?ot) (receptacleType ?r ?rt) (canContain ?rt ?ot)",
        "(inReceptacle ?o ?r) (objectAtLocation ?o ?l) (not (holds ?a ?o)) (not (holdsAny ?a))",
        "move {o} to {r}", "You move the {o.name} to the {r.name}.",
    ),
    "CleanObject": (
        f"{_WHO} ?o - object", f"(cleanable ?o) (receptacleType ?r SinkbasinType) {_AT} (holds ?a ?o)",
        "(isClean ?o)", "clean {o} with {r}", "You clean the {o.name} using the {r.name}.",
    ),
    "HeatObject": (
        f"{_WHO} ?o - object", f"(heatable ?o) (receptacleType ?r MicrowaveType) {_AT} (holds ?a ?o)",
        "(isHot ?o) (not (isCool ?o))", "heat {o} with {r}", "You heat the {o.name} using the {r.name}.",
    ),
    "CoolObject": (
        f"{_WHO} ?o - object", f"(coolable ?o) (receptacleType ?r FridgeType) {_AT} (holds ?a ?o)",
        "(isCool ?o) (not (isHot ?o))", "cool {o} with {r}", "You cool the {o.name} using the {r.name}.",
    ),
    "ToggleObject": (
        f"{_WHO} ?o - object", f"(toggleable ?o) {_AT} (inReceptacle ?o ?r)", "(isToggled ?o)",
        "use {o}", "You turn on the {o.name}.",
    ),
    "SliceObject": (
        "?a - agent ?l - location ?co - object ?ko - object",
        "(sliceable ?co) (or (objectType ?ko KnifeType) (objectType ?ko ButterknifeType)) "
        "(atLocation ?a ?l) (objectAtLocation ?co ?l) (holds ?a ?ko)",
        "(isSliced ?co)", "slice {co} with {ko}", "You sliced the {co.name} with the {ko.name}.",
    ),
}  # fmt: skip
# Types that occur in the domain; every problem must therefore declare them.
DOMAIN_RTYPES = ("SinkbasinType", "MicrowaveType", "FridgeType")
DOMAIN_OTYPES = ("KnifeType", "ButterknifeType")

_HERE = "atlocation(a:agent, l:location) & receptacleatlocation(r:receptacle, l:location)"
_MISPLACED = f"{_HERE} & objectatlocation(o:object, l:location) & not_inreceptacle(o:object, r:receptacle)"
_INSIDE = "[{o.indefinite + ' ' + o.name | inreceptacle(o:object, r:receptacle)}]"
_STATES = (
    ("isclean(o:object) & ishot(o:object) & issliced(o:object)", "hot and clean sliced"),
    ("isclean(o:object) & iscool(o:object) & issliced(o:object)", "cool and clean sliced"),
    ("isclean(o:object) & issliced(o:object)", "clean sliced"),
    ("ishot(o:object) & issliced(o:object)", "hot sliced"),
    ("iscool(o:object) & issliced(o:object)", "cool sliced"),
    ("isclean(o:object) & ishot(o:object)", "hot and clean"),
    ("isclean(o:object) & iscool(o:object)", "cool and clean"),
    ("ishot(o:object)", "hot"),
    ("isclean(o:object)", "clean"),
    ("iscool(o:object)", "cold"),
    ("issliced(o:object)", "sliced"),
)


def make_domain() -> str:
    """Return the domain in PDDL."""
    actions = "\n".join(
        f"(:action {name}\n  :parameters ({parameters})\n  :precondition (and {condition})\n"
        f"  :effect (and {effect}))"
        for name, (parameters, condition, effect, _, _) in _ACTIONS.items()
    )
    return (
        "(define (domain alfred)\n(:requirements :adl :typing)\n"
        "(:types agent location receptacle object rtype otype)\n"
        f"(:predicates {_PREDICATES})\n{actions}\n)\n"
    )


def make_grammar(task: str, help_text: str) -> str:
    """Return the text grammar of one game.

    Args:
      task: the task sentence.
      help_text: the answer to ``help``.
    """
    rules: dict[str, list[dict[str, str]]] = {
        "intro": [{"rhs": "-= Welcome to TextWorld, ALFRED! =-\n\n#view#\n\n#task#"}],
        "task": [{"rhs": f"Your task is to: {task}"}],
        "commands": [{"rhs": help_text}],
        "carried": [
            {
                "condition": "holdsany(a:agent)",
                "rhs": "You are carrying: [{o.indefinite + ' ' + o.name | holds(a:agent, o:object)}].",
            },
            {"rhs": "You are not carrying anything."},
        ],
        "inspection": [
            {
                "condition": "openable(r:receptacle) & opened(r:receptacle)",
                "rhs": f"The {{r.name}} is open. In it, you see {_INSIDE}.",
            },
            {"condition": "openable(r:receptacle)", "rhs": "The {r.name} is closed."},
            {"rhs": f"On the {{r.name}}, you see {_INSIDE}."},
        ],
        "state": [
            {
                "condition": "isreceptacleobject(o:object)",
                "rhs": "This is a normal {o.name}. In it, you see "
                "[{i.indefinite + ' ' + i.name | inreceptacleobject(i:object, o:object)}].",
            },
            *(
                {"condition": condition, "rhs": f"This is a {state} {{o.name}}."}
                for condition, state in _STATES
            ),
            {"rhs": "There's nothing special about {o.name}."},
        ],
        "view": [
            {
                "condition": _HERE,
                "rhs": f"You are facing the [{{r.name | {_HERE}}}]. Next to it, you see #misplaced#.",
            },
            {"rhs": "You are in the middle of a room. Looking quickly around you, you see #receptacles#."},
        ],
        "misplaced": [
            {"condition": _MISPLACED, "rhs": f"[{{#object_named(o)# | {_MISPLACED}}}]"},
            {"rhs": "nothing"},
        ],
        "receptacles": [
            {
                "condition": "receptacleatlocation(r:receptacle, l:location)",
                "rhs": "[{#receptacle_named(r)# | receptacleatlocation(r:receptacle, l:location)}]",
            },
            {"rhs": "nothing"},
        ],
        "object_named(o)": [{"rhs": "{o.indefinite} {o.name}"}],
        "receptacle_named(r)": [{"rhs": "{r.indefinite} {r.name}"}],
        "list_empty": [{"rhs": "nothing"}],
        "list_separator": [{"rhs": ", "}],
        "list_last_separator": [{"rhs": ", and "}],
    }
    rules |= {f"{name}.feedback": [{"rhs": feedback}] for name, (*_, feedback) in _ACTIONS.items()}
    actions = "\n\n".join(
        f'action {name} {{\n    template :: "{command}";\n    feedback :: "#{name}.feedback#";\n}}'
        for name, (_, _, _, command, _) in _ACTIONS.items()
    )
    return f'grammar :: """\n{json.dumps(rules, indent=1)}\n""";\n\n{actions}\n'
