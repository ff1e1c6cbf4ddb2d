"""The supervisor of one worker: it replaces lost processes and keeps the other episodes alive.

The process tells which of its commands are running (`empg_jax.workers.inflight`). One that exceeds its time,
or that ran alone when the process died, costs its episode. Where several ran at a death, none is blamed: they
are run again, one at a time, and a second death shows the cause. The process is replaced, and every other
episode is *replayed* before its next command: same task, seed and actions, and each answer must equal the one
seen before. A snapshot of the environment's own stands for the replay. An episode of an environment that
declares itself not replayable is lost at once; however many these are, they are one incident.
"""

from __future__ import annotations

import logging
import selectors
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from empg_jax.workers.backend import Process, Start
from empg_jax.workers.faults import FaultPolicy, PoolError, PoolStats, PoolTimeouts, Reason, Tell
from empg_jax.workers.inflight import Command, Inflight, find_culprit
from empg_jax.workers.lines import ProtocolError
from empg_jax.workers.process import KILL_SECONDS
from empg_jax.workers.record import EpisodeRecord
from empg_jax.workers.sink import Sink
from empg_jax.workers.starts import Starts

logger = logging.getLogger(__name__)

HARD_MEMORY = 1.5  # times the memory limit at which even episodes that cannot be replayed are given up


class Supervisor:
    """One worker's place in the pool; see the module's docstring.

    Attributes:
      episodes: the live episodes of this worker by handle.
      is_ready: whether the process has sent its first message.
      splits: number of tasks by split, as the process reported it.
      is_replayable: whether its episodes can be replayed, as the environment declares.
    """

    def __init__(
        self,
        number: int,
        hello: Mapping[str, Any],
        *,
        start: Start,
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
        self._hello, self._timeouts = dict(hello), timeouts
        self._memory_limit, self._selector, self._stats, self._sink = memory_limit_mb, selector, stats, sink
        self._pass_env, self._tell = pass_env, tell
        self._start_process = start
        self._process: Process | None = None
        self.is_replayable = True
        self._queue: list[EpisodeRecord] = []  # with a request that is not sent
        self._inflight = Inflight()
        self._progress = 0.0  # when bytes last moved
        self._read_at = 0.0
        self._starts = Starts(policy)
        self._must_recycle = False

    @property
    def pid(self) -> int | None:
        """Process id, None between two processes."""
        return self._process.pid if self._process is not None else None

    @property
    def is_failing(self) -> bool:
        """Whether the process has failed to start too often in a row."""
        return self._starts.is_failing

    @property
    def deadline(self) -> float:
        """Time (`time.monotonic`) at which `check` or `pump` must act even if the worker stays silent."""
        if self._process is None:
            return self._starts.at
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

    def release(self, handle: int) -> EpisodeRecord | None:
        """End an episode as the caller wishes.

        An environment that is not replayable may hold what others lack, such as a server's sessions. So it is
        closed, unless it has ended the episode itself; the next reset of the handle then gets a new one.
        """
        episode = self.forget(handle)
        if episode is not None and not (self.is_replayable or episode.has_ended):
            self._queue.append(episode.make_closing())
            if self.is_ready and not self._must_recycle:
                self._send()  # not with the next poll: a reset in another worker may need what is held
        return episode

    def pump(self) -> None:
        """Start or replace the process when that is due, and send the queued requests."""
        if self._process is None and time.monotonic() >= self._starts.at:
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
        if events & selectors.EVENT_WRITE and self._process.write():
            self._progress = time.monotonic()
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
            self._process.hang_up()

    def close(self, grace: float) -> None:
        """End the process: at once if it is busy, after at most ``grace`` seconds if idle."""
        if self._process is not None:
            self._stop(grace if self.is_ready and not self._inflight.is_busy else 0.0)

    # Sending and receiving.

    def _send(self) -> None:
        """Send one message with the queued requests, each after the replay that it needs."""
        assert self._process is not None
        now = time.monotonic()
        commands, self._queue = self._inflight.compose(self._queue, self._process.queued_bytes, now)
        if not commands:
            return
        self._inflight.add(commands)
        self._stats.replayed += sum(c.is_replay and not c.episode.is_probe for c in commands)
        self._process.send(
            [{"id": c.id, "env": c.episode.handle, "op": c.op, "args": c.args} for c in commands]
        )

    def _read(self) -> None:
        process = self._process
        assert process is not None
        try:
            messages, is_closed = process.read()
            now = time.monotonic()
            if process.was_blocked:
                self._inflight.forgive(now - self._read_at)
            self._progress = self._read_at = now
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
        self._starts.bear()
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
                episode.has_ended = message["terminated"] or message["truncated"]
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
        elif "reason" in message:
            self._fail(episode, message["reason"], error)
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
            culprit = find_culprit(running)
        if culprit not in running:
            culprit = None
        if culprit is not None and culprit.episode.is_live:
            slow = f"no answer after {self._limit(culprit.op):g} s; " if reason == "timeout" else ""
            # What hangs only when it is repeated is not the policy's doing.
            cause: Reason = "worker_died" if culprit.is_replay else reason
            self._fail(culprit.episode, cause, f"{prefix}{slow}{culprit}; worker: {how}")
        logger.info("worker %d is replaced: %s (%s)", self.number, reason, how)
        self._stats.restarts += 1
        self._tell("worker_restarted", worker=self.number, reason=reason, detail=how)
        self._starts.lose()
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
        return episode.has_begun and episode.snapshot is None and not self.is_replayable

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
        self._process = self._start_process(self._pass_env, self._selector, self)
        self._process.send(self._hello)
        self.is_ready = False
        self._progress = self._read_at = time.monotonic()
        self._stats.starts += 1

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
        self.splits, self.is_replayable = message["splits"], message["replayable"]
        self.is_ready = True
        self._starts.succeed()

    def _fail_start(self, detail: str) -> None:
        self._starts.fail()
        if not self.is_failing:
            return
        # A worker that never was ready has a mistake in its configuration; any other waits for its backend.
        if not self.splits or self._starts.is_hopeless:
            raise PoolError(
                f"worker {self.number} (environment {self._hello['env']!r}) failed to start "
                f"{self._starts.failed} times in a row; the last time: {detail}"
            )
        self._sink.start_failed(f"worker {self.number}: {detail}")

    def _stop(self, grace: float, first_signal: int | None = None, thread: int | None = None) -> str:
        """End and reap the process; return a description of how it ended."""
        assert self._process is not None
        how = self._process.stop(grace, first_signal, thread)
        self._process = None
        return how

    def _limit(self, op: str) -> float:
        return self._timeouts.step if op == "step" else self._timeouts.reset
