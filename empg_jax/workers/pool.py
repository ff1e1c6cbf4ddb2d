"""The pool of environments in a few worker processes: text in, text out, faults returned as data.

The caller numbers its episode slots; slot (*handle*) ``h`` always lives in worker ``h % num_workers``.
`EnvPool.reset` and `EnvPool.step` only queue a command; `EnvPool.poll` sends one message per worker and
returns the answers that have arrived::

    with EnvPool("household", {"level": "easy"}, num_workers=2) as pool:
        pool.reset(0, seed=7, split="train", index=3)
        (reply,) = pool.poll(None)
        pool.step(0, "go to fridge 1")

A worker serves its live episodes beside each other, so a slow command holds up nobody (`empg_envs.lanes`).
One broken environment costs one episode (`empg_jax.workers.supervisor`). When most of them break, resets are
held until a probe succeeds (`empg_jax.workers.breaker`): the caller only waits. Neither the pool nor its
workers need JAX. One thread drives a pool, and deadlines are checked while it polls.
"""

from __future__ import annotations

import dataclasses
import selectors
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from empg_jax.errors import nearest
from empg_jax.workers.backend import Start
from empg_jax.workers.breaker import Breaker
from empg_jax.workers.faults import (
    EnvFailure,
    FaultPolicy,
    PoolError,
    PoolStats,
    PoolTimeouts,
    Reason,
    RefusedPool,
    Tell,
    tell_nobody,
)
from empg_jax.workers.outages import Outages
from empg_jax.workers.process import start_local
from empg_jax.workers.quarantine import Quarantine
from empg_jax.workers.record import EpisodeRecord
from empg_jax.workers.supervisor import Supervisor

__all__ = ["EnvFailure", "EnvPool", "EnvReply", "FaultPolicy", "PoolError", "PoolStats", "PoolTimeouts"]

MAX_WAIT = 1.0  # seconds between two checks of silent workers
CLOSE_SECONDS = 2.0  # granted to idle workers to close their environments
LANES = 64  # commands that a worker runs at the same time, unless told otherwise
LANE_MB = 8  # address space of a thread's stack
STDERR_KEEP = 4 << 20  # a worker empties its stderr file when it has grown beyond this


@dataclasses.dataclass(frozen=True, slots=True)
class EnvReply:
    """The answer to one reset or step.

    Attributes:
      handle: the episode slot.
      op: ``reset`` or ``step``.
      observation, reward, terminated, truncated, info: the environment's answer (after a reset the
        reward is 0 and both flags are false).
      failure: None, or the cause of the lost episode; the other fields are then empty and the handle is free.
    """

    handle: int
    op: str
    observation: str = ""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    failure: EnvFailure | None = None


