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
      snapshot: the environment's own state after the last answer, where it offers one.
      has_ended: whether the environment has ended it itself.
      is_live: false once the episode is over; later answers are dropped.
      is_stale: whether its worker was replaced and the new one has not replayed it yet.
      is_suspect: whether its command ran, beside others, in a process that died.
      is_probe: whether it only tries whether the environment works again; its answers are compared with none.
      loss: the text of its failure, where it was lost between two requests; it answers the next one.
    """

    handle: int
    split: str
    index: int
    seed: int
    request: tuple[str, dict[str, Any]] | None = None
    actions: list[str] = dataclasses.field(default_factory=list)
    digests: list[int] = dataclasses.field(default_factory=list)
    snapshot: Any = None
    has_ended: bool = False
    is_live: bool = True
    is_stale: bool = False
    is_suspect: bool = False
    is_probe: bool = False
    loss: str | None = None

    @property
    def has_begun(self) -> bool:
        """Whether the reset was answered, so that there is a state to lose."""
        return bool(self.digests)

    def past(self) -> Iterator[tuple[str, dict[str, Any], int | None]]:
        """Yield op, arguments and digest of every answered command; a snapshot stands for all of them."""
        if self.snapshot is not None:
            yield "restore", {"state": self.snapshot}, None
            return
        if self.digests:
            yield "reset", self.reset_args(), self.digests[0]
        for action, digest in zip(self.actions, self.digests[1:], strict=True):
            yield "step", {"action": action}, digest

    def reset_args(self) -> dict[str, Any]:
        """Return the arguments of the episode's reset."""
        return {"seed": self.seed, "split": self.split, "index": self.index}

    def make_closing(self) -> EpisodeRecord:
        """Return the request to close the environment of this episode, whose answer nobody waits for."""
        return EpisodeRecord(self.handle, self.split, self.index, self.seed, ("close", {}), is_live=False)

    def make_probe(self, handle: int, *, is_replayable: bool) -> EpisodeRecord:
        """Copy an episode, up to its open request, into a slot that nobody else uses.

        Where a replay would lead elsewhere, only the request is made, in a fresh episode of the task.
        """
        turns = len(self.actions) if is_replayable else 0
        return EpisodeRecord(
            handle,
            self.split,
            self.index,
            self.seed,
            self.request,
            self.actions[:turns],
            self.digests[: turns + 1],
            self.snapshot,
            is_stale=self.has_begun,
            is_probe=True,
        )

    def __str__(self) -> str:
        return f"{self.split}/{self.index} (seed {self.seed}, {len(self.actions)} steps)"
