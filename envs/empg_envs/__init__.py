"""Environments for text agents: a table of names, and entry points for environments of other packages.

``ENVS`` is a plain dictionary. Its factories import an environment only when they are called. Listing the
names is therefore cheap, and no environment needs another one's extra packages.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from empg_envs.base import (
    ActionParser,
    EnvSpec,
    ParsedAction,
    PlainParser,
    PlainPrompts,
    PromptBuilder,
    TextEnv,
)
from empg_envs.names import suggest

__all__ = [
    "ENVS",
    "ActionParser",
    "EnvSpec",
    "ParsedAction",
    "PlainParser",
    "PlainPrompts",
    "PromptBuilder",
    "TextEnv",
    "make_env",
    "resolve_spec",
]


def _lazy(module: str, attribute: str) -> Callable[..., Any]:
    """Return a factory that imports ``module`` when it is called."""

    def factory(**options: Any) -> Any:
        return getattr(importlib.import_module(module), attribute)(**options)

    factory.__name__ = attribute
    return factory


def _packaged(name: str, env: str) -> EnvSpec:
    """Return the spec of the package ``empg_envs.<name>`` with the class ``env``, without importing it."""
    prompt = f"empg_envs.{name}.prompt"
    return EnvSpec(
        name=name,
        make=_lazy(f"empg_envs.{name}.env", env),
        prompts=_lazy(prompt, "make_prompts"),
        parser=_lazy(prompt, "make_parser"),
        phrases=_lazy(prompt, "phrases"),
    )


ENVS: dict[str, EnvSpec] = {
    "household": _packaged("household", "HouseholdEnv"),
    "alfworld": _packaged("alfworld", "AlfworldEnv"),
    "webshop": _packaged("webshop", "WebShopEnv"),
    "deepsearch": _packaged("deepsearch", "DeepSearchEnv"),
    "swe": _packaged("swe", "SweEnv"),
}


def resolve_spec(name_or_entry_point: str) -> EnvSpec:
    """Find an environment by name or by entry point.

    Args:
      name_or_entry_point: a key of ``ENVS``, or ``package.module:attribute`` of an `EnvSpec` or of a callable
        that builds a `TextEnv`. A callable gets plain prompts and the plain parser.

    Returns:
      The spec.

    Raises:
      ValueError: the name is unknown (the message suggests the nearest one), or the attribute does not exist.
      TypeError: the attribute is neither a spec nor callable.
    """
    if ":" not in name_or_entry_point:
        if name_or_entry_point in ENVS:
            return ENVS[name_or_entry_point]
        hint = suggest(name_or_entry_point, ENVS)
        raise ValueError(
            f"unknown environment {name_or_entry_point!r}{hint} Known: {', '.join(ENVS)}, "
            "or an entry point 'package.module:attribute'"
        )
    module_name, _, attribute = name_or_entry_point.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment entry point {name_or_entry_point!r}: cannot import {error.name!r}; "
            "expected 'package.module:attribute'"
        ) from error
    target = getattr(module, attribute, None) if attribute else None
    if target is None:
        public = [name for name in vars(module) if not name.startswith("_")]
        raise ValueError(
            f"environment entry point {name_or_entry_point!r}: module {module_name!r} "
            f"has no attribute {attribute!r}{suggest(attribute, public)}"
        )
    if isinstance(target, EnvSpec):
        return target
    if not callable(target):
        raise TypeError(
            f"environment entry point {name_or_entry_point!r} is a {type(target).__name__}; "
            "expected an EnvSpec or a callable that builds a TextEnv"
        )
    return EnvSpec(name=name_or_entry_point, make=target, prompts=PlainPrompts, parser=PlainParser)


def make_env(name_or_entry_point: str, **options: Any) -> TextEnv:
    """Build one environment, for example ``make_env("household", level="tiny")``.

    Raises:
      ValueError: the name is unknown, or the environment refuses an option.
    """
    return resolve_spec(name_or_entry_point).make(**options)
