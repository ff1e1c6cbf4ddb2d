"""The record of a live episode, kept outside its environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(slots=True, eq=False)
class EpisodeRecord:
    """A live episode, with everything needed to replay it in another process.

    Attributes:
      handle, split, index, seed: the slot, the task and its seed.
      request: op and arguments of the unanswered request; None when all are answered.
      actions: the answered actions.
      digests: digests of the answers: first the reset's, then one per action.
      is_live: false once the episode is over; later answers are dropped.
      is_stale: whether its worker was replaced and the new one has not replayed it yet.
    """

    handle: int
    split: str
    index: int
    seed: int
    request: tuple[str, dict[str, Any]] | None = None
    actions: list[str] = dataclasses.field(default_factory=list)
    digests: list[int] = dataclasses.field(default_factory=list)
    is_live: bool = True
    is_stale: bool = False

    def past(self) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Yield op, arguments and digest of every answered command."""
        if self.digests:
            yield "reset", self.reset_args(), self.digests[0]
        for action, digest in zip(self.actions, self.digests[1:], strict=True):
            yield "step", {"action": action}, digest

    def reset_args(self) -> dict[str, Any]:
        """Return the arguments of the episode's reset."""
        return {"seed": self.seed, "split": self.split, "index": self.index}

    def __str__(self) -> str:
        return f"{self.split}/{self.index} (seed {self.seed}, {len(self.actions)} steps)"
