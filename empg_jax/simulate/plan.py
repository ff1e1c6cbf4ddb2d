"""A simulated plan: a row for each lag and split of the devices, from a configuration and a few speeds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from empg_jax.errors import ConfigError
from empg_jax.simulate.measured import Measured, fit_decode_rate, fit_latency, read_hosts, read_run
from empg_jax.simulate.run import StandstillError, simulate
from empg_jax.simulate.spread import Spread
from empg_jax.simulate.tally import Result
from empg_jax.simulate.world import World, option

if TYPE_CHECKING:
    from empg_jax.config import Config

T = TypeVar("T")

FIT_WITH = ("slot_rate", "prefill_rate", "at_once", "reset_latency")  # they say what the run was, too
ASSUMED_RATE = 1000.0  # tokens per second
ASSUMED_UPDATE = 1.0  # seconds


@dataclasses.dataclass(frozen=True)
class Split:
    """The devices of a run; of several hosts, those of each.

    Attributes:
      engine, learner: devices of each side.
      is_shared: the same devices do both.
    """

    engine: int
    learner: int
    is_shared: bool = False

    def __str__(self) -> str:
        if not self.is_shared:
            return f"{self.engine}:{self.learner}"
        both = self.engine if self.engine == self.learner else f"{self.engine}:{self.learner}"
        return f"{both} shared"


@dataclasses.dataclass(frozen=True)
class Row:
    """A simulated run of the plan: its result, or why it never ends."""

    max_lag: int
    split: Split
    result: Result | None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class SimulatedPlan:
    """The rows, and in words what they were made from; all numbers are those of one of the run's hosts."""

    hosts: int
    world: World
    notes: list[str]
    rows: list[Row]

    def as_json(self) -> dict[str, Any]:
        """Return the plan in JSON types."""
        rows = [
            {"max_lag": row.max_lag, "split": str(row.split)}
            | dataclasses.asdict(row.split)
            | ({"problem": row.problem} if row.result is None else dataclasses.asdict(row.result))
            for row in self.rows
        ]
        world = dataclasses.asdict(self.world)
        world["episode_timeout"] = (
            None if math.isinf(self.world.episode_timeout) else world["episode_timeout"]
        )
        return {"hosts": self.hosts, "world": world, "notes": self.notes, "rows": rows}


def read_lags(text: str) -> list[int]:
    """Read ``0,1,4``.

    Raises:
      ConfigError: something else stands there.
    """
    return _read("--lags", text, "whole numbers from 0 on, for example 0,1,4", _read_lag)


def _read_lag(word: str) -> int:
    return _at_least(int(word), 0)


def read_splits(text: str) -> list[Split]:
    """Read ``1:7,4:4,8``: engine devices and learner devices, or devices that both share.

    Raises:
      ConfigError: something else stands there.
    """
    expected = "ENGINE:LEARNER devices, or a number that both share, for example 1:7,4:4,8"
    return _read("--splits", text, expected, _read_split)


def _read_split(word: str) -> Split:
    engine, colon, learner = word.partition(":")
    if not colon:
        return Split(_at_least(int(word), 1), int(word), is_shared=True)
    return Split(_at_least(int(engine), 1), _at_least(int(learner), 1))


def _read(name: str, text: str, expected: str, read: Callable[[str], T]) -> list[T]:
    try:
        return [read(word.strip()) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} {text}: expected {expected}") from None


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise ValueError
    return value


# ------------------------------------------------------------------------------------------------ the world


def devices_of(config: Config) -> Split:
    """Return the devices of a configuration, on each of its hosts."""
    mesh, rollout = config.mesh, config.rollout
    learner = mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence // _hosts_of(config)
    return Split(rollout.data * rollout.tensor, learner, is_shared=rollout.devices is None)


def _hosts_of(config: Config) -> int:
    return config.hosts.num or 1


