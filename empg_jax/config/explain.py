"""Messages about mistakes in a configuration: key path, value, and the nearest valid key or choice.

The functions use the sections' field tables (``model_fields``) and nothing else of pydantic.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from empg_jax.errors import closest, nearest


def list_keys(root: Any, prefix: str = "") -> list[tuple[str, Any, str]]:
    """List every key below a section as (path, default as YAML writes it, description), in order."""
    keys: list[tuple[str, Any, str]] = []
    for name, field in root.model_fields.items():
        if _is_section(field.annotation):
            keys += list_keys(field.annotation, f"{prefix}{name}.")
        else:
            default = field.get_default(call_default_factory=True)
            default = list(default) if isinstance(default, tuple) else default
            keys.append((prefix + name, default, field.description))
    return keys


def list_literals(root: Any, prefix: str = "") -> dict[str, list[str]]:
    """Return the choices of every key below a section, by path; empty for keys without fixed choices."""
    found: dict[str, list[str]] = {}
    for name, field in root.model_fields.items():
        if _is_section(field.annotation):
            found |= list_literals(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = _choices(field.annotation)
    return found


def explain(root: Any, error: Mapping[str, Any]) -> list[str]:
    """Format one entry of ``ValidationError.errors()`` as lines for the user."""
    kind, parts = error["type"], [str(part) for part in error["loc"]]
    if kind == "value_error":  # the checks of the sections name their keys themselves
        return str(error["ctx"]["error"]).splitlines()
    # Unions and containers append parts of their own to the location; the user edits the key before these.
    depth = max(n for n in range(len(parts)) if _section_at(root, parts[:n]) is not None)
    section, key = _section_at(root, parts[:depth]), parts[depth]
    where = f"{'.'.join(parts[: depth + 1])}={error['input']!r}"
    if kind == "extra_forbidden":
        return [f"{where}: unknown key{_nearest_key(root, parts[:depth], key)}"]
    field = section.model_fields[key]
    annotation = field.annotation
    if _is_section(annotation):
        return [f"{where}: this is a section; its keys are {', '.join(annotation.model_fields)}"]
    if kind == "literal_error":
        choices = _choices(annotation)
        return [
            f"{where}: unknown choice{nearest(str(error['input']), choices)}; choose {' or '.join(choices)}"
        ]
    if kind.startswith("bool") and _choices(annotation):  # beside the error of the choices
        return []
    if kind == "string_pattern_mismatch" and field.examples:
        return [f"{where}: expected {', such as '.join(field.examples)}"]
    return [f"{where}: {error['msg'].replace('Input should', 'must')}"]


def _is_section(annotation: Any) -> bool:
    return hasattr(annotation, "model_fields")


def _section_at(root: Any, parts: Sequence[str]) -> Any:
    """Return the section at a path, or None when there is no section."""
    section = root
    for part in parts:
        if part not in section.model_fields or not _is_section(section.model_fields[part].annotation):
            return None
        section = section.model_fields[part].annotation
    return section


def _choices(annotation: Any) -> list[str]:
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    parts = typing.get_args(annotation)
    choices = [choice for part in parts for choice in _choices(part)]
    return [*choices, "true", "false"] if choices and bool in parts else choices


def _nearest_key(root: Any, parents: Sequence[str], wrong: str) -> str:
    """Format a hint with the most similar key of this section, else of another section."""
    siblings = {name: ".".join([*parents, name]) for name in _section_at(root, parents).model_fields}
    elsewhere = {path.rpartition(".")[2]: path for path, _, _ in list_keys(root)}
    for known in (siblings, elsewhere):
        if found := closest(wrong, known):
            return f" (did you mean {known[found]}?)"
    return f"; the keys here are {', '.join(siblings)}"
