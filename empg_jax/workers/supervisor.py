"""The supervisor of one worker: it replaces lost processes and keeps the other episodes alive.

A worker answers in order, so the first unanswered command is the cause of a hang or a death; its episode
fails. The process is replaced. Every other episode is *replayed* before its next command: same task, seed and
actions, and each answer must equal the one seen before.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import selectors
import signal
import time
from collections.abc import Mapping
from typing import Any, Protocol

from empg_jax.workers.faults import FaultPolicy, PoolError, PoolStats, PoolTimeouts, Reason, Tell
from empg_jax.workers.process import KILL_SECONDS, ProtocolError, WorkerProcess
from empg_jax.workers.record import EpisodeRecord

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """The receiver of a supervisor's results; each request ends in exactly one of the two calls."""

    def answered(self, episode: EpisodeRecord, message: dict[str, Any]) -> None:
        """Take the answer to the episode's request."""

    def failed(self, episode: EpisodeRecord, reason: Reason, detail: str) -> None:
        """Take the report that the episode is lost."""


@dataclasses.dataclass(slots=True)
class _Command:
    """A command that was sent to a worker.

    Attributes:
      offset: bytes sent to the process before the message that holds the command.
      expected: the digest that a replayed command must give; None for a request.
      completes_replay: whether it is the last command of a replay.
    """

    id: int
    episode: EpisodeRecord
    op: str
    args: dict[str, Any]
    offset: int
    expected: int | None = None
    completes_replay: bool = False


