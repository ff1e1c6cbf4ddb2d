"""The house: folders on floors, imports that point down, and no circle among modules.

Every import statement counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The floor of every room (a folder, or a file beside them). A room imports rooms on lower floors and itself.
FLOORS = {
    "errors": 0,
    "files": 0,
    "types": 0,
    "algorithms": 1,
    "metrics": 1,
    "parallel": 1,
    "workers": 1,
    "config": 2,
    "models": 2,
    "engine": 3,
    "hf": 3,
    "learner": 3,
    "retrieval": 4,
    "text": 4,
    "report": 5,
    "rollout": 5,
    "run": 6,
    "evaluate": 7,
    "plan": 7,
    "serve": 7,
    "sft": 7,
    "simulate": 7,
    "trainer": 8,
    "cli": 9,
    "__main__": 10,
}
# Rooms that talk to environments by Python; all others do not know them. (The workers share the search for
# leftover processes with the worker program.)
KNOW_ENVIRONMENTS = {"retrieval", "rollout", "run", "serve", "sft", "cli", "workers"}
# Packages that only some modules may import.
RESERVED = {"pydantic": "empg_jax.config", "typer": "empg_jax.cli"}
STRANGERS = {"learner", "rollout"}  # they meet in the run only
JAX = {"empg_jax", "jax", "jaxlib", "flax", "optax", "orbax", "chex"}


def _inside(module, room):
    return module == room or module.startswith(room + ".")


def _room(module):
    """The room of a module of empg_jax; empty for the package itself."""
    return [*module.split("."), ""][1]


def _modules(root):
    for source in (root, root / "envs"):
        for package in ("empg_jax", "empg_envs"):
            for path in sorted((source / package).rglob("*.py")):
                parts = path.relative_to(source).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _imports(module, path, known):
    """The modules that a file imports, absolute; `from package import name` is the submodule if it is one."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base


def _graph(root):
    """Module → the modules that it imports, third parties included."""
    modules = dict(_modules(root))
    return {module: set(_imports(module, path, modules)) - {module} for module, path in modules.items()}


def _problems(module, imported):
    top = imported.partition(".")[0]
    if _inside(module, "empg_envs"):
        if top in JAX:
            yield "empg_envs imports neither empg_jax nor jax"
        return
    room = _room(module)
    if room not in FLOORS:
        if module != "empg_jax":
            yield "this room has no floor"
        return
    if top in RESERVED and not _inside(module, RESERVED[top]):
        yield f"only {RESERVED[top]} may import {top}"
    if top == "empg_envs" and room not in KNOW_ENVIRONMENTS:
        yield f"{room} does not know environments"
    if room == "algorithms" and top in ("transformers", "tokenizers"):
        yield "algorithms see arrays only"
    if room == "workers" and top in JAX - {"empg_jax"}:
        yield "workers know no JAX"
    if top == "empg_jax":
        target = _room(imported)
        if target and target != room and FLOORS.get(target, 99) >= FLOORS[room]:
            yield f"floor {FLOORS[room]} imports floor {FLOORS.get(target)}"
        if {room, target} == STRANGERS:
            yield "learner and rollout never import each other"


def find_violations(root):
    return sorted(
        f"{module} imports {imported}: {problem}"
        for module, targets in _graph(root).items()
        for imported in targets
        for problem in _problems(module, imported)
    )


def find_circles(root):
    """Groups of modules that reach each other: the strongly connected components of two and more."""
    graph = _graph(root)
    reach = {}
    for module in graph:
        found, waiting = set(), [module]
        while waiting:
            for target in graph[waiting.pop()] & graph.keys() - found:
                found.add(target)
                waiting.append(target)
        reach[module] = found
    circles = {
        frozenset(other for other in reach[module] if module in reach[other])
        for module in graph
        if module in reach[module]
    }
    return sorted(sorted(circle) for circle in circles)


def test_imports_point_down():
    assert len(_graph(ROOT)) > 200
    assert find_violations(ROOT) == []


def test_no_circles():
    assert find_circles(ROOT) == []


def test_the_house_is_not_too_tall_nor_too_wide():
    package = ROOT / "empg_jax"
    files = {path.stem for path in package.glob("*.py")} - {"__init__"}
    rooms = files | {path.parent.name for path in package.glob("*/*.py")}
    assert rooms == set(FLOORS)
    assert len(rooms - {"__main__"}) <= 24
    assert len({floor for room, floor in FLOORS.items() if room != "__main__"}) <= 10


def _write(root, sources):
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def test_each_rule_can_fail(tmp_path):
    sources = {
        "empg_jax/__init__.py": "",
        "empg_jax/config/load.py": "import pydantic",
        "empg_jax/algorithms/gigpo.py": "from empg_jax import types\nfrom empg_jax.models import head\n"
        "import transformers",
        "empg_jax/models/head.py": "def f():\n    from ..learner import update",
        "empg_jax/models/__init__.py": "",
        "empg_jax/types.py": "import typer",
        "empg_jax/text/chat.py": "import empg_envs.base",
        "empg_jax/learner/__init__.py": "",
        "empg_jax/learner/update.py": "from empg_jax.rollout.episode import Episode",
        "empg_jax/workers/pool.py": "import jax",
        "empg_jax/rollout/episode.py": "from . import context\nimport empg_jax.learner.update",
        "empg_jax/rollout/context.py": "if TYPE_CHECKING:\n    import empg_jax.run.parts",
        "empg_jax/run/parts.py": "import empg_envs",
        "empg_jax/novel.py": "import os",
        "envs/empg_envs/base.py": "import jax.numpy\nfrom empg_jax.types import Turn\nimport json",
    }
    _write(tmp_path, sources)
    assert find_violations(tmp_path) == [
        "empg_envs.base imports empg_jax.types: empg_envs imports neither empg_jax nor jax",
        "empg_envs.base imports jax.numpy: empg_envs imports neither empg_jax nor jax",
        "empg_jax.algorithms.gigpo imports empg_jax.models.head: floor 1 imports floor 2",
        "empg_jax.algorithms.gigpo imports transformers: algorithms see arrays only",
        "empg_jax.learner.update imports empg_jax.rollout.episode: floor 3 imports floor 5",
        "empg_jax.learner.update imports empg_jax.rollout.episode: "
        "learner and rollout never import each other",
        "empg_jax.models.head imports empg_jax.learner.update: floor 2 imports floor 3",
        "empg_jax.novel imports os: this room has no floor",
        "empg_jax.rollout.context imports empg_jax.run.parts: floor 5 imports floor 6",
        "empg_jax.rollout.episode imports empg_jax.learner.update: "
        "learner and rollout never import each other",
        "empg_jax.text.chat imports empg_envs.base: text does not know environments",
        "empg_jax.types imports typer: only empg_jax.cli may import typer",
        "empg_jax.workers.pool imports jax: workers know no JAX",
    ]


def test_circles_are_found_wherever_an_import_hides(tmp_path):
    sources = {
        "empg_jax/text/a.py": "def f():\n    from empg_jax.text import b",
        "empg_jax/text/b.py": "from empg_jax.text.c import g",
        "empg_jax/text/c.py": "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from .a import f",
        "empg_jax/text/d.py": "from empg_jax.text import a, b, c",
        "empg_jax/text/__init__.py": "",
        "envs/empg_envs/p.py": "import empg_envs.q",
        "envs/empg_envs/q.py": "import empg_envs.p",
    }
    _write(tmp_path, sources)
    assert find_circles(tmp_path) == [
        ["empg_envs.p", "empg_envs.q"],
        ["empg_jax.text.a", "empg_jax.text.b", "empg_jax.text.c"],
    ]
