"""Imports point down only.

Every import statement counts, wherever it stands: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Longest matching prefix wins. A new module of the package needs a place here, or in a room that has one.
LAYERS = {
    "empg_jax": 0,
    "empg_jax.types": 0,
    "empg_jax.config": 1,  # its keys are those of the algorithms' parts
    "empg_jax.config_algorithm": 1,
    "empg_jax.config_model": 1,
    "empg_jax.config_overlay": 1,
    "empg_jax.config_run": 1,
    "empg_jax.config_text": 0,
    "empg_jax.config_errors": 0,
    "empg_jax.metrics": 0,
    "empg_jax.algorithms": 1,
    "empg_jax.hub": 1,
    "empg_jax.models": 1,
    "empg_jax.parallel": 1,
    "empg_jax.runtime": 1,
    "empg_jax.rollout.sampling": 1,
    "empg_jax.retrieval.encoder": 1,
    "empg_jax.text": 1,
    "empg_jax.rollout.engine": 2,
    "empg_jax.rollout.programs": 2,
    "empg_jax.rollout.remote": 2,
    "empg_jax.learner": 2,
    "empg_jax.replay": 2,
    "empg_jax.checkpoint": 2,
    "empg_jax.rollout": 3,
    "empg_jax.retrieval": 3,
    "empg_jax.assembly": 4,
    "empg_jax.plan": 4,
    "empg_jax.run": 4,
    "empg_jax.weights": 4,
    "empg_jax.saved": 4,
    "empg_jax.export": 4,
    "empg_jax.trainer": 4,
    "empg_jax.evaluate": 4,
    "empg_jax.sft": 4,
    "empg_jax.sft_data": 2,
    "empg_jax.report": 4,
    "empg_jax.cli": 5,
    "empg_jax.__main__": 5,
}
ENVS_FROM_LAYER = 3
STRANGERS = {"empg_jax.learner": "empg_jax.rollout", "empg_jax.rollout": "empg_jax.learner"}
# Packages that only some modules may import.
RESERVED = {
    "pydantic": (
        "empg_jax.config",
        "empg_jax.config_algorithm",
        "empg_jax.config_model",
        "empg_jax.config_run",
    ),
    "typer": ("empg_jax.cli",),
}
JAX = {"empg_jax", "jax", "jaxlib", "flax", "optax", "orbax", "chex"}


def _inside(module, room):
    return module == room or module.startswith(room + ".")


def _layer(module):
    rooms = [room for room in LAYERS if room != "empg_jax" and _inside(module, room)]
    if not rooms:
        return LAYERS["empg_jax"] if module == "empg_jax" else None
    return LAYERS[max(rooms, key=len)]


def _modules(root):
    for package in ("empg_jax", "envs"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
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


def _problems(module, imported):
    top = imported.partition(".")[0]
    if _inside(module, "envs"):
        if top in JAX:
            yield "envs import neither empg_jax nor jax"
        return
    for package, allowed in RESERVED.items():
        if top == package and module not in allowed:
            yield f"only {' and '.join(allowed)} may import {package}"
    layer = _layer(module)
    if layer is None:
        yield "this module has no layer"
        return
    if top == "envs" and layer < ENVS_FROM_LAYER:
        yield f"layer {layer} does not know environments"
    if _inside(module, "empg_jax.algorithms") and (
        top in ("transformers", "tokenizers")
        or (
            top == "empg_jax"
            and not any(_inside(imported, r) for r in ("empg_jax.algorithms", "empg_jax.types"))
        )
    ):
        yield "algorithms see arrays only"
    if top == "empg_jax":
        target = _layer(imported)
        if target is None or target > layer:
            yield f"layer {layer} imports layer {target}"
        for room, stranger in STRANGERS.items():
            if _inside(module, room) and _inside(imported, stranger):
                yield f"{room} and {stranger} never import each other"


def find_violations(root):
    modules = dict(_modules(root))
    return sorted(
        f"{module} imports {imported}: {problem}"
        for module, path in modules.items()
        for imported in set(_imports(module, path, modules))
        for problem in _problems(module, imported)
    )


def test_imports_point_down():
    assert len(dict(_modules(ROOT))) > 20
    assert find_violations(ROOT) == []


def test_every_module_has_a_layer():
    modules = [module for module, _ in _modules(ROOT) if _inside(module, "empg_jax")]
    assert [module for module in modules if _layer(module) is None] == []


def test_each_rule_can_fail(tmp_path):
    sources = {
        "empg_jax/config.py": "import pydantic",
        "empg_jax/algorithms/__init__.py": "from empg_jax import types\nfrom empg_jax.models import head",
        "empg_jax/models/head.py": "def f():\n    from ..learner import update",
        "empg_jax/models/__init__.py": "",
        "empg_jax/types.py": "import typer",
        "empg_jax/text.py": "import envs.base",
        "empg_jax/learner/__init__.py": "",
        "empg_jax/learner/update.py": "from empg_jax.rollout.sampling import sample",
        "empg_jax/rollout/sampling.py": "import jax",
        "empg_jax/rollout/episode.py": "import envs\nfrom . import sampling\nimport empg_jax.learner.update",
        "empg_jax/novel.py": "import os",
        "envs/base.py": "import jax.numpy\nfrom empg_jax.types import Turn\nimport json",
    }
    for name, source in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    assert find_violations(tmp_path) == [
        "empg_jax.algorithms imports empg_jax.models.head: algorithms see arrays only",
        "empg_jax.learner.update imports empg_jax.rollout.sampling: "
        "empg_jax.learner and empg_jax.rollout never import each other",
        "empg_jax.models.head imports empg_jax.learner.update: layer 1 imports layer 2",
        "empg_jax.novel imports os: this module has no layer",
        "empg_jax.rollout.episode imports empg_jax.learner.update: "
        "empg_jax.rollout and empg_jax.learner never import each other",
        "empg_jax.text imports envs.base: layer 1 does not know environments",
        "empg_jax.types imports typer: only empg_jax.cli may import typer",
        "envs.base imports empg_jax.types: envs import neither empg_jax nor jax",
        "envs.base imports jax.numpy: envs import neither empg_jax nor jax",
    ]