class Supervisor:
    """One worker's place in the pool; see the module's docstring.

    Attributes:
      episodes: the live episodes of this worker by handle.
      is_ready: whether the process has sent its first message.
      splits: number of tasks by split, as the process reported it.
    """

    def __init__(
        self,
        number: int,
        hello: Mapping[str, Any],
        *,
        timeouts: PoolTimeouts,
        policy: FaultPolicy,
        memory_limit_mb: int | None,
        selector: selectors.BaseSelector,
        stats: PoolStats,
        tell: Tell,
        sink: Sink,
    ):
        """Set up a worker's place; `pump` starts the process."""
        self.number = number
        self.episodes: dict[int, EpisodeRecord] = {}
        self.splits: dict[str, int] = {}
        self.is_ready = False
        self._hello, self._timeouts, self._policy = dict(hello), timeouts, policy
        self._memory_limit, self._selector, self._stats, self._sink = memory_limit_mb, selector, stats, sink
        self._tell = tell
        self._process: WorkerProcess | None = None
        self._queue: list[EpisodeRecord] = []  # with a request that is not sent
        self._inflight: collections.deque[_Command] = collections.deque()
        self._ids = itertools.count()
        self._progress = 0.0  # when bytes last moved; the first command's time counts from here
        self._start_at = 0.0
        self._failed_starts = 0  # in a row
        self._barren = 0  # consecutive starts without any answer
        self._must_recycle = False

    @property
    def pid(self) -> int | None:
        """Process id, None between two processes."""
        return self._process.pid if self._process is not None else None

    @property
    def deadline(self) -> float:
        """Time (`time.monotonic`) at which `check` or `pump` must act even if the worker stays silent."""
        if self._process is None:
            return self._start_at
        if not self.is_ready:
            return self._progress + self._timeouts.start
        if self._inflight:
            return self._progress + self._limit(self._inflight[0].op)
        return float("inf")

    def ask(self, episode: EpisodeRecord, op: str, args: dict[str, Any]) -> None:
        """Queue a request; `pump` sends it."""
        episode.request = (op, args)
        self.episodes[episode.handle] = episode
        self._queue.append(episode)

    def forget(self, handle: int) -> EpisodeRecord | None:
        """End an episode; its outstanding answer will be dropped."""
        episode = self.episodes.pop(handle, None)
        if episode is not None:
            episode.is_live = False
        return episode

    def pump(self) -> None:
        """Start or replace the process when that is due, and send the queued requests."""
        if self._process is None and time.monotonic() >= self._start_at:
            self._start()
        if self._must_recycle and not self._inflight:
            self._recycle()
        # Nothing new is sent while a replacement is due, so that the worker falls idle and can be replaced.
        if self.is_ready and self._queue and not self._must_recycle:
            self._send()

    def handle(self, events: int) -> None:
        """Move bytes after the selector reported that it is possible."""
        if self._process is None:  # replaced by an earlier event of the same round
            return
        if events & selectors.EVENT_WRITE:
            if self._process.write():
                self._progress = time.monotonic()
            self._watch_stdin()
        if events & selectors.EVENT_READ:
            self._read()

    def check(self) -> None:
        """Replace the process if its deadline has passed."""
        if self._process is not None and time.monotonic() >= self.deadline:
            self._lose("timeout")

    def check_alive(self) -> None:
        """Detect a death even if a process left behind by an environment holds the pipe open."""
        process = self._process
        if process is not None and not process.is_alive():
            self._read()
            if self._process is process:
                self._lose("worker_died")

    def hang_up(self) -> None:
        """Let an idle worker close its environments and exit."""
        if self._process is not None:
            self._unregister(self._process.stdin)
            self._process.hang_up()

    def close(self, grace: float) -> None:
        """End the process: at once if it is busy, after at most ``grace`` seconds if idle."""
        if self._process is not None:
            self._stop(grace if self.is_ready and not self._inflight else 0.0)

    # Sending and receiving.

    def _send(self) -> None:
        """Send one message with all queued requests, each after the replay that it needs."""
        assert self._process is not None
        offset = self._process.queued_bytes
        commands: list[_Command] = []
        for episode in self._queue:
            if not episode.is_live or episode.request is None:
                continue
            if episode.is_stale:
                for op, args, digest in episode.past():
                    commands.append(_Command(next(self._ids), episode, op, args, offset, digest))
                commands[-1].completes_replay = True
                self._stats.replayed += len(episode.digests)
                episode.is_stale = False
            commands.append(_Command(next(self._ids), episode, *episode.request, offset))
        self._queue.clear()
        if not commands:
            return
        if not self._inflight:
            self._progress = time.monotonic()
        self._inflight.extend(commands)
        self._process.send(
            [{"id": c.id, "env": c.episode.handle, "op": c.op, "args": c.args} for c in commands]
        )
        self._watch_stdin()

    def _read(self) -> None:
        process = self._process
        assert process is not None
        try:
            messages, is_closed = process.read()
            self._progress = time.monotonic()
            for message in messages:
                self._receive(message)
        except ProtocolError as error:
            self._lose("worker_died", f"broken protocol: {error}; ")
            return
        if is_closed and self._process is process:
            self._lose("worker_died")

    def _receive(self, message: dict[str, Any]) -> None:
        if not self.is_ready:
            self._greet(message)
            return
        if not self._inflight or message.get("id") != self._inflight[0].id:
            raise ProtocolError(f"reply {message.get('id')!r} is not the one that is due")
        command = self._inflight.popleft()
        self._barren = 0
        if "rss_mb" in message:
            self._check_resources(message["rss_mb"])
        if not command.episode.is_live:
            return
        if message["ok"]:
            self._accept(command, message)
        else:
            self._refuse(command, message)

    def _accept(self, command: _Command, message: dict[str, Any]) -> None:
        """Take an environment's answer to a request or to a step of a replay."""
        episode = command.episode
        keys = ("observation", "reward", "terminated", "truncated")
        # A digest instead of the text: long episodes would keep every observation in memory a second time.
        digest = hash(tuple(message[key] for key in keys))
        if command.expected is None:
            episode.digests.append(digest)
            if command.op == "step":
                episode.actions.append(command.args["action"])
            self._sink.answered(episode, message)
        elif digest != command.expected:
            detail = (
                f"replayed in a new worker, {command.op} {command.args} of {episode} "
                f"gave something else: {message['observation'][:200]!r}"
            )
            self._fail(episode, "nondeterministic", detail)
        elif command.completes_replay:
            self._stats.recovered += 1

    def _refuse(self, command: _Command, message: dict[str, Any]) -> None:
        """Take an environment's exception or malformed answer."""
        error = message["error"]
        # The environment survived this time, but the next command would meet the same limit.
        if error.startswith("MemoryError"):
            self._must_recycle = True
        if command.expected is not None:
            self._fail(command.episode, "nondeterministic", f"replay of {command.op} failed: {error}")
        elif message["kind"] == "garbage":
            self._fail(command.episode, "env_garbage", error)
        else:
            self._fail(command.episode, "env_error", f"{error}\n{message['traceback']}")

    # Faults.

    def _fail(self, episode: EpisodeRecord, reason: Reason, detail: str) -> None:
        if self.forget(episode.handle) is not None:
            self._sink.failed(episode, reason, detail)

    def _lose(self, reason: Reason, prefix: str = "") -> None:
        """Replace a process that died or hangs, and fail the episode that it was serving."""
        assert self._process is not None
        process, head = self._process, self._inflight[0] if self._inflight else None
        # SIGABRT makes a hanging worker write its stack, so that the message shows where it hangs.
        how = self._stop(KILL_SECONDS, signal.SIGABRT if reason == "timeout" else None)
        if not self.is_ready:
            slow = f"not ready after {self._timeouts.start:g} s; " if reason == "timeout" else ""
            self._fail_start(f"{prefix}{slow}{how}")
            return
        # A command that the worker had not read cannot have caused the death; it is sent again.
        if head is not None and process.consumed_bytes > head.offset and head.episode.is_live:
            doing = "replaying" if head.expected is not None else "in"
            slow = f"no answer after {self._limit(head.op):g} s; " if reason == "timeout" else ""
            detail = f"{prefix}{slow}{doing} {head.op} {head.args} of {head.episode}; worker: {how}"
            self._fail(head.episode, reason, detail)
        logger.info("worker %d is replaced: %s (%s)", self.number, reason, how)
        self._stats.restarts += 1
        self._tell("worker_restarted", worker=self.number, reason=reason, detail=how)
        self._start_at = time.monotonic() + self._policy.wait_before_start(self._barren)
        self._barren += 1
        self._orphan()

    def _check_resources(self, rss_mb: float) -> None:
        if self._process is not None:
            self._process.trim_stderr()
        if self._memory_limit is not None and rss_mb > self._memory_limit:
            logger.info("worker %d holds %.0f MiB and is replaced", self.number, rss_mb)
            self._must_recycle = True

    def _recycle(self) -> None:
        """Replace the process between two commands because of its memory."""
        self.hang_up()
        self._stop(KILL_SECONDS)
        self._stats.recycled += 1
        self._tell("worker_restarted", worker=self.number, reason="memory", detail="")
        self._orphan()
        self._start()

    def _orphan(self) -> None:
        """Mark the episodes of a lost process for replay, and queue their open requests again."""
        open_episodes = dict.fromkeys(command.episode for command in self._inflight)
        self._queue[:0] = [episode for episode in open_episodes if episode.is_live]
        self._inflight.clear()
        self.is_ready = self._must_recycle = False
        for episode in self.episodes.values():
            episode.is_stale = bool(episode.digests)

    # The process.

    def _start(self) -> None:
        self._process = WorkerProcess(self._hello)
        self.is_ready = False
        self._progress = time.monotonic()
        self._stats.starts += 1
        self._selector.register(self._process.stdout, selectors.EVENT_READ, self)
        self._watch_stdin()

    def _greet(self, message: dict[str, Any]) -> None:
        """Take the first message of a process."""
        if "fatal" in message:
            self._stop(KILL_SECONDS)
            self._fail_start(message["fatal"])
            return
        if self._memory_limit is not None and message["rss_mb"] > self._memory_limit:
            raise PoolError(
                f"memory_limit_mb is {self._memory_limit}, "
                f"but a fresh worker already holds {message['rss_mb']:.0f} MiB"
            )
        self.splits = message["splits"]
        self.is_ready = True
        self._failed_starts = 0

    def _fail_start(self, detail: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= self._policy.start_attempts:
            raise PoolError(
                f"worker {self.number} (environment {self._hello['env']!r}) failed to start "
                f"{self._failed_starts} times in a row; the last time: {detail}"
            )
        self._barren += 1
        self._start_at = time.monotonic() + self._policy.wait_before_start(self._barren)

    def _stop(self, grace: float, first_signal: int | None = None) -> str:
        """End and reap the process; return a description of how it ended."""
        assert self._process is not None
        self._unregister(self._process.stdout)
        self._unregister(self._process.stdin)
        how = self._process.stop(grace, first_signal)
        self._process = None
        return how

    def _watch_stdin(self) -> None:
        """Watch for room in the worker's stdin exactly while something is unsent."""
        assert self._process is not None
        if not self._process.has_unsent:
            self._unregister(self._process.stdin)
        elif self._process.stdin not in self._selector.get_map():
            self._selector.register(self._process.stdin, selectors.EVENT_WRITE, self)

    def _unregister(self, descriptor: int) -> None:
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def _limit(self, op: str) -> float:
        return self._timeouts.reset if op == "reset" else self._timeouts.step
