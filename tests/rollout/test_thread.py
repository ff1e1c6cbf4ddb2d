"""The rollout thread: what it hands over and when, and how errors and requests cross between the threads."""

import threading
import time
import types
from pathlib import Path

import pytest

from empg_jax.engine.engine import EngineStats
from empg_jax.errors import Interrupted, RunError
from empg_jax.rollout.ledger import Ledger
from empg_jax.rollout.order import TaskOrder
from empg_jax.rollout.schedule import Recorder, Round, ScheduleError
from empg_jax.rollout.thread import RolloutThread
from empg_jax.workers.pool import PoolStats
from tests.rollout.scripted import ScriptedEngine, make_collector
from tests.rollout.test_collector import TimedEngine, open_pool
from tests.rollout.test_ledger import groups_of, play

SOON = 20.0  # seconds; only a failure waits so long


class FakeEngine:
    """Weights are names; remembers which were swapped in."""

    def __init__(self):
        self.version, self.swapped = -1, []

    def place(self, params):
        return params

    def swap(self, placed, version):
        self.version = version
        self.swapped.append((placed, version))

    def take_stats(self):
        return EngineStats(sampled_tokens=7)


class FakePool:
    """A pool in which nothing happens; remembers the faults that it was given."""

    def __init__(self):
        self.stats, self.quarantined = PoolStats(), list
        self.breaker = types.SimpleNamespace(openings=0, seconds=0.0)
        self.faults = {"quarantine": []}

    def fault_snapshot(self):
        return self.faults

    def restore_faults(self, snapshot):
        self.faults = snapshot


class FakeCollector:
    """Ends every attempt in the round after its start, once ``gate`` is open."""

    def __init__(self):
        self.engine, self.pool = FakeEngine(), FakePool()
        self.queue, self.served, self.aged, self.settled = [], 0.0, 0.0, 0
        self.gate, self.threads = threading.Event(), set()
        self.error, self.answered = None, []
        self.gate.set()

    @property
    def in_flight(self):
        return len(self.queue)

    def admit(self, attempts):
        self.queue.extend(attempts)

    def cancel(self, group_id):
        self.queue = [attempt for attempt in self.queue if attempt.group_id != group_id]
        return 0

    def cancel_all(self):
        self.queue.clear()

    def ages(self):
        return {}

    def settle(self):
        self.settled += 1

    def advance(self, wanted=None):
        self.threads.add(threading.current_thread().name)
        if self.error is not None:
            raise self.error
        if not self.gate.wait(0.01):
            return []
        queue, self.queue = self.queue, []
        return [(attempt, play(attempt, version=self.engine.version)) for attempt in queue]


def make_rollout(*, max_lag=0, is_repeatable=False, **options):
    order = TaskOrder("train", 50, seed=0)
    ledger = Ledger(order, group_size=2, groups_per_update=2, max_lag=max_lag, **options)
    return RolloutThread(FakeCollector(), ledger, is_repeatable=is_repeatable)