class EnvPool:
    """A pool of environments in worker processes; see the module's docstring.

    Attributes:
      splits: number of tasks by split, as the environment reports it.
      stats: counts since the pool was opened.
      breaker: whether new episodes are held, and since when.
      tell: receives the events of this pool, and of the code that runs episodes in it.
    """

    def __init__(
        self,
        env: str,
        options: Mapping[str, Any] | None = None,
        *,
        num_workers: int,
        lanes: int = LANES,
        timeouts: PoolTimeouts | None = None,
        memory_limit_mb: int | None = None,
        pass_env: Sequence[str] = (),
        start: Start = start_local,
        faults: FaultPolicy | None = None,
        timeouts_are_answers: bool = False,
        tell: Tell = tell_nobody,
    ):
        """Start the workers and wait until all are ready.

        Args:
          env: a name in ``empg_envs.ENVS`` or an entry point ``package.module:attribute``.
          options: keyword arguments of the environment; JSON-able.
          num_workers: number of processes.
          lanes: number of commands that a process runs at the same time; 1 runs them one after another.
          timeouts: deadlines.
          memory_limit_mb: a worker whose resident memory exceeds this is replaced between two
            commands. As a guard against a sudden leap inside a command, its address space is limited
            to twice this plus 512 MiB (it always exceeds resident memory: libraries) and the threads' stacks,
            unless the environment declares ``bounded = False``.
          pass_env: names of environment variables that the workers get besides the usual ones.
          start: starts a worker, on this machine unless told otherwise (`empg_jax.workers.backend`).
          faults: limits at which the pool pauses, or gives up on a task, a worker or altogether.
          timeouts_are_answers: a step that exceeds its time says nothing against the environment or the task,
            because the caller scores it as the policy's own doing; it is still a failure of the episode.
          tell: receives restarts of workers, quarantined tasks and pauses.

        Raises:
          ValueError: ``num_workers`` or ``lanes`` below 1.
          RefusedPool: a worker does not start; the message holds its reason.
        """
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; expected at least 1")
        if lanes < 1:
            raise ValueError(f"lanes is {lanes}; expected at least 1")
        self.stats, self.tell = PoolStats(), tell
        policy = faults or FaultPolicy()
        space = None if memory_limit_mb is None else 2 * memory_limit_mb + 512 + LANE_MB * lanes
        hello = {"env": env, "options": dict(options or {}), "memory_limit_mb": space, "lanes": lanes}
        hello["stderr_bytes"] = STDERR_KEEP
        self._timeouts_are_answers = timeouts_are_answers
        self.breaker = Breaker(policy, tell)
        self._quarantine = Quarantine(policy, tell)
        self._waiting: set[int] = set()  # handles with a request that is not answered
        self._ready: list[EnvReply] = []
        self._is_closed = False
        self._selector = selectors.DefaultSelector()
        self._workers = [
            Supervisor(
                number,
                hello,
                start=start,
                timeouts=timeouts or PoolTimeouts(),
                policy=policy,
                memory_limit_mb=memory_limit_mb,
                pass_env=pass_env,
                selector=self._selector,
                stats=self.stats,
                tell=tell,
                sink=self,
            )
            for number in range(num_workers)
        ]
        self._outages = Outages(self.breaker, self._workers, self._worker_of, policy.breaker_min)
        try:
            while not all(worker.is_ready for worker in self._workers):
                self._pump()
                self._wait(MAX_WAIT)
        except BaseException as error:
            self.close()
            if isinstance(error, PoolError):
                raise RefusedPool(str(error)) from None
            raise
        self.splits = self._workers[0].splits

    def __enter__(self) -> EnvPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reset(self, handle: int, *, seed: int, split: str, index: int) -> None:
        """Queue the start of an episode.

        Raises:
          ValueError: a negative handle, one with a live episode, or a task that does not exist.
        """
        if handle < 0:
            raise ValueError(f"handle {handle} is negative")
        worker = self._worker_of(handle)
        if handle in worker.episodes:
            raise ValueError(f"handle {handle} has a live episode: release it first")
        self._check_task(split, index)
        self.stats.commands += 1
        episode = EpisodeRecord(handle, split, index, seed)
        self._waiting.add(handle)
        worker.hold(episode, "reset", episode.reset_args())
        if self._quarantine.holds(split, index):
            worker.forget(handle)
            # Answered like every other request, so that the caller needs no second path for refusals.
            detail = f"task {split}/{index} failed too often; not tried for a while"
            self.failed(episode, "quarantined", detail, is_incident=False)
        elif self.breaker.is_open:
            self._outages.hold(episode)
        else:
            worker.resume(episode)

    def step(self, handle: int, action: str) -> None:
        """Queue an action.

        Raises:
          ValueError: the handle has no live episode, or its last command is not answered yet.
        """
        worker = self._worker_of(handle)
        episode = worker.episodes.get(handle)
        if episode is None:
            raise ValueError(f"handle {handle} has no live episode: reset it first")
        if episode.request is not None:
            raise ValueError(f"handle {handle} still waits for the answer to its {episode.request[0]}")
        if not isinstance(action, str):
            raise ValueError(f"handle {handle}: the action is {type(action).__name__}; expected str")
        self.stats.commands += 1
        self._waiting.add(handle)
        worker.ask(episode, "step", {"action": action})

    def release(self, handle: int) -> None:
        """End an episode and drop its outstanding answer. Does nothing if the episode is over.

        An environment that is not replayable is closed in its worker, unless it has ended the episode itself.
        """
        self._ready = [reply for reply in self._ready if reply.handle != handle]
        episode = self._worker_of(handle).release(handle)
        if episode is None:
            return
        self._waiting.discard(handle)
        # Neither an unanswered command nor a mere reset says that the task can be played.
        if episode.request is None and episode.actions and episode.loss is None:
            self.breaker.record_success()
            self._outages.forget()
            self._quarantine.record_success(episode.split, episode.index)

    def poll(self, timeout: float | None = None, *, within: range | None = None) -> list[EnvReply]:
        """Send the queued commands, wait for answers and return all that have arrived.

        Args:
          timeout: seconds to wait for the first answer; None waits without limit while a command is
          unanswered.
          within: take only answers to these handles; those to others wait for their own caller.

        Returns:
          Answers and failures, in the order of arrival; empty after the timeout, or when no command is
          unanswered.

        Raises:
          PoolError: workers do not start, or most episodes have failed for longer than ``patience``.
        """
        if self._is_closed:
            raise PoolError("the pool is closed")
        end = float("inf") if timeout is None else time.monotonic() + timeout
        self._wait(0.0)  # notice a worker that died in the meantime before something is sent to it
        while True:
            self._outages.tend()
            self._pump()
            if _any_of((reply.handle for reply in self._ready), within) or not _any_of(self._waiting, within):
                break
            left = end - time.monotonic()
            if left <= 0.0:
                break
            self._wait(min(left, MAX_WAIT))
        self.breaker.check()
        replies = [reply for reply in self._ready if within is None or reply.handle in within]
        self._ready = [reply for reply in self._ready if within is not None and reply.handle not in within]
        self.stats.replies += len(replies)
        return replies

    def worker_pids(self) -> list[int]:
        """List the process ids of the running workers."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def refuse(self, split: str, index: int, reason: str, detail: str) -> None:
        """Quarantine a task that its environment plays, but nobody can sample for."""
        self._quarantine.record_refusal(split, index, f"{reason}: {detail}")

    def quarantined(self) -> list[tuple[str, int]]:
        """List the quarantined tasks as (split, index)."""
        return self._quarantine.tasks()

    def fault_snapshot(self) -> dict[str, Any]:
        """Return the record of failed tasks as JSON types, for a checkpoint."""
        return self._quarantine.snapshot()

    def restore_faults(self, snapshot: dict[str, Any]) -> None:
        """Go on from a `fault_snapshot`."""
        self._quarantine.restore(snapshot)

    def close(self) -> None:
        """End the workers: idle ones may close their environments, the others are killed."""
        self._is_closed = True
        for worker in self._workers:
            # All at once first, so that the workers share one period of grace.
            worker.hang_up()
        end = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.close(max(0.0, end - time.monotonic()))
        self._selector.close()

    def answered(self, episode: EpisodeRecord, message: dict[str, Any]) -> None:
        """Take a supervisor's answer to the episode's open request."""
        assert episode.request is not None
        op, _ = episode.request
        episode.request = None
        if episode.is_probe:
            self._outages.pass_probe(episode, op)
            return
        self._waiting.discard(episode.handle)
        self.breaker.record_answer(op)
        reply = EnvReply(
            episode.handle,
            op,
            message["observation"],
            message["reward"],
            message["terminated"],
            message["truncated"],
            message["info"],
        )
        self._ready.append(reply)

    def failed(
        self, episode: EpisodeRecord, reason: Reason, detail: str, *, is_incident: bool = True
    ) -> None:
        """Take a supervisor's report of a lost episode, as the answer to its open request."""
        assert episode.request is not None
        if episode.is_probe:
            self._outages.fail_probe(episode)
            return
        failure, op = EnvFailure(reason, detail), episode.request[0]
        is_answer = self._timeouts_are_answers and (op, reason) == ("step", "timeout")
        is_incident &= not is_answer
        if is_incident:
            if not self.breaker.is_open:
                self._outages.remember(episode)
            # Where a split has one task only, there is no other whose failures could show a common cause.
            task = (episode.split, episode.index) if self.splits[episode.split] > 1 else object()
            self.breaker.record_failure(reason, detail, op, task=task)
        if self.breaker.is_open and reason != "quarantined" and not is_answer:
            failure = EnvFailure("outage", f"{reason}: {detail}")
            self._quarantine.forget_open()
        elif is_incident:
            self._quarantine.record_failure(episode.split, episode.index, failure)
        else:
            self._quarantine.record_end()
        self._waiting.discard(episode.handle)
        self.stats.failures[failure.reason] += 1
        self._ready.append(EnvReply(episode.handle, op, failure=failure))

    def lost_worker(self, reason: Reason, detail: str) -> None:
        """Take a supervisor's report of a worker that died by nobody's fault: one incident."""
        self.breaker.record_failure(reason, detail, task=object())  # of no task, and each counts

    def start_failed(self, detail: str) -> None:
        """Take a supervisor's report of a worker that does not start any more."""
        self.breaker.fail_start(detail)

    def _pump(self) -> None:
        for worker in self._workers:
            worker.pump()

    def _wait(self, seconds: float) -> None:
        """Move bytes for at most ``seconds``, then check the deadlines."""
        # Wake up at the first deadline, even if every worker stays silent.
        due = min(self._outages.due, *(worker.deadline for worker in self._workers))
        events = self._selector.select(max(0.0, min(seconds, due - time.monotonic())))
        for key, mask in events:
            key.data.handle(mask)
        for worker in self._workers:
            worker.check()
            if not events:
                worker.check_alive()

    def _worker_of(self, handle: int) -> Supervisor:
        return self._workers[handle % len(self._workers)]

    def _check_task(self, split: str, index: int) -> None:
        if split not in self.splits:
            known = ", ".join(sorted(self.splits))
            raise ValueError(f"unknown split {split!r}{nearest(split, self.splits)}; known: {known}")
        if not 0 <= index < self.splits[split]:
            raise ValueError(f"task {split}/{index} does not exist: {split!r} has {self.splits[split]} tasks")


def _any_of(handles: Iterable[int], within: range | None) -> bool:
    """Return whether there is a handle, within the range where one is given."""
    return any(within is None or handle in within for handle in handles)
