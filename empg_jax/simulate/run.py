"""The simulated run: the rules of the rollout thread and of the training loop, with events in place of work.

Between two events nothing changes but the work that sampler and learner have left. `Simulation` repeats: go
to the next event, let it happen, then do what `RolloutThread` does in a round (offer, admit, start).
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
from typing import Any

from empg_jax.errors import ConfigError
from empg_jax.rollout.episode import Attempt
from empg_jax.rollout.ledger import Ledger, Reserved
from empg_jax.rollout.order import TaskOrder
from empg_jax.simulate.episode import WON, SimulatedEpisode
from empg_jax.simulate.sampler import Sampler
from empg_jax.simulate.spread import Spread
from empg_jax.simulate.tally import Result, Tally
from empg_jax.simulate.world import World
from empg_jax.types import Outcome, Status

LOOK_SECONDS = (
    1.0  # between two looks at the groups' deadlines, as of a rollout thread that waits for answers
)
GIVE_UP = 20  # attempts discarded before an update, in batches, after which the simulation ends


class StandstillError(ConfigError):
    """An update of the simulated run never gets its episodes."""


def simulate(world: World) -> Result:
    """Simulate a run and return its numbers."""
    return Simulation(world).run()


class Simulation:
    """One run of a simulated world.

    Attributes:
      now: the simulated time.
      ledger: the real one.
      tally: what has been measured so far.
    """

    def __init__(self, world: World) -> None:
        self.world, self.tally = world, Tally()
        slot_rate = world.slot_rate or world.decode_rate / world.slots
        self.sampler = Sampler(world.decode_rate, slot_rate, world.prefill_rate or math.inf)
        self.ledger = Ledger(
            TaskOrder("train", world.tasks, world.seed),
            group_size=world.group_size,
            groups_per_update=world.groups_per_update,
            max_lag=world.max_lag,
            updates=world.updates,
            min_group_size=world.min_group_size,
            group_timeout=world.episode_timeout,
            max_refills=world.max_refills,
            tell=self.tally.tell,
        )
        reset_latency = world.latency.mean if world.reset_latency is None else world.reset_latency
        self._resets = Spread(reset_latency, world.latency.kind)
        self.now = self.served = 0.0
        self._events: list[tuple[float, int, Any, Any]] = []  # (time, number, function, argument)
        self._numbers = itertools.count()
        self._queue: collections.deque[Attempt] = collections.deque()
        self._episodes: dict[int, SimulatedEpisode] = {}
        self._free = list(range(world.slots))
        self._lanes: float = math.inf if world.at_once is None else world.at_once
        self._asked: collections.deque[tuple[float, SimulatedEpisode, int]] = collections.deque()
        self._up_at = [0.0] * world.workers
        self._held: list[tuple[int, SimulatedEpisode]] = []  # answers that wait for the new weights
        self._version = -1
        self._mail: int | None = None  # version of the weights that the sampler has still to take
        self._is_swapping = False
        self._outbox: Reserved | None = None
        self._trained = 0  # updates
        self._discarded = 0  # attempts since the last update
        self._work_left: float | None = None  # device seconds of the update in progress

    def run(self) -> Result:
        """Run all updates and return their numbers."""
        self._publish(0)
        while self._trained < self.world.updates:
            self._go_on()
        return self._result()

    # -------------------------------------------------------------------------------------- time

    def _go_on(self) -> None:
        """Go to the next event, and let it happen."""
        sampler, left = self.sampler, self._work_left
        is_sampling = sampler.is_busy and not self._is_swapping
        # On shared devices both get equal slices of time while both have work.
        speed = 0.5 if self.world.is_shared and is_sampling and left is not None else 1.0
        decoded = self.now + sampler.work_left() / speed if is_sampling else math.inf
        updated = math.inf if left is None else self.now + left / speed
        timed = self._events[0][0] if self._events else math.inf
        then = min(decoded, updated, timed)
        if self.world.min_group_size is not None:
            then = min(then, self.now + LOOK_SECONDS)
        if then == math.inf:
            raise RuntimeError(f"the simulated run stands still after {self._trained} updates")
        seconds = then - self.now
        if is_sampling:
            sampler.work(seconds * speed)
        if left is not None:
            self._work_left = left - seconds * speed
        self._account(seconds)
        self.now = then
        if then == decoded:
            self._on_response(sampler.take_ended())
        elif then == timed:
            _, _, happen, argument = heapq.heappop(self._events)
            happen(argument)
        elif then == updated:
            self._on_update()
        elif self._mail is None:
            self.ledger.close_late({e.attempt: e.age(self.served) for e in self._episodes.values()})
            self._turn_over()

    def _account(self, seconds: float) -> None:
        """Note what the time passed with."""
        if self._work_left is None:
            self.tally.waited += seconds
        if self._mail is not None:
            self.tally.paused += seconds
        elif self._episodes or self._queue:
            self.served += seconds
        else:
            self.tally.idle += seconds

    def _at(self, time: float, happen: Any, argument: Any) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), happen, argument))

    # ------------------------------------------------------------------------------------ weights

    def _publish(self, version: int) -> None:
        """Hand over weights. From now on no response starts before they are live."""
        self._mail = version
        self._settle()

    def _settle(self) -> None:
        """Begin to swap weights, if there are new ones and no response in progress is in the way."""
        is_free = self.world.is_burst or not self.sampler.is_busy
        if self._mail is not None and not self._is_swapping and is_free:
            self._is_swapping = True
            self._at(self.now + self.world.publish_pause, self._on_swap, self._mail)

    def _on_swap(self, version: int) -> None:
        self._is_swapping = False
        self._version = version
        self.ledger.commit(version)
        if self._mail != version:  # the learner was quicker than the swap
            self._settle()
            return
        self._mail = None
        held, self._held = self._held, []
        for slot, episode in held:
            self._take_answer(slot, episode)
        self._turn_over()

    # ------------------------------------------------------------------------------------ learner

    def _on_update(self) -> None:
        self._work_left = None
        self._trained += 1
        self._discarded = 0
        self._publish(self._trained)
        self._learn()

    def _learn(self) -> None:
        """Begin the next update, if its groups are offered and the learner waits."""
        if self._outbox is None or self._work_left is not None:
            return
        reserved, self._outbox = self._outbox, None
        tally = self.tally
        tally.consumed.append(list(dict.fromkeys(t.group_id for t in reserved.trajectories)))
        tally.episodes += len(reserved.trajectories)
        for trajectory in reserved.trajectories:
            for version, turns in trajectory.versions.items():  # type: ignore[attr-defined]  # they are Played
                tally.ages[reserved.update - version] += turns
        self._work_left = self.world.update_seconds
        if self._mail is None:
            self._turn_over()

    # ------------------------------------------------------------------------------------ rollout

    def _turn_over(self) -> None:
        """Offer the next update's groups, admit new ones, and start attempts where slots are free."""
        ledger, world = self.ledger, self.world
        if self._outbox is None:
            self._outbox = ledger.reserve()
        ledger.admit(self._version)
        for group_id in ledger.cancels:
            ledger.waste(self._cancel(group_id))
        for attempt in ledger.starts:
            self.tally.begun.setdefault(attempt.group_id, world.is_long(attempt.task))
        self._queue.extend(ledger.starts)
        ledger.cancels, ledger.starts = [], []
        while self._queue and self._free:
            slot, attempt = heapq.heappop(self._free), self._queue.popleft()
            episode = SimulatedEpisode(world, attempt)
            self._episodes[slot] = episode
            self._ask(slot, episode)
        self._learn()

    def _cancel(self, group_id: int) -> int:
        """Give up the unfinished attempts of a group; return the number of their sampled tokens."""
        self._queue = collections.deque(a for a in self._queue if a.group_id != group_id)
        wasted = 0
        for slot, episode in list(self._episodes.items()):
            if episode.attempt.group_id == group_id:
                wasted += episode.tokens
                self._free_slot(slot)
        return wasted

    def _free_slot(self, slot: int) -> None:
        if self._episodes.pop(slot).pending:
            self.sampler.cancel(slot)
        heapq.heappush(self._free, slot)

    def _ask(self, slot: int, episode: SimulatedEpisode) -> None:
        """Ask the environment; it answers after its latency, once it has its turn."""
        episode.asked = self.served
        latency = (self._resets if episode.turns_done == 0 else self.world.latency).draw(episode.chance)
        if self._lanes > 0:
            self._lanes -= 1
            self._at(self.now + latency, self._on_answer, (slot, episode))
        else:
            self._asked.append((latency, episode, slot))

    def _on_answer(self, asked: tuple[int, SimulatedEpisode]) -> None:
        up_at = self._up_at[asked[0] % self.world.workers]
        if self.now < up_at:  # its worker is being replaced
            self._at(up_at, self._on_answer, asked)
            return
        self._lanes += 1
        if self._asked:
            latency, next_episode, next_slot = self._asked.popleft()
            self._lanes -= 1
            self._at(self.now + latency, self._on_answer, (next_slot, next_episode))
        if self._mail is not None:
            self._held.append(asked)
        elif self._take_answer(*asked):
            self._turn_over()

    def _take_answer(self, slot: int, episode: SimulatedEpisode) -> bool:
        """Go on with an episode; return whether it ended."""
        if self._episodes.get(slot) is not episode:  # given up in the meantime
            return False
        world, outcome = self.world, None
        episode.answered(self.served)
        if episode.waited > world.episode_timeout:
            outcome = Outcome(Status.DISCARDED, "timeout")
        elif episode.fault == episode.turns_done:
            outcome = Outcome(Status.DISCARDED, episode.reason)
            if episode.reason == "worker_died":
                self._up_at[slot % world.workers] = self.now + world.worker_start
        elif episode.turns_done == episode.turns:
            outcome = WON
        if outcome is None:
            prompt = episode.begin_response(world, self._version)
            self.sampler.submit(slot, prompt, episode.pending)
            return False
        if not outcome.is_trained:
            self._count_discarded(outcome.reason)
        self._free_slot(slot)
        trajectory = episode.finish(outcome, self._return_of(episode.attempt))
        self.ledger.finish(episode.attempt, trajectory, episode.waited)
        return True

    def _count_discarded(self, reason: str) -> None:
        """Count a discarded attempt; a world in which hardly any attempt ends well is refused."""
        world = self.world
        self._discarded += 1
        if self._discarded > GIVE_UP * world.group_size * world.groups_per_update:
            raise StandstillError(
                f"update {self._trained + 1} never gets its episodes: {self._discarded} attempts were "
                f"discarded, the last one by {reason}; lower --failures and --deaths, or raise "
                f"rollout.episode_timeout={world.episode_timeout:g}"
            )

    def _return_of(self, attempt: Attempt) -> float:
        """Return 0 or 1 by member in a group that teaches something, and 0 in the others."""
        world, group = self.world, attempt.group_id
        is_mixed = math.floor((group + 1) * world.mixed) > math.floor(group * world.mixed)
        return float(is_mixed and attempt.member % 2)

    def _on_response(self, slot: int) -> None:
        episode = self._episodes[slot]
        episode.end_response()
        self._ask(slot, episode)
        self._settle()

    # ------------------------------------------------------------------------------------- result

    def _result(self) -> Result:
        tally, ledger, seconds = self.tally, self.ledger, max(self.now, 1e-12)
        turns = max(tally.ages.total(), 1)
        steps = self.sampler.steps * self.world.slots
        outcomes = (key.partition(":") for key in ledger.outcomes)
        return Result(
            updates=self._trained,
            seconds=self.now,
            seconds_per_update=seconds / self._trained,
            updates_per_hour=3600 * self._trained / seconds,
            episodes_per_hour=3600 * tally.episodes / seconds,
            tokens_per_second=self.sampler.sampled / seconds,
            learner_idle=tally.waited / seconds,
            rollout_idle=tally.idle / seconds,
            publish_pause=tally.paused / self._trained,
            lag_mean=sum(age * count for age, count in tally.ages.items()) / turns,
            lag_max=max(tally.ages, default=0),
            lag_shares={age: tally.ages[age] / turns for age in sorted(tally.ages)},
            waste=ledger.counts["tokens_wasted"] / max(self.sampler.sampled, 1),
            slot_occupancy=self.sampler.sampled / steps if steps else 0.0,
            long_begun=tally.long_share(list(tally.begun)),
            long_trained=tally.long_share(list(itertools.chain.from_iterable(tally.consumed))),
            groups_replaced=dict(tally.replaced),
            episodes_discarded={
                reason: ledger.outcomes[f"{status}:{reason}"]
                for status, _, reason in outcomes
                if status == "discarded"
            },
        )
