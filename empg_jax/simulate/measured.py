"""What a run has measured: the numbers of its metrics.jsonl, and the sampler's speed that explains them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from empg_jax.errors import ConfigError
from empg_jax.files import read_json_object
from empg_jax.metrics import read_metrics
from empg_jax.simulate.run import simulate
from empg_jax.simulate.spread import Spread
from empg_jax.simulate.world import World

if TYPE_CHECKING:
    from empg_jax.config import Config

NEEDED = ("seconds_cycle", "seconds_update", "episode_turns", "response_tokens", "tokens_prefilled")
FIT_UPDATES = 6
FIT_STEPS = 30  # halvings of the interval between the bounds
CLOSE = 0.03  # largest relative error of the fitted time of an update


@dataclasses.dataclass(frozen=True)
class Measured:
    """Means over the updates of a run, without those that compiled.

    Attributes:
      lines: updates that were read.
      turns, tokens, observation: of an episode, of a response, and prompt tokens per turn.
      update_seconds, publish_seconds: times of an update and of the copy of its weights.
      cycle_seconds: time from one update to the next, without evaluations.
      failures: share of the attempts that were discarded.
      mixed: share of the groups with different returns, those included that were replaced.
    """

    lines: int
    turns: float
    tokens: float
    observation: float
    update_seconds: float
    publish_seconds: float
    cycle_seconds: float
    failures: float
    mixed: float


def read_run(run: Path, groups_per_update: int) -> Measured:
    """Read what a run has measured.

    Args:
      run: the run's folder.
      groups_per_update: groups of one of its updates.

    Raises:
      ConfigError: there are no such numbers.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"--from {run}: no run there (no {path})")
    try:
        lines = read_metrics(path)
    except ValueError as error:
        raise ConfigError(f"--from {run}: {error}") from None
    # A line counts what ended since the line before (steps, outcomes), and all else of its own update.
    starts = [0, *(line["update"] for line in lines)]
    lines = [line | {"covered": line["update"] - start} for line, start in zip(lines, starts, strict=False)]
    lines = [line for line in lines if all(line.get(name) is not None for name in NEEDED)]
    if not lines:
        raise ConfigError(f"--from {run}: {path} has no update with {', '.join(NEEDED)}")
    # An update that compiles takes many times as long as the others.
    lines = [line for line in lines if not line.get("recompiles")] or lines

    def median(name: str) -> float:
        return statistics.median(line.get(name) or 0.0 for line in lines)

    def mean(name: str) -> float:
        return statistics.fmean(line.get(name) or 0.0 for line in lines)

    turns = mean("episode_turns")
    return Measured(
        lines=len(lines),
        turns=max(turns, 1.0),
        tokens=max(mean("response_tokens"), 1.0),
        observation=_per_turn(lines),
        update_seconds=median("seconds_update"),
        publish_seconds=median("seconds_publish"),
        cycle_seconds=median("seconds_cycle"),
        failures=sum(_discarded(line) for line in lines) / max(sum(_ended(line) for line in lines), 1.0),
        mixed=1.0
        - (groups_per_update * (1 - mean("mixed_groups")) + mean("groups_replaced"))
        / (groups_per_update + mean("groups_replaced")),
    )


def read_hosts(run: Path, config: Config) -> Config:
    """Return a run's configuration with the number of its hosts, which its folder keeps apart."""
    attempts = sorted(run.glob("environment*.json"), key=lambda path: path.stat().st_mtime)
    try:
        num = read_json_object(attempts[-1])["processes"]
    except (IndexError, KeyError, OSError, ValueError):  # written by hand, or by another version
        num = 1
    return config.model_copy(update={"hosts": config.hosts.model_copy(update={"num": num})})


def _per_turn(lines: Sequence[dict[str, Any]]) -> float:
    """Return the prefilled tokens per turn, those of replaced groups included."""
    turns = 0.0
    for line in lines:
        trained = line["episode_turns"] * (line.get("episodes_trained") or 1.0)
        turns += (line.get("environment_steps") or 0.0) / max(line["covered"], 1) or trained
    return sum(line["tokens_prefilled"] for line in lines) / max(turns, 1.0)


def _discarded(line: dict[str, Any]) -> float:
    return float(line.get("episodes_discarded") or 0.0)


def _ended(line: dict[str, Any]) -> float:
    """Return the attempts that ended since the line before, those of replaced groups included."""
    ended = sum(count or 0.0 for name, count in line.items() if name.startswith("outcome_"))
    return float(ended or line["covered"] * (line.get("episodes_trained") or 0.0) + _discarded(line))


def fit_decode_rate(world: World, cycle_seconds: float) -> float:
    """Return the decode rate with which a world's updates take the measured time.

    Raises:
      ConfigError: no rate explains it.
    """
    tokens = world.group_size * world.groups_per_update * world.turns.mean * world.tokens.mean
    # All slots together decode at least this much; the quickest rate is no limit at all.
    guess = tokens / cycle_seconds
    return _fit(
        lambda rate: dataclasses.replace(world, decode_rate=rate, updates=FIT_UPDATES),
        (1e4 * guess, guess / 2),
        cycle_seconds,
        f"--latency {world.latency.mean:g}",
    )


def fit_latency(world: World, cycle_seconds: float) -> float:
    """Return the environment's latency with which a world's updates take the measured time.

    Raises:
      ConfigError: no latency explains it.
    """
    return _fit(
        lambda mean: dataclasses.replace(
            world, latency=Spread(mean, world.latency.kind), updates=FIT_UPDATES
        ),
        (0.0, cycle_seconds),
        cycle_seconds,
        f"--decode-rate {world.decode_rate:g}",
    )


def _fit(make: Callable[[float], World], bounds: tuple[float, float], seconds: float, given: str) -> float:
    """Find the value between bounds, the quickest world first, with which an update takes ``seconds``."""
    quick, slow = bounds
    least = simulate(make(quick)).seconds_per_update
    if least > seconds * (1 + CLOSE):
        raise ConfigError(
            f"{given} does not agree with the run: an update would take {least:.3g} s or more, but took "
            f"{seconds:.3g} s"
        )
    for _ in range(FIT_STEPS):
        middle = (quick + slow) / 2 if quick == 0 else (quick * slow) ** 0.5
        if simulate(make(middle)).seconds_per_update < seconds:
            quick = middle
        else:
            slow = middle
        if abs(slow - quick) <= 1e-3 * slow:
            break
    return slow
