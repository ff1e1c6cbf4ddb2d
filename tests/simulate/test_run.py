"""The simulated run against what can be computed by hand: times, idle shares, lags, and every group once."""

import dataclasses
import itertools
import math
import time

import pytest

from empg_jax.errors import ConfigError
from empg_jax.simulate.run import Simulation, simulate
from empg_jax.simulate.spread import KINDS, Spread
from empg_jax.simulate.world import World

# 8 x 4 episodes of 5 turns; each turn samples 10 tokens at 50 per second and waits 0.1 s, as does the reset.
WORLD = World(
    group_size=4,
    groups_per_update=8,
    slots=32,
    latency=Spread(0.1),
    turns=Spread(5),
    tokens=Spread(10),
    decode_rate=32 * 50,
    update_seconds=1.6,
    updates=60,
)
ROLLOUT = 6 * 0.1 + 5 * 10 / 50


def world(**changes):
    return dataclasses.replace(WORLD, **changes)


def seconds(**changes):
    return simulate(world(**changes)).seconds_per_update


# ------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("pause", [0.0, 0.3])
@pytest.mark.parametrize("update", [0.2, 1.6, 5.0])
def test_without_lag_an_update_takes_rollout_and_update(update, pause, is_shared):
    result = simulate(world(update_seconds=update, publish_pause=pause, is_shared=is_shared))
    whole = ROLLOUT + update + pause
    assert result.seconds_per_update == pytest.approx(whole)
    assert result.learner_idle == pytest.approx((ROLLOUT + pause) / whole)
    assert result.rollout_idle == pytest.approx(update / whole)
    assert result.publish_pause == pytest.approx(pause)
    assert result.lag_shares == {0: 1.0} and result.slot_occupancy == pytest.approx(1)
    assert result.tokens_per_second == pytest.approx(32 * 5 * 10 / whole)
    assert result.episodes_per_hour == pytest.approx(3600 * 32 / whole)


@pytest.mark.parametrize("lag", [1, 2, 4])
@pytest.mark.parametrize("update", [0.2, 0.8, 1.6, 3.0])
def test_with_lag_the_slower_of_the_two_sets_the_pace(lag, update):
    result = simulate(world(max_lag=lag, update_seconds=update))
    assert result.seconds_per_update == pytest.approx(max(ROLLOUT, update), rel=0.04)
    assert 1 <= result.lag_max <= lag


@pytest.mark.parametrize("update", [0.8, 1.6])
def test_on_a_shared_device_work_adds_up_but_waiting_overlaps(update):
    computing = 5 * 10 / 50
    # Without waiting, nothing is won by the overlap.
    still = {"latency": Spread(0.0), "update_seconds": update, "is_shared": True}
    assert seconds(max_lag=2, **still) == pytest.approx(computing + update, rel=0.03)
    assert seconds(max_lag=0, **still) == pytest.approx(computing + update)
    # With it, the update fills the time in which the sampler waits: less than one after the other.
    waiting = seconds(max_lag=2, update_seconds=update, is_shared=True)
    assert computing + update <= waiting * 1.02 and waiting < 0.95 * (ROLLOUT + update)


def test_a_learner_with_lag_2_hardly_waits_for_environments_of_100_ms():
    for kind in ("constant", "exponential"):
        result = simulate(world(max_lag=2, updates=100, latency=Spread(0.1, kind)))
        assert result.learner_idle < 0.10
    assert simulate(WORLD).learner_idle == pytest.approx(0.5)


def test_slots_limit_what_is_played_at_once():
    assert seconds(slots=16, decode_rate=16 * 50, update_seconds=0.0) == pytest.approx(2 * ROLLOUT)


def test_environments_that_answer_one_after_the_other():
    # 32 resets and 160 steps, one at a time, are more than the sampler needs; both overlap but for the ends.
    answers = 192 * 0.1
    taken = seconds(at_once=1, update_seconds=0.0)
    assert answers <= taken <= answers + ROLLOUT
    assert seconds(at_once=32) == seconds()


def test_a_reset_may_take_another_time_than_a_step():
    assert seconds(reset_latency=3.0, update_seconds=0.0) == pytest.approx(ROLLOUT + 2.9)
    assert seconds(reset_latency=0.0, update_seconds=0.0) == pytest.approx(ROLLOUT - 0.1)


def test_a_slots_rate_and_the_rate_of_all_slots_limit_each_other():
    still = {"latency": Spread(0.0), "update_seconds": 0.0}
    assert seconds(decode_rate=1e9, slot_rate=25.0, **still) == pytest.approx(50 / 25)
    assert seconds(decode_rate=800.0, slot_rate=1e9, **still) == pytest.approx(32 * 50 / 800)


def test_prompts_are_prefilled_first_and_again_for_new_weights():
    still = {"latency": Spread(0.0), "update_seconds": 0.0, "observation": 20.0, "prefill_rate": 1000.0}
    assert seconds(**still) == pytest.approx(1.0 + 32 * 5 * 20 / 1000)
    # With lag the weights change inside episodes, and their conversations are prefilled again.
    kept = world(max_lag=1, turns=Spread(5, "uniform"), prefill_rate=1000.0, observation=20.0, is_burst=True)
    assert simulate(kept).seconds < simulate(dataclasses.replace(kept, is_burst=False)).seconds


