"""What a simulation is told: sizes of a configuration, and the speed of environments, sampler and learner."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from empg_jax.errors import ConfigError
from empg_jax.simulate.spread import KINDS, Spread

POSITIVE = ("decode_rate", "slot_rate", "prefill_rate", "episode_timeout")
NOT_NEGATIVE = ("update_seconds", "publish_pause", "worker_start", "observation", "reset_latency")
SHARES = ("long_share", "failures", "deaths", "mixed")
COUNTS = ("group_size", "groups_per_update", "updates", "slots", "workers", "tasks", "at_once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """The world of one simulated run. Times are in seconds.

    Attributes:
      group_size, groups_per_update, max_lag, updates, min_group_size, max_refills: as the ledger's.
      slots: conversations in flight.
      latency: time of an environment's answer.
      reset_latency: mean time of the answer to a reset, of the same kind; None: as to a step.
      turns: turns of an episode; those of a long task have ``long_stretch`` times as many.
      tokens: tokens of a response.
      observation: tokens of the prompt that each turn adds to the conversation.
      long_share, long_stretch: share of the tasks that are long, and how much longer they are.
      failures: share of the attempts that end by an error of their environment, in any of their turns.
      deaths: share of the attempts that kill their worker, which stands still for ``worker_start``.
      workers: worker processes; slot ``n`` lives in worker ``n % workers``.
      at_once: environments that can answer at the same time; None: all.
      decode_rate: tokens per second of all slots together.
      slot_rate: most tokens per second of one slot; None: its share of ``decode_rate`` when all are busy.
      prefill_rate: prompt tokens per second; decoding waits meanwhile. None: prompts take no time.
      update_seconds: device time of an update.
      publish_pause: time that the swap of weights takes; nothing is sampled meanwhile.
      is_burst: new weights go live inside responses, with the keys and values of the old ones
        (``rollout.publish=burst``); otherwise the swap waits until the responses in progress have ended.
      is_shared: sampler and learner compute on the same devices, each at half speed while both do.
      episode_timeout: longest time of an episode without the sampling of its responses, and the deadline of a
        group's members.
      mixed: share of the groups whose attempts have different returns, for dynamic sampling.
      tasks: tasks of the panel.
    """

    group_size: int
    groups_per_update: int
    max_lag: int = 0
    updates: int = 50
    slots: int
    latency: Spread
    reset_latency: float | None = None
    turns: Spread
    tokens: Spread
    observation: float = 0.0
    long_share: float = 0.0
    long_stretch: float = 1.0
    failures: float = 0.0
    deaths: float = 0.0
    workers: int = 1
    worker_start: float = 2.0
    at_once: int | None = None
    decode_rate: float
    slot_rate: float | None = None
    prefill_rate: float | None = None
    update_seconds: float
    publish_pause: float = 0.0
    is_burst: bool = False
    is_shared: bool = False
    episode_timeout: float = math.inf
    min_group_size: int | None = None
    max_refills: int | None = None
    mixed: float = 1.0
    tasks: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ConfigError(problem)

    def _problems(self) -> Iterator[str]:
        """Yield what is wrong, in the words of the command's options."""
        numbers = vars(self) | {name: getattr(self, name).mean for name in ("latency", "turns", "tokens")}
        rules = (
            (POSITIVE, lambda value: value > 0, "above 0"),
            ((*NOT_NEGATIVE, "latency", "max_lag"), lambda value: 0 <= value < math.inf, "0 or more"),
            (SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
            ((*COUNTS, "turns", "tokens", "long_stretch"), lambda value: 1 <= value < math.inf, "at least 1"),
        )
        for names, is_good, expected in rules:
            for name in names:
                value = numbers[name]
                if value is not None and not is_good(value):
                    yield f"{option(name)} {value:g}: expected {expected}"
        for name in ("latency", "turns", "tokens"):
            if getattr(self, name).kind not in KINDS:
                yield f"--{name}-kind {getattr(self, name).kind}: choose {', '.join(KINDS)}"
        if self.failures + self.deaths >= 1:
            yield f"--failures {self.failures:g} and --deaths {self.deaths:g}: no attempt would end well"
        if self.min_group_size is not None and self.min_group_size > self.group_size:
            yield f"min_group_size={self.min_group_size} is above group_size={self.group_size}"

    def is_long(self, task: int) -> bool:
        """Return whether a task is long; the long ones are spread evenly over the panel."""
        return math.floor((task + 1) * self.long_share) > math.floor(task * self.long_share)


def option(name: str) -> str:
    """Return the command line's spelling of a field."""
    return "--" + name.replace("_", "-")