def sizes_of(config: Config) -> dict[str, Any]:
    """Return what a configuration says of a world, which is that of one host."""
    r, hosts = config.rollout, _hosts_of(config)
    return {
        "group_size": r.group_size,
        "groups_per_update": r.tasks_per_update // hosts,
        "slots": r.slots or r.tasks_per_update * r.group_size // hosts,
        "min_group_size": r.min_group_size,
        "max_refills": r.max_refills if r.filter_groups else None,
        "episode_timeout": r.episode_timeout,
        "is_burst": r.publish == "burst",
        "workers": config.workers.num,
        "seed": config.seed,
    }


def make_plan(
    config: Config,
    given: Mapping[str, Any],
    *,
    lags: Sequence[int],
    splits: Sequence[Split] | None = None,
    run: tuple[Path, Config] | None = None,
) -> SimulatedPlan:
    """Simulate a configuration for each lag and each split; of several hosts, one with its share.

    Args:
      config: the configuration.
      given: fields of the world that the user gave.
      lags: values of ``train.max_lag``.
      splits: devices of each side, on each host; None is the configuration's own.
      run: folder and configuration of a run that measured what was not given.

    Raises:
      ConfigError: a number is out of range, the run has none, or no row would ever end.
    """
    if (hosts := _hosts_of(config)) > 1:
        from empg_jax.run.devices import check_planned  # loads JAX, which one host does without

        check_planned(config)
    if run is not None:
        run = run[0], read_hosts(*run)
    base = devices_of(config if run is None else run[1])
    if run is None:
        world, notes = _assume(config, given)
    else:
        world, notes = _measure(config, given, *run)
    notes.insert(0, _describe(config, world))
    rows = []
    for split in splits or [devices_of(config)]:
        placed = place(world, base, split)
        rows += [_make_row(dataclasses.replace(placed, max_lag=lag), split) for lag in lags]
    problems = [f"train.max_lag={row.max_lag}, {row.split}: {row.problem}" for row in rows if row.problem]
    if len(problems) == len(rows):
        raise ConfigError(problems[0])
    notes += problems
    if any(row.split != base for row in rows):
        of_host = " of a host" if run is not None and _hosts_of(run[1]) > 1 else ""
        notes.append(
            f"rates hold for {_count(base.engine, 'engine')} and {_count(base.learner, 'learner')}{of_host} "
            "and grow in proportion to the devices of each side: a model, not a measurement"
        )
    return SimulatedPlan(hosts, world, notes, sorted(rows, key=lambda row: row.max_lag))


def _make_row(world: World, split: Split) -> Row:
    try:
        return Row(world.max_lag, split, simulate(world))
    except StandstillError as error:
        return Row(world.max_lag, split, None, str(error))


def _count(devices: int, side: str) -> str:
    return f"{devices} {side} device{'s' if devices > 1 else ''}"


def place(world: World, base: Split, split: Split) -> World:
    """Put a world whose speeds hold for the devices ``base`` on other devices; speeds grow in proportion."""
    more = split.engine / base.engine
    return dataclasses.replace(
        world,
        decode_rate=world.decode_rate * more,
        slot_rate=None if world.slot_rate is None else world.slot_rate * more,
        prefill_rate=None if world.prefill_rate is None else world.prefill_rate * more,
        update_seconds=world.update_seconds * base.learner / split.learner,
        is_shared=split.is_shared,
    )


def _assume(config: Config, given: Mapping[str, Any]) -> tuple[World, list[str]]:
    """Make a world of what is given; the rest is assumed, and said so."""
    assumed: dict[str, Any] = {
        "latency": 0.0,
        # The means of lengths that are uniform up to the configured limits.
        "turns": (1 + config.env.max_turns) / 2,
        "tokens": (1 + config.rollout.max_response_tokens) / 2,
        "decode_rate": ASSUMED_RATE,
        "update_seconds": ASSUMED_UPDATE,
    }
    assumed = {name: value for name, value in assumed.items() if name not in given}
    world = _make_world(config, assumed | dict(given))
    notes = []
    if assumed:
        shown = ", ".join(f"{option(name)} {value:g}" for name, value in assumed.items())
        notes.append(f"assumed, because not given: {shown}; --from RUN reads what a run measured")
    return world, notes


