"""The commands that a worker process owes answers to, and which of them are running.

The process tells of each command that runs beside others. Of the remaining ones at most one runs, the first
in order (see `empg_envs.lanes`). So it is known which command hangs, and which ones were running at a death.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from empg_jax.workers.record import EpisodeRecord


@dataclasses.dataclass(slots=True, eq=False)
class Command:
    """A command that was sent to a worker.

    Attributes:
      offset: bytes sent to the process before the message that holds the command.
      sent: time at which it was sent.
      expected: the digest that a replayed command must give; None where nothing is compared.
      is_replay: whether it belongs to a replay; else it is the caller's request.
      completes_replay: whether it is the last command of a replay.
      began: time at which the process told that it runs beside others; None for all others.
      thread: the number of its thread in that case.
    """

    id: int
    episode: EpisodeRecord
    op: str
    args: dict[str, Any]
    offset: int
    sent: float = 0.0
    expected: int | None = None
    is_replay: bool = False
    completes_replay: bool = False
    began: float | None = None
    thread: int | None = None

    def __str__(self) -> str:
        return f"{'replaying' if self.is_replay else 'in'} {self.op} {self.args} of {self.episode}"


class Inflight:
    """The unanswered commands of one process, in their order."""

    def __init__(self) -> None:
        """Start with none."""
        self._commands: dict[int, Command] = {}
        self._lanes: dict[int, Command] = {}  # those that run beside others
        self._ids = itertools.count()

    def __len__(self) -> int:
        return len(self._commands)

    @property
    def is_busy(self) -> bool:
        """Whether a command is unanswered that does more than close an environment."""
        return any(command.op != "close" for command in self._commands.values())

    def compose(
        self, episodes: Iterable[EpisodeRecord], offset: int, now: float
    ) -> tuple[list[Command], list[EpisodeRecord]]:
        """Make the commands for open requests, each after the replay that it needs.

        Of the suspects of a death at most one is under way at any time: a second death shows the cause.

        Args:
          episodes: the episodes with an open request; of those that are over only a ``close`` is sent.
          offset: bytes sent to the process so far.
          now: the time.

        Returns:
          The commands, and the episodes that must wait.
        """
        has_suspect = any(command.episode.is_suspect for command in self._commands.values())
        commands: list[Command] = []
        later = []
        for episode in episodes:
            if episode.request is None or not (episode.is_live or episode.request[0] == "close"):
                continue
            if episode.is_suspect and has_suspect:
                later.append(episode)
                continue
            has_suspect |= episode.is_suspect
            if episode.is_stale:
                for op, args, digest in episode.past():
                    commands.append(Command(next(self._ids), episode, op, args, offset, now, digest, True))
                commands[-1].completes_replay = True
                episode.is_stale = False
            commands.append(Command(next(self._ids), episode, *episode.request, offset, now))
        return commands, later

    def add(self, commands: Iterable[Command]) -> None:
        """Add commands that were sent."""
        self._commands.update((command.id, command) for command in commands)

    def pop(self, number: Any) -> Command | None:
        """Remove a command that was answered; return None if there is no such command."""
        self._lanes.pop(number, None)
        return self._commands.pop(number, None)

    def begin(self, number: Any, thread: int, now: float) -> bool:
        """Note that a command runs beside others; return False if there is no such command."""
        command = self._commands.get(number)
        if command is None:
            return False
        command.began, command.thread = now, thread
        self._lanes[number] = command
        return True

    def episodes(self) -> list[EpisodeRecord]:
        """List the episodes that wait for an answer, in order."""
        return list(dict.fromkeys(command.episode for command in self._commands.values()))

    def running(self) -> list[Command]:
        """List the commands that are running, or may be."""
        first = self._first()
        return [*self._lanes.values(), *([first] if first is not None else [])]

    def due(self, progress: float, limit: Callable[[str], float]) -> tuple[float, Command | None]:
        """Find the first deadline and its command.

        Args:
          progress: when bytes last moved; the time of a command that the process did not tell of counts
            from here, or from when it was sent, if that was later.
          limit: op → allowed seconds.
        """
        first = self._first()
        best: tuple[float, Command | None] = (float("inf"), None)
        if first is not None:
            best = max(progress, first.sent) + limit(first.op), first
        for command in self._lanes.values():
            assert command.began is not None
            best = min(best, (command.began + limit(command.op), command), key=lambda pair: pair[0])
        return best

    def forgive(self, seconds: float) -> None:
        """Move the deadlines, because the process could not tell its answers for so long."""
        for command in self._lanes.values():
            assert command.began is not None
            command.began += seconds

    def clear(self) -> None:
        """Forget all commands, because their process has ended."""
        self._commands.clear()
        self._lanes.clear()

    def _first(self) -> Command | None:
        """Return the first command that neither runs beside others nor waits behind one in its slot."""
        if not self._lanes:
            return next(iter(self._commands.values()), None)
        taken = {command.episode.handle for command in self._lanes.values()}
        for command in self._commands.values():
            if command.began is None and command.episode.handle not in taken:
                return command
        return None


def find_culprit(running: list[Command]) -> Command | None:
    """Find the command that killed its process; where that cannot be known, mark all of them as suspects."""
    if len(running) == 1:
        return running[0]
    suspects = [command for command in running if command.episode.is_suspect]
    if len(suspects) == 1:
        return suspects[0]
    for command in running:
        command.episode.is_suspect = True
    return None
