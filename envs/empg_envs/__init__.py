"""Environments for text agents: a table of names, and entry points for environments of other packages.

``ENVS`` is a plain dictionary. Its factories import an environment only when they are called. Listing the
names is therefore cheap, and no environment needs another one's extra packages.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
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
    "check_options",
    "make_env",
    "options_of",
    "resolve_spec",
]


def _lazy(module: str, attribute: str) -> Callable[..., Any]:
    """Return a factory that imports ``module`` when it is called."""

    def factory(*arguments: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), attribute)(*arguments, **options)

    factory.__name__ = attribute
    factory.resolve = lambda: getattr(importlib.import_module(module), attribute)  # type: ignore[attr-defined]
    return factory


def _packaged(name: str, env: str, **declared: Any) -> EnvSpec:
    """Return the spec of the package ``empg_envs.<name>`` with the class ``env``, without importing it."""
    prompt = f"empg_envs.{name}.prompt"
    return EnvSpec(
        name=name,
        make=_lazy(f"empg_envs.{name}.env", env),
        prompts=_lazy(prompt, "make_prompts"),
        parser=_lazy(prompt, "make_parser"),
        phrases=_lazy(prompt, "phrases"),
        **{"tells_answers": False, **declared},
    )


def _adapted(name: str, env: str, prompts: str, parser: str, **declared: Any) -> EnvSpec:
    """Return the spec of the module ``empg_envs.adapters.<name>``, without importing it."""
    return EnvSpec(
        name=name,
        make=_lazy(f"empg_envs.adapters.{name}", env),
        prompts=_lazy("empg_envs.adapters.prompt", prompts),
        parser=_lazy("empg_envs.adapters.prompt", parser),
        **{"is_tried": True, "tells_answers": False, **declared},
    )


ENVS: dict[str, EnvSpec] = {
    "household": _packaged("household", "HouseholdEnv"),
    "alfworld": _packaged("alfworld", "AlfworldEnv", texts=("template",), places=("data",)),
    "webshop": _packaged("webshop", "WebShopEnv", texts=("template",), places=("data", "cache_dir")),
    "deepsearch": _packaged(
        "deepsearch",
        "DeepSearchEnv",
        places=("questions", "corpus", "retriever_options"),
        tells_answers=True,
    ),
    "swe": _packaged(
        "swe",
        "SweEnv",
        places=("tasks", "sources"),
        timeout_outcome="zero",
        check_turns=_lazy("empg_envs.swe.prompt", "check_turns"),
    ),
    "harness": dataclasses.replace(
        _packaged("harness", "HarnessEnv", places=("tasks",)), phrases=None, has_calls=True
    ),
    "gymnasium": _adapted("gymnasium", "GymnasiumEnv", "make_listing_prompts", "make_line_parser"),
    "reasoning_gym": _adapted(
        # Scorers compute with the answer, so an agent could bring about that its episode takes too long.
        "reasoning_gym",
        "ReasoningGymEnv",
        "make_prompts",
        "make_whole_parser",
        timeout_outcome="zero",
    ),
    "mcp": _adapted(
        "mcp", "McpEnv", "make_tool_prompts", "make_call_parser", places=("tasks",), is_tried=False
    ),
    "openenv": _adapted("openenv", "OpenEnvEnv", "make_prompts", "make_whole_parser"),
    "textarena": _adapted("textarena", "TextArenaEnv", "make_prompts", "make_whole_parser"),
    "verifiers": _adapted("verifiers", "VerifiersEnv", "make_preceded_prompts", "make_whole_parser"),
}


def resolve_spec(name_or_entry_point: str) -> EnvSpec:
    """Find an environment by name or by entry point.

    Args:
      name_or_entry_point: a key of ``ENVS``, or ``package.module:attribute`` of an `EnvSpec` or of a callable
        that builds a `TextEnv`. A callable gets plain prompts and the plain parser. The
        module is looked for in the current folder first.

    Returns:
      The spec.

    Raises:
      ValueError: the name is unknown (the message suggests the nearest one), the module cannot be imported,
        or the attribute does not exist.
      TypeError: the attribute is neither a spec nor callable.
    """
    if ":" not in name_or_entry_point:
        if name_or_entry_point in ENVS:
            return ENVS[name_or_entry_point]
        hint = suggest(name_or_entry_point, ENVS)
        raise ValueError(
            f"unknown environment {name_or_entry_point!r}{hint or '.'} Known: {', '.join(ENVS)}, "
            "or an entry point 'package.module:attribute'"
        )
    module_name, _, attribute = name_or_entry_point.partition(":")
    module = _import_module(module_name, name_or_entry_point)
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
      TypeError: the environment has no such option; see `check_options`.
    """
    spec = resolve_spec(name_or_entry_point)
    check_options(spec, options)
    return spec.make(**options)


def check_options(
    spec: EnvSpec, options: Mapping[str, Any], prompt_options: Mapping[str, Any] | None = None
) -> None:
    """Looks at the names of options only; an environment that takes any name is believed.

    Args:
      spec: the environment.
      options: keyword arguments of the environment.
      prompt_options: keyword arguments of its prompt builder and its parser.

    Raises:
      TypeError: an option does not exist; names the environment, the nearest option, and all of them.
    """
    _check_names(spec, "option", options, (spec.make,))
    _check_names(spec, "prompt option", prompt_options or {}, (spec.prompts, spec.parser))


def options_of(build: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the options that a factory takes, where several share them, as prompt builder and parser do.

    Args:
      build: a factory.
      options: keyword arguments, checked by `check_options`.

    Returns:
      Those that its signature names; all, where it takes any name or does not tell.
    """
    names = _option_names(build)
    return {name: value for name, value in options.items() if names is None or name in names}


def _check_names(
    spec: EnvSpec, kind: str, options: Mapping[str, Any], builders: Sequence[Callable[..., Any]]
) -> None:
    if not options:
        return
    known: list[str] = []
    for build in builders:
        names = _option_names(build)
        if names is None:
            return
        known += (name for name in names if name not in known)
    for name in options:
        if name not in known:
            there = f"its {kind}s are {', '.join(known)}" if known else f"it has no {kind}s"
            hint = suggest(name, known).removeprefix("; ")
            raise TypeError(
                f"environment {spec.name} has no {kind} {name!r}{f' ({hint})' if hint else ''}; {there}"
            )


def _option_names(build: Callable[..., Any]) -> list[str] | None:
    """The keyword arguments of a callable; None where it takes any name, or does not tell.

    A callable with ``**options`` may list the names that it takes there in an attribute ``more_options``.
    """
    target = build.resolve() if hasattr(build, "resolve") else build
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some callables written in C have no signature
        return None
    more = getattr(target, "more_options", ())
    if not more and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [*(parameter.name for parameter in parameters if parameter.kind in named), *more]


def _import_module(name: str, entry_point: str) -> ModuleType:
    """Imports a module of the user's, which may lie in the current folder.

    Raises:
      ValueError: it does not exist, or its own code fails; says where.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # A console script does not look here, other than `python -m`; in front, as there.
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"environment entry point {entry_point!r}: cannot import {error.name!r}; "
            "expected 'package.module:attribute', in the current folder or installed"
        ) from error
    except Exception as error:  # whatever the code of the module raises
        raise ValueError(
            f"environment entry point {entry_point!r}: {name} cannot be imported: "
            f"{type(error).__name__}: {error}{_place_of(error)}"
        ) from error


def _place_of(error: Exception) -> str:
    """Where an exception was raised; a syntax error says it itself."""
    if isinstance(error, SyntaxError):
        return ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({frame.filename}, line {frame.lineno})"
