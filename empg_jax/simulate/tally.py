"""What a simulated run is measured by."""

from __future__ import annotations

import collections
import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """The numbers of one simulated run, from its first episode to its last update.

    Attributes:
      seconds: simulated time.
      seconds_per_update: its share for one update.
      episodes_per_hour: episodes that were trained on.
      tokens_per_second: sampled tokens, the wasted ones included.
      learner_idle, rollout_idle: shares of the time, as the metrics of these names.
      publish_pause: seconds of an update in which sampling stood still for new weights, as the metric.
      lag_mean, lag_max, lag_shares: age of the trained turns in updates; the share of turns by age.
      waste: share of the sampled tokens that were of no use.
      slot_occupancy: share of the slots that sampled a token, mean over decode steps.
      long_begun, long_trained: share of the groups of long tasks among those begun and those trained on.
      groups_replaced: groups replaced, by reason.
      episodes_discarded: attempts discarded, by reason.
    """

    updates: int
    seconds: float
    seconds_per_update: float
    updates_per_hour: float
    episodes_per_hour: float
    tokens_per_second: float
    learner_idle: float
    rollout_idle: float
    publish_pause: float
    lag_mean: float
    lag_max: int
    lag_shares: dict[int, float]
    waste: float
    slot_occupancy: float
    long_begun: float
    long_trained: float
    groups_replaced: dict[str, int]
    episodes_discarded: dict[str, int]


class Tally:
    """Sums over a run while it is simulated.

    Attributes:
      idle: seconds without an attempt to play.
      paused: seconds in which sampling stood still for new weights.
      waited: seconds in which the learner waited for episodes.
      begun: whether the task is long, by group that was begun.
      consumed: groups of each update.
    """

    def __init__(self) -> None:
        self.idle = self.paused = self.waited = 0.0
        self.begun: dict[int, bool] = {}
        self.consumed: list[list[int]] = []
        self.episodes = 0
        self.ages: collections.Counter[int] = collections.Counter()
        self.replaced: collections.Counter[str] = collections.Counter()

    def tell(self, event: str, /, **fields: object) -> None:
        """Take an event of the ledger."""
        if event == "group_replaced":
            self.replaced[str(fields["reason"])] += 1

    def long_share(self, groups: list[int]) -> float:
        """Return the share of long tasks among groups that were begun."""
        return sum(self.begun[group] for group in groups) / max(len(groups), 1)