def wait_for(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def test_synchronous_updates_take_turns():
    rollout = make_rollout()
    with rollout:
        for update in range(3):
            rollout.publish(f"weights {update}", update)
            delivery = rollout.next_batch()
            assert delivery.update == update and groups_of(delivery) == [2 * update, 2 * update + 1]
            assert {t.oldest_version for t in delivery.trajectories} == {update}
            assert delivery.engine.sampled_tokens == 7 and delivery.outcomes == {
                "trained:won": 4 * (update + 1)
            }
            time.sleep(0.05)
            assert rollout.collector.in_flight == 0  # nothing is played before the next weights
    assert rollout.engine.swapped == [(f"weights {update}", update) for update in range(3)]
    assert rollout.collector.threads == {"rollout"}


def test_with_a_lag_the_next_groups_are_played_while_the_learner_works():
    rollout = make_rollout(max_lag=1)
    with rollout:
        rollout.publish("first", 0)
        assert rollout.next_batch().update == 0
        wait_for(lambda: rollout._outbox is not None)  # without new weights
        # New weights consume what is behind them, and only then is there room for more.
        rollout.publish("second", 1)
        second = rollout.next_batch()
        assert second.update == 1 and {t.oldest_version for t in second.trajectories} == {0}
        wait_for(lambda: rollout._outbox is not None)
        assert {t.oldest_version for t in rollout._outbox.trajectories} == {1}
        assert second.metrics["rollout_idle"] >= 0.0


def test_weights_that_nobody_took_are_replaced_by_newer_ones():
    rollout = make_rollout(max_lag=2)
    rollout.collector.gate.clear()
    with rollout:
        rollout.publish("a", 0)
        wait_for(lambda: rollout.engine.version == 0)
        hold, held = threading.Event(), threading.Event()

        def block():
            held.set()
            hold.wait(SOON)

        waiting = threading.Thread(target=rollout.call, args=(block,))
        waiting.start()
        held.wait(SOON)
        rollout.publish("b", 1)
        rollout.publish("c", 2)
        hold.set()
        waiting.join()
        wait_for(lambda: rollout.engine.version == 2)
    assert rollout.engine.swapped == [("a", 0), ("c", 2)]


def test_an_error_in_the_thread_reaches_the_learner_with_its_traceback():
    rollout = make_rollout()
    rollout.collector.error = OSError("the machine room is on fire")
    with pytest.raises(OSError, match="on fire") as caught, rollout:
        rollout.publish("weights", 0)
        rollout.next_batch()
    assert "advance" in [entry.name for entry in caught.traceback]
    # The thread has ended, so its ledger can be read.
    values, held = rollout.cut(0)
    assert [entry["id"] for entry in values["groups"]] == [0, 1] and held == []


def test_an_error_of_the_learner_ends_the_thread():
    rollout = make_rollout(max_lag=1)
    with pytest.raises(ZeroDivisionError), rollout:
        rollout.publish("weights", 0)
        rollout.next_batch()
        raise ZeroDivisionError
    assert "rollout" not in {thread.name for thread in threading.enumerate()}
    assert rollout.collector.in_flight == 0


def test_a_waiting_learner_sees_a_request_to_stop():
    rollout = make_rollout()
    rollout.collector.gate.clear()
    looks = iter(range(100))

    def check():
        if next(looks) == 2:
            raise Interrupted

    with pytest.raises(Interrupted), rollout:
        rollout.publish("weights", 0)
        rollout.next_batch(check)


class SilentPool(FakePool):
    """Environments that never answer, as in an outage."""

    def __init__(self):
        super().__init__()
        self.breaker.check = lambda: None
        self.is_asked = threading.Event()

    def reset(self, handle, **task):
        pass

    def release(self, handle):
        pass

    def poll(self, timeout, *, within):
        self.is_asked.set()
        time.sleep(0.01)
        return []


@pytest.mark.parametrize("rounds", [None, [Round(weights=0), Round(answers=[0])]])
def test_a_barrier_that_waits_for_environments_ends_with_the_block(rounds):
    rollout, pool = make_rollout(is_repeatable=True), SilentPool()
    engine = ScriptedEngine(slots=2)
    engine.place, engine.swap = lambda params: params, lambda placed, version: None
    engine.take_stats = EngineStats
    rollout.collector = make_collector(engine, pool, is_deterministic=rounds is None)
    rollout.schedule = None if rounds is None else iter(rounds)
    with rollout:
        rollout.publish("weights", 0)
        assert pool.is_asked.wait(SOON)
    assert "rollout" not in {thread.name for thread in threading.enumerate()}
    values, held = rollout.cut(0)
    assert values["updates"] == 0 and held == []


def test_a_schedule_that_cannot_be_written_is_one_line_and_hides_no_other_error():
    full = Path("/dev/full")
    for error in (None, ValueError("the first error")):
        rollout = make_rollout(max_lag=1)
        rollout.recorder = Recorder(full, 0)
        says = "/dev/full cannot be written: No space left" if error is None else "the first error"
        with pytest.raises(RunError if error is None else ValueError, match=says), rollout:
            if error is not None:
                raise error


def test_after_the_last_round_of_a_schedule_a_further_batch_is_refused():
    rounds = []
    first = make_rollout(max_lag=1)
    first.recorder = types.SimpleNamespace(add=rounds.append, flush=lambda: None)
    with first:
        first.publish("weights", 0)
        first.next_batch()
        first.publish("weights", 1)
        first.next_batch()
    last = max(number for number, each in enumerate(rounds) if each.batch == 1)
    again = make_rollout(max_lag=1)
    again.schedule = iter(rounds[: last + 1])  # as a killed run leaves it
    with again:
        for version in (0, 1):
            again.publish("weights", version)
            assert again.next_batch().update == version
        again.publish("weights", 2)
        end = time.monotonic() + SOON

        def give_up():
            assert time.monotonic() < end, "waits for ever"

        with pytest.raises(ScheduleError, match="ends before this update"):
            again.next_batch(give_up)
        began, burned = time.monotonic(), time.process_time()
        time.sleep(0.5)
        # The thread rests, though there are weights which nobody takes.
        assert time.process_time() - burned < 0.5 * (time.monotonic() - began)


def test_calls_run_between_rounds_and_return_results_and_errors():
    rollout = make_rollout(max_lag=1)
    assert rollout.call(lambda: threading.current_thread().name) == "MainThread"  # before it starts
    with rollout:
        rollout.publish("weights", 0)
        assert rollout.call(lambda: threading.current_thread().name) == "rollout"

        def fail():
            raise Interrupted

        with pytest.raises(Interrupted):
            rollout.call(fail)
        assert rollout.next_batch().update == 0  # the thread goes on


def test_a_cut_in_the_middle_keeps_what_has_ended():
    rollout = make_rollout(max_lag=1)
    with rollout:
        rollout.publish("weights", 0)
        rollout.next_batch()
        values, held = rollout.cut(0)
        assert len(held) == 8 and len(values["groups"]) == 4
        values, held = rollout.cut(1)
        assert sorted({t.group_id for t in held}) == [2, 3]


def test_a_repeatable_cut_is_that_of_the_last_weights():
    rollout = make_rollout(is_repeatable=True)
    with rollout:
        rollout.publish("weights", 0)
        rollout.next_batch()
        values, held = rollout.cut(0)
        assert values["groups"] == [] and values["next_group"] == 0 and held == []
    again = make_rollout()
    again.restore(*rollout.cut(0))
    with again:
        again.publish("weights", 0)
        assert groups_of(again.next_batch()) == [0, 1]


def test_failures_before_an_outage_was_known_cost_no_task_its_retries():
    rollout, told = make_rollout(), []
    rollout.ledger.forgive = lambda: told.append(rollout.collector.pool.breaker.openings)
    with rollout:
        rollout.publish("weights", 0)
        rollout.next_batch()
        rollout.collector.pool.breaker.openings = 1
        rollout.publish("weights", 1)
        rollout.next_batch()
    assert told == [1]


def test_the_pools_record_of_faults_is_part_of_a_cut():
    rollout = make_rollout()
    rollout.collector.pool.faults = {"quarantine": ["a task"]}
    values, held = rollout.cut(0)
    again = make_rollout()
    again.restore(values, held)
    assert again.collector.pool.faults == {"quarantine": ["a task"]}


class MemberEngine(TimedEngine):
    """Says ``[member, turn]``, with weights that are names."""

    place, swap, take_stats = FakeEngine.place, FakeEngine.swap, FakeEngine.take_stats

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.swapped = []

    def submit(self, slot, tokens, *, ids, **options):
        super().submit(slot, tokens, ids=(ids[0], ids[2], ids[2], ids[3]), **options)


def play_group(engine, pool, script=None, **options):
    """The delivery of one group of four attempts, of which two suffice; ``options`` are the collector's."""
    collector = make_collector(engine, pool, script, **options)
    sizes = {"group_size": 4, "groups_per_update": 1, "min_group_size": 2, "updates": 1}
    ledger = Ledger(TaskOrder("train", 5, seed=0), group_timeout=options["episode_timeout"], **sizes)
    rollout = RolloutThread(collector, ledger, is_repeatable=False)
    with rollout:
        rollout.publish("weights", 0)
        return rollout.next_batch()


@pytest.mark.parametrize("slots", [1, 2, 4])
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_slow_sampling_closes_no_group(is_deterministic, slots):
    now = [0.0]
    with open_pool(length=3) as pool:
        engine = MemberEngine(now, 1000.0, slots=slots)
        options = {"is_deterministic": is_deterministic, "timer": lambda: now[0]}
        delivery = play_group(engine, pool, episode_timeout=60.0, **options)
    assert now[0] >= 3000.0 and delivery.outcomes == {"trained:won": 4}


def test_an_environment_that_hangs_closes_its_group():
    with open_pool(length=3) as pool:
        engine = MemberEngine([0.0], 0.0, slots=4)
        delivery = play_group(engine, pool, {(2, 1): "sleep 15"}, episode_timeout=3.0)
    assert [t.member for t in delivery.trajectories] == [0, 1, 3]
    assert delivery.outcomes == {"trained:won": 3, "discarded:timeout": 1, "discarded:group_closed": 1}
