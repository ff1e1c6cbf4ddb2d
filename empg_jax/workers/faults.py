"""Faults of environments: their reasons, and the limits beyond which a pool gives up."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, Literal, Protocol

from empg_jax.errors import ConfigError, RunError

Reason = Literal[
    "env_error",
    "env_garbage",
    "timeout",
    "worker_died",
    "nondeterministic",
    "quarantined",
    "outage",
    "agent_crashed",
    "agent_never_called",
    "agent_no_reward",
    "agent_timeout",
]


class Tell(Protocol):
    """A receiver of events, each with a name and fields."""

    def __call__(self, event: str, /, **fields: Any) -> None:
        """Record one event."""


def tell_nobody(event: str, /, **fields: Any) -> None:
    """Ignore an event, where no event log is kept."""


class PoolError(RunError):
    """The pool cannot continue: workers do not start, or the environment stays away."""


class RefusedPool(PoolError, ConfigError):
    """The pool never was ready, which is a mistake in its configuration; nothing was begun."""

    exit_code = 2


@dataclasses.dataclass(frozen=True, slots=True)
class EnvFailure:
    """The cause of a lost episode. The policy is never the cause, so the episode is not scored zero.

    Attributes:
      reason: ``env_error`` (the environment raised), ``env_garbage`` (its answer breaks the protocol),
        ``timeout``, ``worker_died``, ``nondeterministic`` (a replay in a new worker gave another
        observation), ``quarantined`` (the task failed too often and was not tried), ``outage`` (whatever it
        was, most episodes failed at that time, so the task is not to blame), or a name of the environment's
        own (`empg_envs.base.EnvFault`), such as ``agent_crashed``.
      detail: text for the user: message, traceback, exit code, last lines of stderr.
    """

    reason: Reason
    detail: str


@dataclasses.dataclass(frozen=True)
class PoolTimeouts:
    """The seconds allowed for a worker's start, a reset and a step."""

    start: float = 30.0
    reset: float = 30.0
    step: float = 10.0


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """The limits at which the pool pauses, or gives up on a task, on a worker, or altogether.

    Attributes:
      quarantine_after: consecutive failures after which a task is not tried any more.
      quarantine_episodes: number of episodes that end before it is tried again.
      breaker_window: number of latest episodes that the breaker considers.
      breaker_share: share of failed episodes among these at which admission pauses.
      breaker_min: number of failures below which it never pauses; so many in a row always pause it.
      probe: seconds between two probes while admission pauses.
      patience: seconds of such a pause, or of failing starts, after which the pool stops.
      start_attempts: consecutive failed starts of a worker at which a pool that never was ready stops, and
        any other pauses.
      backoff: seconds to wait after one start without any reply; doubles with each further one.
      backoff_max: upper bound of that wait, in seconds.
    """

    quarantine_after: int = 3
    quarantine_episodes: int = 1000
    breaker_window: int = 64
    breaker_share: float = 0.5
    breaker_min: int = 8
    probe: float = 5.0
    patience: float = 900.0
    start_attempts: int = 3
    backoff: float = 0.1
    backoff_max: float = 5.0

    def wait_before_start(self, barren: int) -> float:
        """Return the seconds to wait before a start, after ``barren`` consecutive starts without a reply."""
        return min(self.backoff_max, self.backoff * 2.0 ** min(barren - 1, 64)) if barren else 0.0


@dataclasses.dataclass
class PoolStats:
    """Counts since the pool was opened.

    Attributes:
      commands, replies: resets and steps asked for, and answers given (failures included).
      starts: worker processes started.
      restarts: workers replaced after a death or a hang.
      recycled: workers replaced because of their memory.
      replayed: commands repeated in new workers.
      recovered: episodes that went on in a new worker.
      failures: lost episodes by reason.
    """

    commands: int = 0
    replies: int = 0
    starts: int = 0
    restarts: int = 0
    recycled: int = 0
    replayed: int = 0
    recovered: int = 0
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, for the output of benchmarks."""
        return {**vars(self), "failures": dict(self.failures)}