def _measure(
    config: Config, given: Mapping[str, Any], path: Path, its_config: Config
) -> tuple[World, list[str]]:
    """Make a world of what a run measured, where nothing else is given."""
    found = read_run(path, its_config.rollout.tasks_per_update)
    values: dict[str, Any] = {
        "turns": found.turns,
        "tokens": found.tokens,
        "observation": found.observation,
        "failures": found.failures,
        "mixed": found.mixed,
        "publish_pause": found.publish_seconds,
        "update_seconds": found.update_seconds,
    }
    fitted = _fit_speed(its_config, values, given, found)
    values |= fitted
    world = _make_world(config, values | dict(given))
    read = {name: value for name, value in values.items() if name not in given and name not in fitted}
    shown = ", ".join(f"{option(name)} {value:.3g}" for name, value in read.items())
    notes = [f"measured in {path} over {found.lines} updates: {shown}"]
    for name, value in fitted.items():
        why = f"so that the simulated run takes the measured {found.cycle_seconds:.3g} s per update"
        notes.append(f"derived: {option(name)} {value:.4g}, {why}")
    if "latency" not in given and "latency" not in fitted:
        notes.append(
            "a run does not measure how long environments take; --latency or --decode-rate splits that"
        )
    if "update_seconds" not in given:
        its_world = _make_world(its_config, {"decode_rate": world.decode_rate, **values})
        more = _tokens_trained(world) / _tokens_trained(its_world)
        world = dataclasses.replace(world, update_seconds=world.update_seconds * more)
        if abs(more - 1) > 1e-9:
            what = "an update has"
            if max(_hosts_of(config), _hosts_of(its_config)) > 1:
                what = "a host's part of an update has"
            notes.append(f"{what} {more:.3g} times the tokens of the run's, and takes that much longer")
    if its_config.train.max_lag and devices_of(its_config).is_shared:
        notes.append(
            f"the run had train.max_lag={its_config.train.max_lag} on shared devices: its updates include "
            "time that sampling took; a run with train.max_lag=0 measures better"
        )
    return world, notes


def _fit_speed(
    config: Config, values: Mapping[str, Any], given: Mapping[str, Any], found: Measured
) -> dict[str, float]:
    """Derive the sampler's rate, or with a given rate the latency, from the time of the run's updates."""
    shape = {name: value for name, value in given.items() if name in FIT_WITH}
    shape["max_lag"], shape["is_shared"] = config.train.max_lag, devices_of(config).is_shared
    kinds = {name: given[name] for name in ("latency_kind", "turns_kind", "tokens_kind") if name in given}
    if "decode_rate" in given:
        if "latency" in given:
            return {}
        world = _make_world(config, {**values, **shape, **kinds, "decode_rate": given["decode_rate"]})
        return {"latency": fit_latency(world, found.cycle_seconds)}
    latency = given.get("latency", 0.0)
    world = _make_world(config, {**values, **shape, **kinds, "latency": latency, "decode_rate": 1.0})
    return {"decode_rate": fit_decode_rate(world, found.cycle_seconds)}


def _make_world(config: Config, values: dict[str, Any]) -> World:
    fields = sizes_of(config) | {"latency": 0.0} | values
    kinds = {"latency": "constant", "turns": "uniform", "tokens": "uniform"}
    for name, kind in kinds.items():
        fields[name] = Spread(fields[name], fields.pop(f"{name}_kind", kind))
    return World(**fields)


def _tokens_trained(world: World) -> float:
    longer = 1 + world.long_share * (world.long_stretch - 1)
    turns = world.group_size * world.groups_per_update * world.turns.mean * longer
    return turns * (world.tokens.mean + world.observation)


def _describe(config: Config, world: World) -> str:
    batch = f"{world.updates} updates of {world.groups_per_update} x {world.group_size} episodes"
    parts = [f"simulated, not measured: {config.name}, {batch}, {world.slots} slots, seed {world.seed}"]
    if (hosts := _hosts_of(config)) > 1:
        parts.append(f"one of {hosts} hosts, all alike: devices, episodes, slots and tokens are this host's")
    longest = world.turns.mean * world.long_stretch
    if world.long_share and longest > config.env.max_turns:
        parts.append(
            f"long episodes have {longest:g} turns, which env.max_turns={config.env.max_turns} would end"
        )
    return "; ".join(parts)
