"""The supervisor of one worker: it replaces lost processes and keeps the other episodes alive.

The process tells which of its commands are running (`empg_jax.workers.inflight`). One that exceeds its time,
or that ran alone when the process died, costs its episode. Where several ran at a death, none is blamed: they
are run again, one at a time, and a second death shows the cause. The process is replaced, and every other
episode is *replayed* before its next command: same task, seed and actions, and each answer must equal the one
seen before. A snapshot of the environment's own stands for the replay. An episode of an environment that
declares itself not replayable is lost at once; however many these are, they are one incident.
"""

from __future__ import annotations

import itertools
import logging
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from empg_jax.workers.faults import FaultPolicy, PoolError, PoolStats, PoolTimeouts, Reason, Tell
from empg_jax.workers.inflight import Command, Inflight
from empg_jax.workers.process import KILL_SECONDS, ProtocolError, WorkerProcess
from empg_jax.workers.record import EpisodeRecord

logger = logging.getLogger(__name__)

HARD_MEMORY = 1.5  # times the memory limit at which even episodes that cannot be replayed are given up


class Sink(Protocol):
    """The receiver of a supervisor's results; each request ends in one call of `answered` or `failed`."""

    def answered(self, episode: EpisodeRecord, message: dict[str, Any]) -> None:
        """Take the answer to the episode's request."""

    def failed(
        self, episode: EpisodeRecord, reason: Reason, detail: str, *, is_incident: bool = True
    ) -> None:
        """Take the report that the episode is lost; by its own fault, or with its worker (no incident)."""

    def lost_worker(self, reason: Reason, detail: str) -> None:
        """Take the report that a worker died by nobody's fault and took episodes with it."""

    def start_failed(self, detail: str) -> None:
        """Take the report that a worker that was ready before does not start any more."""


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
        pass_env: Sequence[str],
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
        self._pass_env, self._tell = pass_env, tell
        self._process: WorkerProcess | None = None
        self._is_replayable = True
        self._queue: list[EpisodeRecord] = []  # with a request that is not sent
        self._inflight = Inflight()
        self._ids = itertools.count()
        self._progress = 0.0  # when bytes last moved; the first command's time counts from here
        self._start_at = 0.0
        self._failed_starts, self._failing_since = 0, 0.0  # in a row
        self._barren = 0  # consecutive starts without any answer
        self._must_recycle = False

    @property
    def pid(self) -> int | None:
        """Process id, None between two processes."""
        return self._process.pid if self._process is not None else None

    @property
    def is_failing(self) -> bool:
        """Whether the process has failed to start too often in a row."""
        return self._failed_starts >= self._policy.start_attempts

    @property
    def deadline(self) -> float:
        """Time (`time.monotonic`) at which `check` or `pump` must act even if the worker stays silent."""
        if self._process is None:
            return self._start_at
        if not self.is_ready:
            return self._progress + self._timeouts.start
        return self._inflight.due(self._progress, self._limit)[0]

    def hold(self, episode: EpisodeRecord, op: str, args: dict[str, Any]) -> None:
        """Take a request without queuing it; `resume` queues it."""
        episode.request = (op, args)
        self.episodes[episode.handle] = episode

    def resume(self, episode: EpisodeRecord) -> None:
        """Queue a request that was held; `pump` sends it."""
        self._queue.append(episode)

    def ask(self, episode: EpisodeRecord, op: str, args: dict[str, Any]) -> None:
        """Queue a request; `pump` sends it."""
        self.hold(episode, op, args)
        if episode.loss is not None:
            self._fail(episode, "worker_died", episode.loss, is_incident=False)
        else:
            self.resume(episode)

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

    def forgive(self, seconds: float) -> None:
        """Move the deadlines, because the pool did not listen for so long."""
        self._inflight.forgive(seconds)

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
        """Send one message with the queued requests, each after the replay that it needs."""
        assert self._process is not None
        offset = self._process.queued_bytes
        has_suspect = any(episode.is_suspect for episode in self._inflight.episodes())
        commands: list[Command] = []
        queue, self._queue = self._queue, []
        for episode in queue:
            if not episode.is_live or episode.request is None:
                continue
            if episode.is_suspect and has_suspect:
                self._queue.append(episode)
                continue
            has_suspect |= episode.is_suspect
            commands += self._replay(episode, offset)
            commands.append(Command(next(self._ids), episode, *episode.request, offset))
        if not commands:
            return
        if not self._inflight:
            self._progress = time.monotonic()
        self._inflight.add(commands)
        self._process.send(
            [{"id": c.id, "env": c.episode.handle, "op": c.op, "args": c.args} for c in commands]
        )
        self._watch_stdin()

    def _replay(self, episode: EpisodeRecord, offset: int) -> list[Command]:
        """Make the commands that bring an episode of a lost process into its state, in the new one."""
        if not episode.is_stale:
            return []
        episode.is_stale = False
        commands = [
            Command(next(self._ids), episode, op, args, offset, digest, is_replay=True)
            for op, args, digest in episode.past()
        ]
        commands[-1].completes_replay = True
        if not episode.is_probe:
            self._stats.replayed += len(commands)
        return commands

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
        if "running" in message:
            if not self._inflight.begin(message["running"], message["thread"], self._progress):
                raise ProtocolError(f"command {message['running']!r} is running, but was not sent")
            return
        command = self._inflight.pop(message.get("id"))
        if command is None:
            raise ProtocolError(f"reply {message.get('id')!r} is not one that is due")
        self._barren = 0
        if "rss_mb" in message:
            self._check_memory(message["rss_mb"])
        if not command.episode.is_live:
            return
        if message["ok"]:
            self._accept(command, message)
        else:
            self._refuse(command, message)

    def _accept(self, command: Command, message: dict[str, Any]) -> None:
        """Take an environment's answer to a request or to a step of a replay."""
        episode = command.episode
        # A digest instead of the text: long episodes would keep every observation in memory a second time.
        digest = hash(tuple(message.get(key) for key in ("observation", "reward", "terminated", "truncated")))
        if not command.is_replay:
            episode.is_suspect = False
            if command.op == "step":
                episode.actions.append(command.args["action"])
            episode.digests.append(digest)
            episode.snapshot = message.get("snapshot")
            self._sink.answered(episode, message)
        elif command.expected not in (None, digest) and not episode.is_probe:
            detail = (
                f"replayed in a new worker, {command.op} {command.args} of {episode} "
                f"gave something else: {message['observation'][:200]!r}"
            )
            self._fail(episode, "nondeterministic", detail, is_incident=False)
        elif command.completes_replay and not episode.is_probe:
            self._stats.recovered += 1

    def _refuse(self, command: Command, message: dict[str, Any]) -> None:
        """Take an environment's exception or malformed answer."""
        error, episode = message["error"], command.episode
        # The environment survived this time, but the next command would meet the same limit.
        if error.startswith("MemoryError"):
            self._must_recycle = True
        if command.is_replay and not episode.is_probe:
            detail = f"replay of {command.op} failed: {error}"
            self._fail(episode, "nondeterministic", detail, is_incident=False)
        elif message["kind"] == "garbage":
            self._fail(episode, "env_garbage", error)
        else:
            self._fail(episode, "env_error", f"{error}\n{message['traceback']}")

    # Faults.

    def _fail(self, episode: EpisodeRecord, reason: Reason, detail: str, *, is_incident: bool = True) -> None:
        if self.forget(episode.handle) is not None:
            self._sink.failed(episode, reason, detail, is_incident=is_incident)

    def _lose(self, reason: Reason, prefix: str = "") -> None:
        """Replace a process that died or hangs, and fail the episode that is the cause."""
        assert self._process is not None
        process = self._process
        culprit = self._inflight.due(self._progress, self._limit)[1] if reason == "timeout" else None
        # SIGABRT makes a hanging worker write its stacks, so that the message shows where it hangs.
        how = self._stop(
            KILL_SECONDS,
            signal.SIGABRT if reason == "timeout" else None,
            None if culprit is None else culprit.thread,
        )
        if not self.is_ready:
            slow = f"not ready after {self._timeouts.start:g} s; " if reason == "timeout" else ""
            self._fail_start(f"{prefix}{slow}{how}")
            return
        # A command that the worker had not read cannot have caused the death; it is sent again.
        running = [c for c in self._inflight.running() if process.consumed_bytes > c.offset]
        if reason != "timeout":
            culprit = _find_culprit(running)
        if culprit not in running:
            culprit = None
        if culprit is not None and culprit.episode.is_live:
            doing = "replaying" if culprit.is_replay else "in"
            slow = f"no answer after {self._limit(culprit.op):g} s; " if reason == "timeout" else ""
            detail = f"{prefix}{slow}{doing} {culprit.op} {culprit.args} of {culprit.episode}; worker: {how}"
            self._fail(culprit.episode, reason, detail)
        logger.info("worker %d is replaced: %s (%s)", self.number, reason, how)
        self._stats.restarts += 1
        self._tell("worker_restarted", worker=self.number, reason=reason, detail=how)
        self._start_at = time.monotonic() + self._policy.wait_before_start(self._barren)
        self._barren += 1
        lost = self._orphan(f"{prefix}lost with its worker ({how}); the environment is not replayable")
        if lost and culprit is None:
            self._sink.lost_worker(reason, how)

    def _check_memory(self, rss_mb: float) -> None:
        limit = self._memory_limit
        if limit is None or rss_mb <= limit:
            return
        # Episodes that would be lost are waited for, as long as memory allows.
        if rss_mb <= HARD_MEMORY * limit and any(map(self._is_fragile, self.episodes.values())):
            return
        logger.info("worker %d holds %.0f MiB and is replaced", self.number, rss_mb)
        self._must_recycle = True

    def _recycle(self) -> None:
        """Replace the process between two commands because of its memory."""
        self.hang_up()
        self._stop(KILL_SECONDS)
        self._stats.recycled += 1
        self._tell("worker_restarted", worker=self.number, reason="memory", detail="")
        self._orphan("lost with its worker, which held too much memory; the environment is not replayable")
        self._start()

    def _is_fragile(self, episode: EpisodeRecord) -> bool:
        """Return whether an episode cannot go on in another process."""
        return episode.has_begun and episode.snapshot is None and not self._is_replayable

    def _orphan(self, detail: str) -> int:
        """Mark the episodes of a lost process for replay, and queue their open requests again.

        Returns:
          The number of episodes that are lost, because they cannot be replayed.
        """
        waiting = [episode for episode in self._inflight.episodes() if episode.is_live]
        self._inflight.clear()
        self.is_ready = self._must_recycle = False
        lost = list(filter(self._is_fragile, self.episodes.values()))
        for episode in lost:
            if episode.request is None:
                episode.loss = detail  # told with the next request
            else:
                self._fail(episode, "worker_died", detail, is_incident=False)
        for episode in self.episodes.values():
            episode.is_stale = episode.has_begun and episode.loss is None
        self._queue[:0] = [episode for episode in waiting if episode.is_live]
        return len(lost)

    # The process.

    def _start(self) -> None:
        self._process = WorkerProcess(self._hello, self._pass_env)
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
        self.splits, self._is_replayable = message["splits"], message["replayable"]
        self.is_ready = True
        self._failed_starts = 0

    def _fail_start(self, detail: str) -> None:
        now = time.monotonic()
        if not self._failed_starts:
            self._failing_since = now
        self._failed_starts += 1
        self._barren += 1
        self._start_at = now + self._policy.wait_before_start(self._barren)
        if not self.is_failing:
            return
        # A worker that never was ready has a mistake in its configuration; any other waits for its backend.
        if not self.splits or now >= self._failing_since + self._policy.patience:
            raise PoolError(
                f"worker {self.number} (environment {self._hello['env']!r}) failed to start "
                f"{self._failed_starts} times in a row; the last time: {detail}"
            )
        self._sink.start_failed(f"worker {self.number}: {detail}")

    def _stop(self, grace: float, first_signal: int | None = None, thread: int | None = None) -> str:
        """End and reap the process; return a description of how it ended."""
        assert self._process is not None
        self._unregister(self._process.stdout)
        self._unregister(self._process.stdin)
        how = self._process.stop(grace, first_signal, thread)
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
        return self._timeouts.step if op == "step" else self._timeouts.reset


def _find_culprit(running: list[Command]) -> Command | None:
    """Find the command that killed its process; where that cannot be known, mark all of them as suspects."""
    if len(running) == 1:
        return running[0]
    suspects = [command for command in running if command.episode.is_suspect]
    if len(suspects) == 1:
        return suspects[0]
    for command in running:
        command.episode.is_suspect = True
    return None
