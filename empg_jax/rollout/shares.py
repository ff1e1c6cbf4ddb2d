"""The ledgers of several hosts in one checkpoint, and their division over another number of hosts.

Each host plays every n-th place of the task order. When the number of hosts changes, the places that were
played form no simple pattern any more: hosts advance at their own speed. What remains exact is the set of
them, so it is what this module carries over.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from empg_jax.engine.stats import EngineStats, add_stats
from empg_jax.rollout.adaptive import join_records
from empg_jax.types import Trajectory


def join_cuts(cuts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the cuts of all hosts (`Ledger.cut`), by index, into one; that of a single host stays as it is."""
    return cuts[0] if len(cuts) == 1 else {"hosts": list(cuts)}


def take_share(
    cut: dict[str, Any], trajectories: Iterable[Trajectory], index: int, num: int
) -> tuple[dict[str, Any], list[Trajectory]]:
    """Return what one of ``num`` hosts goes on from: its own cut, or its share of all cuts.

    Args:
      cut: from `join_cuts`.
      trajectories: the unconsumed episodes of all hosts.
      index: number of the host.
      num: number of hosts now.
    """
    cuts = cut.get("hosts", [cut])
    mine = cuts[index] if len(cuts) == num else _divide(cuts, index, num)
    groups = {group["id"] for group in mine["groups"]}
    return mine, [trajectory for trajectory in trajectories if trajectory.group_id in groups]


def _divide(cuts: Sequence[dict[str, Any]], index: int, num: int) -> dict[str, Any]:
    first, beyond = _places(cuts)
    # One more than the largest number given so far.
    next_group = max(cut["next_group"] for cut in cuts) - len(cuts) + 1
    # Dealt by age, so that every host can consume its own in time.
    groups = sorted((group for cut in cuts for group in cut["groups"]), key=lambda g: (g["version"], g["id"]))
    again = [task for cut in cuts for task in cut["again"]]
    losses = collections.Counter[int]()
    for cut in cuts:
        losses.update(dict(cut["losses"]))
    # Totals have no place: one host carries them, and the sum over hosts stays the same.
    totals = cuts if index == 0 else []
    return {
        "updates": cuts[0]["updates"],
        "next_group": next_group + (index - next_group) % num,
        "next_position": first + (index - first) % num,
        "taken": [place for place in beyond if place % num == index],
        "again": again[index::num],
        "losses": sorted(losses.items()),
        "uniform": sum(cut["uniform"] for cut in totals),
        "outcomes": _add(cut["outcomes"] for cut in totals),
        "counts": _add(cut["counts"] for cut in totals),
        "engine": dataclasses.asdict(add_stats(EngineStats(**cut.get("engine", {})) for cut in totals)),
        "groups": groups[index::num],
        **join_records(cuts),
        "faults": _join_faults([cut["faults"] for cut in cuts]),
    }


def _places(cuts: Sequence[dict[str, Any]]) -> tuple[int, list[int]]:
    """Return the first place of the order that no host has played, and the played ones behind it."""
    count = len(cuts)
    end = max(cut["next_position"] for cut in cuts)
    played = {place for index, cut in enumerate(cuts) for place in range(index, cut["next_position"], count)}
    for cut in cuts:
        played |= set(cut.get("taken", ()))
    first = next((place for place in range(end) if place not in played), end)
    return first, sorted(place for place in played if place >= first)


def _add(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: collections.Counter[str] = collections.Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def _join_faults(faults: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the records of failed tasks: each host goes on with what any of them knows."""
    joined = {
        name: [entry for each in faults for entry in each[name]] for name in ("in_a_row", "open", "until")
    }
    return {"ended": max(each["ended"] for each in faults), **joined}
