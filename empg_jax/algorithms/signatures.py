"""The factories' keywords and the table of recipes, read as text, so that a configuration needs no JAX.

Every value stands once, in the source: a default in the signature of a pure function, or of the factory that
binds it; a named recipe in `empg_jax.algorithms.recipes`. Here both are read without running them. A test
compares the result with the imported modules.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_HERE = Path(__file__).parent
# The files of factories, and the slot of a recipe that each belongs to.
_SLOT_FILES = {
    "estimate": "estimate",
    "stepwise": "estimate",
    "penalise": "penalise",
    "modulate": "modulate",
    "objective": "objective",
    "correct": "correct",
    "keep": "keep",
    "aggregate": "aggregate",
    "regularize": "regularize",
}
_PURE = (
    "advantages",
    "anchors",
    "returns",
    "modulation",
    "surrogates",
    "losses",
    "corrections",
    "aggregation",
    "graph_credit",
    "histories",
    "milestones",
    "gains",
    "turn_values",
)


class Parameter(NamedTuple):
    """A keyword of a factory.

    Attributes:
      annotation: its type, as written.
      default: its default; `inspect.Parameter.empty` where it has none.
      sentence: its description in the factory's docstring.
    """

    annotation: str
    default: Any
    sentence: str

    @property
    def takes_none(self) -> bool:
        """Tell whether None is a value of its own."""
        return "None" in self.annotation

    @property
    def choices(self) -> tuple[Any, ...]:
        """List the values of a Literal; empty for other types."""
        if not self.annotation.startswith("Literal["):
            return ()
        return tuple(ast.literal_eval(f"[{self.annotation.removeprefix('Literal[')}"))


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _read_pure() -> dict[str, dict[str, Any]]:
    """Read keyword defaults of the pure functions: function -> keyword -> default."""
    found: dict[str, dict[str, Any]] = {}
    for module in _PURE:
        for function in _functions(_HERE / f"{module}.py"):
            pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            found[function.name] = {
                argument.arg: ast.literal_eval(default) for argument, default in pairs if default is not None
            }
    return found


def _default(node: ast.expr | None, pure: dict[str, dict[str, Any]]) -> Any:
    if node is None:
        return inspect.Parameter.empty
    if isinstance(node, ast.Call):  # default_of(module.function, "keyword")
        function, keyword = node.args
        assert isinstance(function, ast.Attribute)
        return pure[function.attr][ast.literal_eval(keyword)]
    return ast.literal_eval(node)


def _sentences(function: ast.FunctionDef) -> dict[str, str]:
    """Read the description of each keyword in a docstring's Args section, as one line."""
    lines = (ast.get_docstring(function) or "").splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines[lines.index("Args:") + 1 :] if "Args:" in lines else ():
        if line.startswith("      ") and name:
            found[name] += " " + line.strip()
        elif line.startswith("  "):
            name, _, text = line.strip().partition(": ")
            found[name] = text
        elif line:
            break
    return found


def _read_factories() -> dict[str, dict[str, dict[str, Parameter]]]:
    """Read slot -> factory -> keyword -> parameter, in the order of the source."""
    pure = _read_pure()
    table: dict[str, dict[str, dict[str, Parameter]]] = {}
    for file, slot_of in _SLOT_FILES.items():
        for function in _functions(_HERE / "parts" / f"{file}.py"):
            if not isinstance(function.returns, ast.Name) or function.returns.id not in (
                "Part",
                "Correction",
            ):
                continue
            if function.name.startswith("_"):
                continue
            sentences = _sentences(function)
            arguments = function.args
            positional = [(argument, None) for argument in arguments.args]
            keywords = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            parameters = {
                argument.arg: Parameter(
                    ast.unparse(argument.annotation) if argument.annotation else "Any",
                    _default(default, pure),
                    sentences.get(argument.arg, ""),
                )
                for argument, default in [*positional, *keywords]
            }
            slot = function.name if file == "regularize" else slot_of
            name = function.name.replace("_", "-") if file == "aggregate" else function.name
            table.setdefault(slot, {})[name] = parameters
    return table


def _read_recipes() -> dict[str, dict[str, tuple[str | None, dict[str, Any]]]]:
    """Read name -> slot -> (factory, options) of the table `RECIPES`."""
    tree = ast.parse((_HERE / "recipes.py").read_text(encoding="utf-8"))
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "RECIPES"
    )
    assert isinstance(table, ast.Dict)
    recipes: dict[str, dict[str, tuple[str | None, dict[str, Any]]]] = {}
    for key, recipe in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(recipe, ast.Call)
        recipes[str(key.value)] = {
            "entropy" if part.arg == "entropy_coef" else str(part.arg): _read_part(part.value)
            for part in recipe.keywords
        }
    return recipes


def _read_part(node: ast.expr) -> tuple[str | None, dict[str, Any]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # aggregate="seq-mean-token-sum"
        return node.value, {}
    if isinstance(node, ast.Constant):  # entropy_coef=0.01, which is no part
        return None, {"entropy_coef": node.value}
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return node.func.attr, {str(item.arg): ast.literal_eval(item.value) for item in node.keywords}


FACTORIES = _read_factories()
RECIPES = _read_recipes()
DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "objective": ("ppo_clip", {}),
    "aggregate": ("token-mean", {}),
}  # the defaults of `Recipe`
