"""What a live episode consists of, seen from outside its environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(slots=True, eq=False)
class EpisodeRecord:
    """A live episode: all that is needed to bring it back in another process.

    Attributes:
      handle, split, index, seed: the slot, the task and its seed.
      request: op and arguments that were asked for and not answered yet.
      actions: the answered ones.
      digests: of the reset's answer and of each action's.
      is_live: false once it is over; answers that still come are dropped.
      is_stale: its worker was replaced, and the new one does not know it.
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
        """Op, arguments and digest of every answered command."""
        if self.digests:
            yield "reset", self.reset_args(), self.digests[0]
        for action, digest in zip(self.actions, self.digests[1:], strict=True):
            yield "step", {"action": action}, digest

    def reset_args(self) -> dict[str, Any]:
        """Arguments of the episode's reset."""
        return {"seed": self.seed, "split": self.split, "index": self.index}

    def __str__(self) -> str:
        return f"{self.split}/{self.index} (seed {self.seed}, {len(self.actions)} steps)"
