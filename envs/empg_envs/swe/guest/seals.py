"""Seals on the machinery of tests: which of its functions were replaced while a session ran.

The seals live in the process that they watch, so they catch careless attacks only. They are one layer of
several; see `empg_envs.swe.judge`.
"""

from __future__ import annotations

import sys
from types import FunctionType, ModuleType
from typing import Any

# Modules whose functions and classes are sealed, where they are loaded.
MODULES = (
    *("unittest.case", "unittest.result", "unittest.suite", "unittest.loader", "unittest.main"),
    *("_pytest.runner", "_pytest.reports", "_pytest.main", "_pytest.python", "_pytest.outcomes"),
    *("_pytest.unittest", "_pytest.nodes", "_pytest.config", "_pytest.skipping", "_pytest.terminal"),
    *("pluggy._callers", "pluggy._hooks", "pluggy._manager", "pluggy._result"),
    "empg_envs.swe.guest.runner",
)
# Attributes of other modules that are sealed.
NAMES = {
    "builtins": (
        *("AssertionError", "BaseException", "Exception", "isinstance", "issubclass", "getattr", "type"),
        *("len", "repr", "all", "any", "bool", "str", "int", "list", "dict", "tuple", "object", "__import__"),
    ),
    "os": ("_exit", "write", "close", "fork"),
    "sys": ("exit", "settrace", "_getframe"),
    "gc": ("collect", "freeze", "get_objects"),
    "json": ("dumps",),
}

Seal = tuple[dict[str, Any], str, Any, Any]  # namespace, name, value, code of the value


class Seals:
    """The state of the machinery at one instant."""

    def __init__(self) -> None:
        """Seal what is loaded now."""
        self._seals: list[tuple[str, Seal]] = []
        for name in MODULES:
            if name in sys.modules:
                self._seal_module(sys.modules[name])
        for name, attributes in NAMES.items():
            module = sys.modules.get(name)
            if module is not None:
                for attribute in attributes:
                    self._seal(name, vars(module), attribute)

    def broken(self) -> list[str]:
        """Return the names of what was replaced since, and of tracing functions that are set."""
        found = [name for name, seal in self._seals if _is_broken(seal)]
        found += ["sys.settrace"] if sys.gettrace() is not None else []
        return found + (["sys.setprofile"] if sys.getprofile() is not None else [])

    def _seal_module(self, module: ModuleType) -> None:
        for name, value in list(vars(module).items()):
            if getattr(value, "__module__", None) != module.__name__:
                continue
            if isinstance(value, type):
                self._seal(module.__name__, vars(module), name)
                for attribute, member in list(vars(value).items()):
                    if isinstance(member, FunctionType | classmethod | staticmethod | property):
                        self._seal(f"{module.__name__}.{name}", vars(value), attribute)
            elif isinstance(value, FunctionType):
                self._seal(module.__name__, vars(module), name)

    def _seal(self, where: str, space: Any, name: str) -> None:
        value = space.get(name)
        self._seals.append((f"{where}.{name}", (space, name, value, _code(value))))


def _is_broken(seal: Seal) -> bool:
    space, name, value, code = seal
    now = space.get(name)
    return now is not value or _code(now) is not code


def _code(value: Any) -> Any:
    """Return the code of a function, which can be replaced without replacing the function."""
    value = getattr(value, "__func__", value)
    return value.__code__ if isinstance(value, FunctionType) else None