def test_new_weights_wait_for_the_responses_in_progress_unless_they_go_live_inside():
    slow = {"max_lag": 1, "tokens": Spread(10, "exponential"), "update_seconds": 0.5}
    waited, burst = simulate(world(**slow)), simulate(world(is_burst=True, **slow))
    assert waited.publish_pause > 0.05 and burst.publish_pause == 0
    assert burst.seconds < waited.seconds and burst.lag_max == 1


# -------------------------------------------------------------------------------- groups and long tasks


ROUGH = {"latency": Spread(0.1, "lognormal"), "turns": Spread(5, "uniform"), "tokens": Spread(10, "heavy")}


@pytest.mark.parametrize("lag", [0, 1, 2, 4])
@pytest.mark.parametrize("faults", [{}, {"failures": 0.05, "deaths": 0.02, "workers": 4}])
def test_every_group_is_consumed_once_and_in_time(lag, faults):
    simulation = Simulation(world(max_lag=lag, **ROUGH, **faults))
    result = simulation.run()
    consumed = list(itertools.chain.from_iterable(simulation.tally.consumed))
    assert len(consumed) == len(set(consumed)) == 60 * 8
    replaced = sum(result.groups_replaced.values())
    assert len(simulation.tally.begun) == 60 * 8 + replaced  # none is left over at the end, none is lost
    assert set(consumed) <= simulation.tally.begun.keys() and result.lag_max <= lag
    assert sum(result.lag_shares.values()) == pytest.approx(1)
    assert (result.waste > 0) == bool(faults) and bool(result.episodes_discarded) == bool(faults)


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_long_tasks_are_trained_on_as_often_as_they_are_begun(lag):
    result = simulate(world(max_lag=lag, long_share=0.25, long_stretch=8.0, **ROUGH))
    sigma = math.sqrt(0.25 * 0.75 / (60 * 8))
    assert abs(result.long_begun - 0.25) < 3 * sigma
    assert abs(result.long_trained - result.long_begun) < 3 * sigma
    assert not result.groups_replaced


def test_lag_hides_the_tail_of_long_tasks():
    tail = {"long_share": 0.25, "long_stretch": 8.0}
    assert seconds(max_lag=4, **tail) < 0.6 * seconds(max_lag=0, **tail)


def test_failures_and_deaths_are_counted_by_reason():
    result = simulate(world(failures=0.1, deaths=0.05, workers=4, updates=40))
    attempts = 40 * 32 + sum(result.episodes_discarded.values())
    assert result.episodes_discarded["env_error"] / attempts == pytest.approx(0.1, abs=0.03)
    assert result.episodes_discarded["worker_died"] / attempts == pytest.approx(0.05, abs=0.02)
    # A worker that is replaced holds up its other episodes.
    assert seconds(deaths=0.05, worker_start=20.0) > seconds(deaths=0.05, worker_start=0.0)


def test_episodes_over_their_time_are_discarded_and_their_groups_replaced():
    slow = {"long_share": 0.1, "long_stretch": 8.0, "episode_timeout": 4.0, "updates": 20}
    result = simulate(world(**slow))
    assert result.groups_replaced["failed"] > 0 and result.episodes_discarded["timeout"] > 0
    assert result.long_trained == 0  # what a run would tell, too: no long task ends in time
    # A group that may be closed with three members is not replaced when one of them is slow.
    closed = simulate(world(min_group_size=1, episode_timeout=1.0, updates=20, **ROUGH))
    assert closed.episodes_discarded["group_closed"] > 0


def test_groups_of_equal_returns_are_replaced_by_dynamic_sampling():
    result = simulate(world(mixed=0.5, max_refills=10, updates=20))
    assert result.groups_replaced == {"uniform": 20 * 8}
    assert result.waste == pytest.approx(0.5)


def test_a_world_in_which_nothing_ends_well_is_refused():
    with pytest.raises(ConfigError, match=r"update 1 never gets its episodes: .* by timeout"):
        simulate(world(episode_timeout=0.5))


# ------------------------------------------------------------------------------------ the simulation


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_repeats_exactly_and_another_one_differs(kind):
    rough = world(max_lag=2, latency=Spread(0.1, kind), turns=Spread(5, "uniform"), failures=0.02)
    assert simulate(rough) == simulate(rough)
    assert simulate(rough) != simulate(dataclasses.replace(rough, seed=1))


def test_200_updates_are_simulated_within_two_seconds():
    began = time.process_time()  # of this process: other work on the machine does not count
    simulate(world(updates=200, max_lag=2, **ROUGH))
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"decode_rate": 0.0}, "--decode-rate 0: expected above 0"),
        ({"update_seconds": -1.0}, "--update-seconds -1: expected 0 or more"),
        ({"latency": Spread(math.nan)}, "--latency nan: expected 0 or more"),
        ({"latency": Spread(0.1, "odd")}, "--latency-kind odd: choose constant, uniform, "),
        ({"turns": Spread(0.5)}, "--turns 0.5: expected at least 1"),
        ({"tokens": Spread(0.0)}, "--tokens 0: expected at least 1"),
        ({"long_share": 1.5}, "--long-share 1.5: expected between 0 and 1"),
        ({"long_stretch": 0.5}, "--long-stretch 0.5: expected at least 1"),
        ({"updates": 0}, "--updates 0: expected at least 1"),
        ({"at_once": 0}, "--at-once 0: expected at least 1"),
        ({"failures": 0.6, "deaths": 0.4}, "no attempt would end well"),
        ({"min_group_size": 5}, "min_group_size=5 is above group_size=4"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change, says):
    with pytest.raises(ConfigError) as refused:
        world(**change)
    assert says in str(refused.value)
