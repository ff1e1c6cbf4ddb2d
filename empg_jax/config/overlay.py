"""Merging of algorithm keys into those of a file, and a check for keys of a command without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from empg_jax.algorithms.keys import (
    MODULATIONS,
    NOT_OF_PARTS,
    SELECTORS,
    choose,
    explain_idle,
    flatten,
    is_off,
    read_keys,
    readers,
    split_name,
)
from empg_jax.config.algorithm import AlgorithmConfig, nested, start_spec


def overlay(filed: Any, commanded: Any, *, source: str, drop_replaced: bool) -> tuple[Any, list[str]]:
    """Lay the algorithm keys of a command over those of a file, or those of a file over its base's.

    A name (or entry point) in the command decides the whole algorithm, modulation included, unless the
    command names a modulation, too. The keys of a packaged file, or of a base, for parts that the command
    replaces are dropped, with a note. A file of the user's own loses only loss, aggregation and the keys of
    its modulation to a name; another key that no part reads is refused later.

    Args:
      filed: the file's ``algorithm`` section, or the base's.
      commanded: the ``algorithm`` section that is laid over it: the command's, or the file's.
      source: name of the file, or the base, in notes.
      drop_replaced: whether all keys of replaced parts are dropped.

    Returns:
      The merged section, and the notes.
    """
    if not isinstance(filed, dict) or not isinstance(commanded, dict) or not commanded:
        return commanded, []
    before, command = flatten(filed), flatten(commanded)
    emptied = tuple(f"{path}." for path in _empty_tables(commanded))
    sections = {key.partition(".")[0] for key in command if "." in key}  # in the file they may be null
    kept = {
        key: value for key, value in before.items() if key not in sections and not key.startswith(emptied)
    }
    renames = command.get("name") is not None or command.get("entry_point") is not None
    if renames:
        for key in ("name", "entry_point", "modulation"):
            kept.pop(key, None)
    elif "modulation" in command and isinstance(before.get("name"), str):
        kept["name"] = split_name(before["name"])[0]
    try:
        notes = _drop_replaced(before, command, kept, source, drop_replaced, renames)
    except (ValueError, TypeError, KeyError):  # a mistake in the keys: the checks of the section report it
        notes = []
    return nested({**kept, **command}), notes


def _empty_tables(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every empty table, which removes the file's keys below it."""
    for key, value in table.items():
        if isinstance(value, dict):
            if not value:
                yield prefix + key
            yield from _empty_tables(value, f"{prefix}{key}.")


def _drop_replaced(
    before: dict[str, Any],
    command: dict[str, Any],
    kept: dict[str, Any],
    source: str,
    drop_replaced: bool,
    renames: bool,
) -> list[str]:
    """Remove from ``kept`` the keys of replaced parts; return a note for each."""
    old, new = start_spec(before), start_spec({**kept, **command})
    if before.get("modulation") in MODULATIONS:
        old = old | choose(old, {"modulation": before["modulation"]})
    notes = []
    choices = ("name", "entry_point", *SELECTORS)
    cause = " ".join(f"algorithm.{key}={value}" for key, value in command.items() if key in choices)
    for key, slot in (("loss", "objective"), ("aggregation", "aggregate")):
        if renames and key in kept and key not in command and old.get(slot) != new.get(slot):
            notes.append(f"algorithm.{key}={kept.pop(key)} of {source} is dropped: {cause} brings its own")
    was = choose(old, before)
    now = choose(new, {**kept, **command})
    for key, (slot, factory) in read_keys(was).items():
        is_dropped = drop_replaced or (renames and slot == "modulate")
        if is_dropped and key in kept and key not in command and was.get(slot) != now.get(slot):
            value = kept.pop(key)
            notes.append(f"algorithm.{key}={value} of {source} is dropped: {cause} replaces {factory}")
    return notes


def check_command(algorithm: AlgorithmConfig, commanded: Any) -> Iterator[str]:
    """Yield a message for every key of a command that no part reads, even if its value is the default."""
    values = {k: v for k, v in flatten(algorithm.model_dump()).items() if k not in NOT_OF_PARTS}
    spec = choose(start_spec({"name": algorithm.name, "entry_point": algorithm.entry_point}), values)
    read = read_keys(spec)
    for key, value in flatten(commanded if isinstance(commanded, dict) else {}).items():
        if readers(key) and key not in read and not is_off(key, value):
            yield explain_idle(key, value, spec, algorithm.name or algorithm.entry_point)
