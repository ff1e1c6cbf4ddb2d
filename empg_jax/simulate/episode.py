"""One simulated attempt: what happens in it is drawn from its own chance, whatever happens around it."""

from __future__ import annotations

import collections
import dataclasses
import random

from empg_jax.rollout.episode import Attempt
from empg_jax.simulate.world import World
from empg_jax.types import Outcome, Status, Trajectory

WON = Outcome(Status.TRAINED, "won")
STRIDE = 1_000_003  # separates seed, group and attempt in the seed of an attempt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Played(Trajectory):
    """A trajectory without its tokens.

    Attributes:
      sampled: sampled tokens.
      versions: turns by the version of the policy that sampled them.
    """

    sampled: int
    versions: dict[int, int]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens over all turns."""
        return self.sampled


class SimulatedEpisode:
    """An attempt in a slot.

    Attributes:
      chance: draws of this attempt; other lags and splits of the same seed draw the same.
      turns: turns until the task is done.
      fault: turn whose environment step fails; 0 is the reset, None is no failure.
      reason: the cause of that failure.
      waited: seconds that its environment took for its answers so far, on the clock of the time served.
      asked: when its environment was asked for the answer to come, on that clock; None while it owes none.
      context: tokens of the conversation so far.
      version: of the weights that began the newest response, and whose keys and values the sampler holds.
      pending: tokens of the response in progress.
      tokens, turns_done, versions: what was sampled: tokens, turns, turns by version.
    """

    __slots__ = (
        "asked",
        "attempt",
        "chance",
        "context",
        "fault",
        "pending",
        "reason",
        "tokens",
        "turns",
        "turns_done",
        "version",
        "versions",
        "waited",
    )

    def __init__(self, world: World, attempt: Attempt) -> None:
        seed = (world.seed * STRIDE + attempt.group_id) * STRIDE + attempt.member * 16 + attempt.retry
        self.chance = chance = random.Random(seed)
        self.attempt = attempt
        self.waited = 0.0
        self.asked: float | None = None
        self.turns = world.turns.draw_count(chance)
        if world.is_long(attempt.task):
            self.turns = round(self.turns * world.long_stretch)
        fate = chance.random()
        self.reason = "worker_died" if fate < world.deaths else "env_error"
        self.fault = None
        if fate < world.deaths + world.failures:
            self.fault = chance.randrange(self.turns + 1)
        self.turns_done = self.tokens = self.pending = 0
        self.context, self.version = 0.0, -1
        self.versions: collections.Counter[int] = collections.Counter()

    def age(self, served: float) -> float:
        """Return the seconds that ``episode_timeout`` is for: without the sampling of its responses."""
        return self.waited + (0.0 if self.asked is None else served - self.asked)

    def answered(self, served: float) -> None:
        """Count the time of the environment's answer; the episode does not age until it is asked again."""
        self.waited, self.asked = self.age(served), None

    def begin_response(self, world: World, version: int) -> float:
        """Draw the next response; return the prompt tokens that must be prefilled for it."""
        # Without publish=burst new weights drop the keys and values of the whole conversation.
        is_dropped = self.version != version and not world.is_burst
        prompt = world.observation + (self.context if is_dropped else 0.0)
        self.pending = world.tokens.draw_count(self.chance)
        self.context += world.observation + self.pending
        self.version = version
        return prompt

    def end_response(self) -> None:
        """Count the turn; its version is that of its first token."""
        self.turns_done += 1
        self.tokens += self.pending
        self.versions[self.version] += 1
        self.pending = 0

    def finish(self, outcome: Outcome, value: float) -> Played:
        """Make the trajectory of the episode."""
        attempt = self.attempt
        return Played(
            task=attempt.task,
            split=attempt.split,
            group_id=attempt.group_id,
            member=attempt.member,
            turns=(),
            outcome=outcome,
            episode_return=value,
            is_success=value > 0,
            terminated=outcome is WON,
            truncated=outcome is not WON,
            sampled=self.tokens,
            versions=dict(self.versions),
        )
