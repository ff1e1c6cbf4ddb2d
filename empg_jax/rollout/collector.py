"""The collector: many episodes in flight between environment workers and the engine.

A free slot takes the next attempt at once, so no episode waits for the slowest one. In deterministic mode
every round is a barrier: all environments answer, then all responses are sampled, and a run repeats bit by
bit.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from empg_jax.engine.engine import Response, Watch
from empg_jax.engine.interface import SamplingEngine
from empg_jax.errors import RunError
from empg_jax.rollout.context import EpisodeContext, PromptDelta
from empg_jax.rollout.episode import Attempt, Episode, EpisodeRules
from empg_jax.rollout.own_code import CodeFault, ParserFault, PromptFault
from empg_jax.rollout.schedule import Round, ScheduleError
from empg_jax.text.template import ChatTemplateError
from empg_jax.types import Trajectory
from empg_jax.workers.pool import EnvPool, EnvReply

# Seconds that an idle engine waits for more answers: one prefill of many prompts is cheaper than many of one.
GATHER_SECONDS = 0.001
# Most that a time in the engine ages the episodes whose environments were at work through it. What is longer
# is a compilation or a wait for the learner, and nobody reads what the workers have to say meanwhile.
BURST_SECONDS = 1.0
# A retried attempt samples with other keys than the lost one, or it would repeat the same actions.
RETRY_STRIDE = 1 << 16
# Tasks whose first prompts are too long before any fits, or at which the template refuses, or prompt builder
# or parser raises, before any episode ends: training then stops to try further ones.
MAX_UNFIT = 64


class PromptError(RunError):
    """No first prompt leaves room for a response, or the chat template refuses a prompt of every task."""


class Collector:
    """The player of attempts, between environment workers and engine.

    Args:
      engine: the sampler; its slots are the episodes in flight.
      pool: the environment workers; a slot's number is its handle.
      make_context: one `EpisodeContext` per episode.
      parser: maps response text and info to a `ParsedAction`.
      decode: maps token ids to text.
      rules: what ends an episode.
      seed: seed handed to ``env.reset``.
      stream: first number of the sampling ids (0: training, 1: evaluation).
      first_handle: the pool's handle of slot 0, where several collectors share a pool.
      episode_timeout: seconds after which an episode is given up. Only time inside `advance` counts, and of
        the time in the engine only what its environment was at work through: an episode does not age while
        nobody serves it, nor by slow sampling.
      is_deterministic: use a barrier per turn.
      make_watch: makes what ends a response besides its tokens, one for each (see `Engine.submit`).
      has_deadlines: responses have deadlines of their own, so that no episode ages while one is sampled.
      num_tasks: tasks that it may be given. Where no first prompt fits, or the chat template refuses a
        prompt of every task, or prompt builder or parser raises at every task, that is an error, found after
        `MAX_UNFIT` tasks at the latest; None: every attempt at such a task is discarded, however many.
      look_at: called with group, observation and info of every answer.
      timer: a monotonic clock, in seconds.

    Attributes:
      check: called between two looks for answers while a barrier waits; it may raise to end the wait.
      served: seconds spent in `advance` so far.
      aged: the same without the time in the engine: the clock of the episodes.
      answered: slots whose environments' answers the last round took, ascending.
    """

    def __init__(
        self,
        engine: SamplingEngine,
        pool: EnvPool,
        make_context: Callable[[], EpisodeContext],
        parser: Any,
        decode: Callable[[Sequence[int]], str],
        rules: EpisodeRules,
        *,
        seed: int,
        stream: int = 0,
        first_handle: int = 0,
        episode_timeout: float = 300.0,
        is_deterministic: bool = False,
        make_watch: Callable[[], Watch | None] = lambda: None,
        has_deadlines: bool = False,
        num_tasks: int | None = None,
        look_at: Callable[[int, str, Mapping[str, Any]], None] = lambda group_id, observation, info: None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self.pool = engine, pool
        self._make_context, self._parser, self._decode, self._rules = make_context, parser, decode, rules
        self._seed, self._stream, self._first_handle = seed, stream, first_handle
        self._episode_timeout = episode_timeout
        self._is_deterministic, self._timer, self._make_watch = is_deterministic, timer, make_watch
        self._has_deadlines, self._num_tasks, self._look_at = has_deadlines, num_tasks, look_at
        self._has_fit = False  # whether a prompt has left room for a response
        self._unfit: dict[int, int] = {}  # length of the first prompt by task, for those that do not fit
        self._refused: set[int] = set()  # tasks whose prompts the template refused since an episode ended
        self._faulty: set[int] = set()  # likewise, tasks at which the prompt builder or the parser raised
        self.check: Callable[[], None] = lambda: None
        self.served = self.aged = 0.0
        self.answered: list[int] = []
        self._handles = range(first_handle, first_handle + engine.config.slots)
        self._queue: collections.deque[Attempt] = collections.deque()
        self._episodes: dict[int, Episode] = {}
        self._started: dict[int, float] = {}  # by slot, on the clock of `aged`
        self._asked: dict[int, float] = {}  # by slot, when a response with a deadline was asked for
        self._sampling = 0.0  # seconds in the engine so far
        self._unaged = 0.0  # those of the last round
        self._beside: set[int] = set()  # slots whose environments were at work when that time began
        self._ended: dict[Attempt, float] = {}  # those of the last round: when they started
        self._lost: list[tuple[Attempt, Trajectory]] = []  # episodes that got no response
        self._free = collections.deque(range(engine.config.slots))
        self._waiting: set[int] = set()  # slots whose environment owes an answer
        self._early: dict[int, EnvReply] = {}  # answers that arrived before the round that takes them

    @property
    def in_flight(self) -> int:
        """Number of attempts that were admitted and have not ended."""
        return len(self._queue) + len(self._episodes) + len(self._lost)

    def admit(self, attempts: Iterable[Attempt]) -> None:
        """Queue attempts; each starts as soon as a slot is free."""
        self._queue.extend(attempts)

    def cancel(self, group_id: int) -> int:
        """Give up the unfinished attempts of a group; return the number of their sampled tokens."""
        wasted = 0
        self._queue = collections.deque(a for a in self._queue if a.group_id != group_id)
        for slot, episode in list(self._episodes.items()):
            if episode.attempt.group_id == group_id:
                wasted += episode.num_tokens
                self._free_slot(slot)
        return wasted

    def cancel_all(self) -> None:
        """Give up everything in flight."""
        self._queue.clear()
        self._lost.clear()
        for slot in list(self._episodes):
            self._free_slot(slot)

    def advance(self, wanted: Round | None = None) -> list[tuple[Attempt, Trajectory]]:
        """Run one round: start episodes, take environment answers, decode a burst; return ended episodes.

        Args:
          wanted: a round to repeat: exactly its answers are taken, and the clock becomes its clock.
        """
        began, away = self._timer(), self.pool.breaker.seconds
        finished: list[tuple[Attempt, Trajectory]] = []
        self._ended.clear()
        self._start_episodes()
        replies = self._take_replies() if wanted is None else self._await_replies(wanted.answers or [])
        self.answered = [reply.handle - self._first_handle for reply in replies]
        for reply in replies:
            finished.extend(self._on_reply(reply))
        # Who has not answered since was at work all that time.
        for slot in self._beside & self._waiting:
            self._started[slot] -= min(self._unaged, BURST_SECONDS)
        self._beside, sampling = set(self._waiting), self._sampling
        responses = self._sample(is_eager=not self._is_deterministic)
        while self._is_deterministic and self.engine.has_work:
            responses += self._sample(is_eager=False)
        # By slot, so that actions are sent in an order that does not depend on which response ended first.
        for response in sorted(responses, key=lambda r: r.slot):
            self._on_response(response)
        lost, self._lost = self._lost, []
        finished.extend(lost)
        # Nor does an episode age while the environments are away.
        spent = max(0.0, self._timer() - began - (self.pool.breaker.seconds - away))
        was = self.served - self.aged
        if wanted is None:
            self.served += spent
            self.aged += max(0.0, spent - (self._sampling - sampling))
        else:
            self.served, self.aged = wanted.served, wanted.aged
        self._unaged = self.served - self.aged - was
        finished.extend(self._expire())
        return finished

    def ages(self) -> dict[Attempt, float]:
        """Return the seconds that attempts have taken so far, on the clock that ``episode_timeout`` is for.

        Those in slots have ages, and those that ended in the last round; those that wait have none.
        """
        ages = {attempt: self.aged - started for attempt, started in self._ended.items()}
        return ages | {episode.attempt: self._age(slot) for slot, episode in self._episodes.items()}

    def settle(self) -> None:
        """Bring the engine to a turn boundary: responses in progress end, no new ones start."""
        while self.engine.has_work:
            for response in self._sample(is_eager=False):
                self._on_response(response)

    def _sample(self, *, is_eager: bool) -> list[Response]:
        began = self._timer()
        responses = self.engine.step(is_eager=is_eager)
        self._sampling += self._timer() - began
        return responses

    def _start_episodes(self) -> None:
        while self._queue and self._free:
            slot, attempt = self._free.popleft(), self._queue.popleft()
            self._episodes[slot] = Episode(attempt, self._make_context(), self._parser, self._rules)
            self._started[slot] = self.aged
            self.pool.reset(
                self._first_handle + slot, seed=self._seed, split=attempt.split, index=attempt.task
            )
            self._waiting.add(slot)

    def _take_replies(self) -> list[EnvReply]:
        """Take environment answers: all of them in deterministic mode, else those that have arrived."""
        if not self._waiting:
            return []
        # A busy engine must not idle for answers; it decodes on and looks again after the burst.
        is_busy = self.engine.has_work and not self._is_deterministic
        replies = self.pool.poll(0.0 if is_busy else 1.0, within=self._handles)
        owed = len(self._waiting)
        deadline = time.monotonic() + GATHER_SECONDS
        while len(replies) < owed and (
            self._is_deterministic or (not self.engine.has_work and time.monotonic() < deadline)
        ):
            if self._is_deterministic:
                self.check()
            wait = 1.0 if self._is_deterministic else GATHER_SECONDS
            replies += self.pool.poll(wait, within=self._handles)
        return sorted(replies, key=lambda reply: reply.handle)

    def _await_replies(self, slots: Sequence[int]) -> list[EnvReply]:
        """Wait for the answers of exactly these slots; others that arrive are kept for later rounds."""
        handles = {self._first_handle + slot for slot in slots}
        if not handles <= {self._first_handle + slot for slot in self._waiting}:
            able = sorted(self._waiting)
            raise ScheduleError(f"slots {list(slots)} should answer in this round, but only {able} can")
        while not handles <= self._early.keys():
            self.check()
            for reply in self.pool.poll(1.0, within=self._handles):
                self._early[reply.handle] = reply
        return [self._early.pop(handle) for handle in sorted(handles)]

    def _on_reply(self, reply: EnvReply) -> Iterator[tuple[Attempt, Trajectory]]:
        slot = reply.handle - self._first_handle
        episode = self._episodes.get(slot)
        if episode is None:  # canceled while the answer was on its way
            return
        self._waiting.discard(slot)
        step = self._take(episode, reply)
        if isinstance(step, PromptDelta):
            if self.engine.room(slot, len(step.tokens), is_fresh=step.is_fresh) >= 1:
                self._has_fit = True
            elif episode.num_turns:
                step = episode.on_context_limit()
            else:
                step = self._end_unfit(episode, len(step.tokens))
        if isinstance(step, Trajectory):
            if step.outcome.is_trained:
                self._refused.clear()
                self._faulty.clear()
            attempt = episode.attempt
            self._free_slot(slot)
            yield attempt, step
            return
        a = episode.attempt
        ids = (self._stream, a.group_id, a.member + RETRY_STRIDE * a.retry, episode.num_turns)
        if self._has_deadlines:
            self._asked[slot] = self._timer() - self._sampling
        self.engine.submit(slot, step.tokens, is_fresh=step.is_fresh, ids=ids, watch=self._make_watch())

    def _take(self, episode: Episode, reply: EnvReply) -> PromptDelta | Trajectory:
        if reply.failure is not None:
            return episode.on_failure(reply.failure.reason, reply.failure.detail)
        self._look_at(episode.attempt.group_id, reply.observation, reply.info)
        try:
            if reply.op == "reset":
                return episode.on_reset(reply.observation, reply.info)
            return episode.on_step(
                reply.observation, reply.reward, reply.terminated, reply.truncated, reply.info
            )
        except ChatTemplateError as error:
            return self._end_refused(episode, str(error))
        except PromptFault as fault:
            return self._end_unplayed(episode, fault.reason, self._tell_fault(episode, fault))

    def _end_unfit(self, episode: Episode, length: int) -> Trajectory:
        """Discard an attempt whose first prompt is too long."""
        split, limit = episode.attempt.split, self.engine.config.max_tokens
        self._unfit[episode.attempt.task] = length
        if not self._has_fit and self._are_all(len(self._unfit)):
            low, high = min(self._unfit.values()), max(self._unfit.values())
            raise PromptError(
                f"no first prompt leaves room for a response: those of {len(self._unfit)} tasks of "
                f"env.split={split} have {low} to {high} tokens, but rollout.max_tokens={limit}; it must be "
                f"larger than {high} by the tokens of a whole episode"
            )
        detail = f"the first prompt has {length} tokens, but rollout.max_tokens={limit}: no response fits"
        return self._end_unplayed(episode, "prompt_too_long", detail)

    def _end_refused(self, episode: Episode, detail: str) -> Trajectory:
        """Discard an attempt whose conversation the chat template refuses."""
        split = episode.attempt.split
        self._refused.add(episode.attempt.task)
        if self._are_all(len(self._refused)):
            raise PromptError(
                f"{detail}; so it was with {len(self._refused)} tasks of env.split={split}, and no episode "
                "has ended meanwhile: model.chat_template=FILE brings a template of your own"
            )
        return self._end_unplayed(episode, "prompt_refused", detail)

    def _tell_fault(self, episode: Episode, fault: CodeFault) -> str:
        """Tell of an attempt at which prompt builder or parser raised: the policy is not the cause."""
        split, task = episode.attempt.split, episode.attempt.task
        detail = f"{fault} (task {split}/{task})"
        self.pool.tell(fault.reason, detail=detail)
        self._faulty.add(task)
        if self._are_all(len(self._faulty)):
            raise type(fault)(
                f"{detail}; so it was with {len(self._faulty)} tasks of env.split={split}, and no episode "
                f"has ended meanwhile: {fault.duty}"
            )
        return detail

    def _are_all(self, num_tasks: int) -> bool:
        return self._num_tasks is not None and num_tasks >= min(self._num_tasks, MAX_UNFIT)

    def _end_unplayed(self, episode: Episode, reason: str, detail: str) -> Trajectory:
        """Discard an attempt; where its first prompt is the cause, so would be every one at its task."""
        if not episode.num_turns:
            self.pool.refuse(episode.attempt.split, episode.attempt.task, reason, detail)
        return episode.on_failure(reason, detail)

    def _on_response(self, response: Response) -> None:
        slot, episode = response.slot, self._episodes[response.slot]
        if slot in self._asked:
            self._started[slot] += self._timer() - self._sampling - self._asked.pop(slot)
        if response.failure is not None:
            self._lose(slot, episode.on_failure("sampler", response.failure))
            return
        if response.unfit is not None:
            self._lose(
                slot,
                episode.on_context_limit()
                if episode.num_turns
                else self._end_unplayed(episode, "prompt_too_long", response.unfit),
            )
            return
        text = self._decode(response.tokens.tolist()) if response.text is None else response.text
        try:
            action = episode.on_response(response, text)
        except ParserFault as fault:
            self._lose(slot, episode.on_failure(fault.reason, self._tell_fault(episode, fault)))
            return
        self.pool.step(self._first_handle + slot, action)
        self._waiting.add(slot)

    def _lose(self, slot: int, ended: Trajectory) -> None:
        """End the episode of a slot that gets no response."""
        self._lost.append((self._episodes[slot].attempt, ended))
        self._free_slot(slot)

    def _expire(self) -> Iterator[tuple[Attempt, Trajectory]]:
        limit = self._episode_timeout
        for slot in [slot for slot in self._started if slot not in self._asked and self._age(slot) > limit]:
            episode = self._episodes[slot]
            self._free_slot(slot)
            yield episode.attempt, episode.on_failure("timeout", f"longer than {limit:g} s")

    def _age(self, slot: int) -> float:
        asked = self._asked.get(slot)
        sampled = 0.0 if asked is None else self._timer() - self._sampling - asked
        return self.aged - self._started[slot] - sampled

    def _free_slot(self, slot: int) -> None:
        self.pool.release(self._first_handle + slot)
        self.engine.release(slot)
        self._ended[self._episodes.pop(slot).attempt] = self._started.pop(slot)
        self._asked.pop(slot, None)
        self._waiting.discard(slot)
        self._beside.discard(slot)
        self._early.pop(self._first_handle + slot, None)
        # The slot that was freed first is taken first: what it holds in the cache is the least likely to be
        # of use to others. Where all are free nothing is of use, and attempts meet the same slots in every
        # run, resumed or not.
        self._free.append(slot)
        if not self._episodes:
            self._free = collections.deque(sorted(self._free))
