"""The collector: slots are refilled at once, faults cost their episode, a barrier makes runs repeatable."""

import functools
import itertools
import os
import signal

import jax
import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.learner.batching import merge_turns
from empg_jax.models.decoder import init_params
from empg_jax.rollout.collector import RETRY_STRIDE, PromptError
from empg_jax.rollout.episode import Attempt
from empg_jax.run import assembly, sampling
from empg_jax.text import ChatTemplateError
from empg_jax.types import Status
from empg_jax.workers.pool import EnvPool, PoolTimeouts
from tests.rollout.scripted import ScriptedEngine, TokenContext, attempts, make_collector, run

NUM_TASKS = 64  # at most so many are tried


def open_pool(env="FaultyEnv", *, num_workers=2, step=20.0, **options):
    timeouts = PoolTimeouts(start=60, reset=60, step=step)
    return EnvPool(f"tests.fakes:{env}", options, num_workers=num_workers, timeouts=timeouts)


def outcome(trajectory):
    return trajectory.outcome.status, trajectory.outcome.reason


# -------------------------------------------------------------------------------------------- slots


def test_every_attempt_ends_once_and_slots_are_refilled():
    with open_pool(length=3) as pool:
        engine = ScriptedEngine(slots=3)
        found = run(make_collector(engine, pool), attempts(20))
    assert sorted(found) == list(range(20))
    for group, trajectory in found.items():
        assert (trajectory.task, trajectory.group_id) == (group, group)
        assert outcome(trajectory) == (Status.TRAINED, "won")
        assert [t.observation.split(" after")[0] for t in trajectory.turns] == [
            f"train/{group}/5 step {n}" for n in range(3)
        ]
        assert [t.response_tokens.tolist() for t in trajectory.turns] == [[group, n] for n in range(3)]
    assert pool.stats.commands == 20 * 4


def test_nobody_waits_for_the_slowest():
    """One environment takes far longer than all the others together."""
    script = {(0, 0): "sleep 3"}
    with open_pool(length=2) as pool:
        # Two workers, and slots go to workers in turn: the slow episode blocks one of the two.
        found = run(make_collector(ScriptedEngine(slots=4), pool, script), attempts(40))
    order = list(found)
    assert order.index(0) >= 20
    assert all(outcome(t) == (Status.TRAINED, "won") for t in found.values())


def test_sampling_ids_name_the_attempt_and_retries_get_others():
    with open_pool(length=2) as pool:
        engine = ScriptedEngine()
        collector = make_collector(engine, pool, stream=1)
        run(collector, [Attempt("train", 9, group_id=4, member=3, retry=2)])
    assert engine.submitted == [(1, 4, 3 + 2 * RETRY_STRIDE, turn) for turn in (0, 1)]


def test_collectors_share_a_pool_by_handles():
    with open_pool(length=2) as pool:
        first = make_collector(ScriptedEngine(slots=2), pool)
        second = make_collector(ScriptedEngine(slots=2), pool, first_handle=2)
        assert len(run(first, attempts(5))) == len(run(second, attempts(5))) == 5


# ------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("raise", "env_error"),
        ("exit", "env_error"),
        ("garbage reward", "env_garbage"),
        ("garbage tuple", "env_garbage"),
        ("garbage observation", "env_garbage"),
        ("garbage text", "env_garbage"),
        ("garbage metrics none", "env_garbage"),
        ("crash", "worker_died"),
        ("kill", "worker_died"),
    ],
)
def test_a_fault_costs_its_own_episode_and_is_no_reward(says, reason):
    with open_pool(length=3) as pool:
        found = run(make_collector(ScriptedEngine(), pool, {(2, 1): says}), attempts(8))
    bad = found.pop(2)
    assert outcome(bad) == (Status.DISCARDED, reason) and bad.outcome.detail
    assert len(bad.turns) == 1 and not bad.outcome.is_trained
    assert len(found) == 7
    assert all(outcome(t) == (Status.TRAINED, "won") and len(t.turns) == 3 for t in found.values())


def test_a_hang_ends_at_the_deadline_of_its_step():
    with open_pool(length=3, step=3.0) as pool:
        found = run(make_collector(ScriptedEngine(), pool, {(2, 1): "hang"}), attempts(6))
    assert outcome(found.pop(2)) == (Status.DISCARDED, "timeout")
    assert {outcome(t) for t in found.values()} == {(Status.TRAINED, "won")}


def test_an_episode_that_lasts_too_long_is_given_up():
    """Every single step is quick enough, all together are not."""
    with open_pool(length=1000) as pool:
        script = {(group, turn): "sleep 0.2" for group in (0, 7) for turn in range(1000)}
        collector = make_collector(ScriptedEngine(), pool, script, max_turns=1000, episode_timeout=3.0)
        found = run(collector, attempts(1))
        assert outcome(found[0]) == (Status.DISCARDED, "timeout")
        assert "longer than 3 s" in found[0].outcome.detail and 1 <= len(found[0].turns) <= 15
        # The slot is free again, and an answer that was still on its way is nobody's.
        assert outcome(run(collector, attempts(1, task=1, group_id=7))[7]) == (Status.DISCARDED, "timeout")


def test_a_worker_killed_from_outside_costs_at_most_its_episode():
    with open_pool("SlowEnv", length=6, latency=0.02) as pool:
        collector = make_collector(ScriptedEngine(slots=6), pool, max_turns=7)
        collector.admit(attempts(24))
        found, kills = {}, 0
        while collector.in_flight:
            found |= {attempt.group_id: trajectory for attempt, trajectory in collector.advance()}
            if kills < 3 and len(found) >= 4 * (kills + 1):
                os.kill(pool.worker_pids()[kills % 2], signal.SIGKILL)
                kills += 1
    lost = [t for t in found.values() if not t.outcome.is_trained]
    assert len(found) == 24 and kills == 3
    assert len(lost) <= kills and {t.outcome.reason for t in lost} <= {"worker_died"}
    assert pool.stats.restarts >= 1
    for trajectory in found.values():
        if trajectory.outcome.is_trained:
            assert [int(t.observation.split()[2]) for t in trajectory.turns] == list(range(6))


# ------------------------------------------------------------------------------------------- limits


def test_a_conversation_that_outgrows_the_engine_scores_zero_by_name():
    with open_pool(length=9) as pool:
        found = run(make_collector(ScriptedEngine(capacity=8), pool, max_turns=9), attempts(2))
    for trajectory in found.values():
        assert outcome(trajectory) == (Status.SCORED_ZERO, "context_limit")
        assert len(trajectory.turns) == 3  # 3 tokens each; the next prompt fits, no response after it does


def test_a_first_prompt_that_does_not_fit_costs_its_own_task():
    with open_pool() as pool:
        found = run(make_collector(ScriptedEngine(capacity=1), pool), attempts(1))
        assert outcome(found[0]) == (Status.DISCARDED, "prompt_too_long")
        assert "has 1 tokens, but rollout.max_tokens=1" in found[0].outcome.detail
        assert pool.quarantined() == [("train", 0)]


def test_training_in_which_no_first_prompt_fits_is_refused():
    with open_pool() as pool:
        collector = make_collector(ScriptedEngine(capacity=1), pool, num_tasks=NUM_TASKS)
        with pytest.raises(PromptError, match=r"64 tasks .* 1 to 1 tokens, but rollout\.max_tokens=1; "):
            run(collector, attempts(pool.splits["train"]))


class RefusedContext(TokenContext):
    """A chat template refuses a prompt: the first one, or the one after the first response."""

    def __init__(self, is_first, tasks):
        self._is_first, self._tasks = is_first, tasks
        self._is_refused = False

    def start(self, observation, info):
        self._is_refused = self._tasks is None or int(observation.split("/")[1]) in self._tasks
        return self._next(super().start(observation, info), self._is_first)

    def follow(self, *answer):
        return self._next(super().follow(*answer), True)

    def _next(self, delta, is_now):
        if self._is_refused and is_now:
            raise ChatTemplateError("roles must alternate")
        return delta


@pytest.mark.parametrize("is_first", [True, False])
def test_a_prompt_that_the_template_refuses_costs_its_episode(is_first):
    with open_pool(length=3) as pool:
        context = functools.partial(RefusedContext, is_first, {2})
        collector = make_collector(
            ScriptedEngine(), pool, make_context=context, num_tasks=pool.splits["train"]
        )
        found = run(collector, attempts(6))
        assert outcome(found[2]) == (Status.DISCARDED, "prompt_refused")
        assert found[2].outcome.detail == "roles must alternate"
        assert len(found.pop(2).turns) == (0 if is_first else 1)
        assert {outcome(t) for t in found.values()} == {(Status.TRAINED, "won")}
        # What a program says later depends on the policy, so that only a first prompt speaks for its task.
        assert pool.quarantined() == ([("train", 2)] if is_first else [])


@pytest.mark.parametrize("is_first", [True, False])
def test_training_in_which_the_template_refuses_every_task_ends(is_first):
    with open_pool() as pool:
        context = functools.partial(RefusedContext, is_first, None)
        collector = make_collector(
            ScriptedEngine(), pool, make_context=context, num_tasks=pool.splits["train"]
        )
        with pytest.raises(PromptError, match=r"^roles must alternate; .* 64 tasks of env\.split=train"):
            run(collector, attempts(pool.splits["train"]))


# ------------------------------------------------------------------------------------------- cancel


def test_cancelled_attempts_leave_no_trace():
    with open_pool(length=3) as pool:
        engine = ScriptedEngine(slots=2)
        collector = make_collector(engine, pool)
        collector.admit([*attempts(2), *attempts(2), *attempts(1)])
        collector.advance()
        in_flight = collector.in_flight
        wasted = collector.cancel(0)
        assert wasted >= 0 and collector.in_flight == in_flight - 3  # one was running, two were queued
        ended = [a.group_id for _ in range(60) for a, _ in collector.advance()]
        assert ended == [1, 1] and not engine.has_work
        collector.admit(attempts(3))
        collector.advance()
        collector.cancel_all()
        assert collector.in_flight == 0 and not engine.has_work
        assert sorted(run(collector, attempts(4))) == [0, 1, 2, 3]


def test_the_sampled_tokens_of_cancelled_attempts_are_counted():
    with open_pool(length=50) as pool:
        collector = make_collector(ScriptedEngine(slots=1), pool)
        collector.admit(attempts(1))
        while (episode := collector._episodes.get(0)) is None or episode.num_turns < 3:
            collector.advance()
        assert collector.cancel(0) == 3 * 2


def test_an_episode_does_not_age_while_nobody_serves_it():
    """The clock jumps an hour between two rounds, as in an update of the learner, and not in a round."""
    now = itertools.count(0.0, 1e-6)
    jumps = [0.0]
    with open_pool(length=3) as pool:
        collector = make_collector(
            ScriptedEngine(slots=2), pool, episode_timeout=60.0, timer=lambda: next(now) + jumps[0]
        )
        collector.admit(attempts(2))
        found = []
        while collector.in_flight:
            found += collector.advance()
            jumps[0] += 3600.0
        assert [outcome(t) for _, t in found] == [(Status.TRAINED, "won")] * 2
        assert collector.served < 1.0


class TimedEngine(ScriptedEngine):
    """Every step takes some seconds of a clock."""

    def __init__(self, now, seconds, **options):
        super().__init__(**options)
        self.now, self.seconds = now, seconds

    def step(self, *, is_eager=True):
        self.now[0] += self.seconds if self.has_work else 0.0
        return super().step(is_eager=is_eager)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_slow_sampling_costs_no_episode_its_time(is_deterministic):
    """Compilations, or waits behind the learner, take longer than an episode may last."""
    now = [0.0]
    with open_pool(length=3) as pool:
        engine = TimedEngine(now, 1000.0, slots=2)
        options = {"is_deterministic": is_deterministic, "episode_timeout": 60.0, "timer": lambda: now[0]}
        collector = make_collector(engine, pool, **options)
        found = run(collector, attempts(3))
        assert {outcome(t) for t in found.values()} == {(Status.TRAINED, "won")}
        assert collector.served >= 3000.0 and collector.aged == 0.0


def test_an_environment_ages_its_episode_while_others_are_sampled():
    """The engine is never idle: the time of an environment that is at work still counts."""
    now = [0.0]
    with open_pool(length=10**6) as pool:
        engine = TimedEngine(now, 0.5, slots=2)
        options = {"max_turns": 10**6, "episode_timeout": 15.0, "timer": lambda: now[0]}
        collector = make_collector(engine, pool, {(0, 0): "sleep 60"}, **options)
        collector.admit(attempts(2))
        ((attempt, late),) = next(filter(None, (collector.advance() for _ in range(10**6))))
        assert attempt.task == 0 and outcome(late) == (Status.DISCARDED, "timeout")
        collector.cancel_all()


def test_two_collectors_share_a_pool_and_each_gets_its_own_answers():
    with open_pool(length=3) as pool:
        first = make_collector(ScriptedEngine(slots=2), pool)
        second = make_collector(ScriptedEngine(slots=2), pool, first_handle=2)
        first.admit(attempts(2))
        while len(first.engine.submitted) < 2:
            first.advance()
        first.settle()  # two answers of environments are on their way, and the second takes over
        assert sorted(run(second, attempts(3))) == [0, 1, 2]
        assert sorted(run(first, [])) == [0, 1]


def test_settling_ends_responses_and_begins_none():
    with open_pool(length=3) as pool:
        # Long responses: none ends before the second environment has answered, however busy the machine.
        engine = ScriptedEngine(slots=2, bursts=20_000)
        collector = make_collector(engine, pool)
        collector.admit(attempts(4))
        while len(engine.submitted) < 2:
            collector.advance()
        assert engine.has_work
        collector.settle()
        assert not engine.has_work and len(engine.submitted) == 2
        assert len(run(collector, [])) == 4


# -------------------------------------------------------------------------------- the real thing


SIZES = ["rollout.slots=3", "rollout.max_tokens=128", "rollout.prefill_buckets=[32]", "env.max_turns=3"]
SMALL = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=2"]


@pytest.fixture(scope="module")
def parts():
    """Engine, language and pool of a small household agent with random weights."""
    config = load_config("quickstart", [*SIZES, *SMALL, "workers.num=2"])
    language = assembly.make_language(config)
    model = assembly.make_model(config, language.tokenizer)
    params = init_params(jax.random.key(3), model)

    def make(*overrides):
        changed = load_config("quickstart", [*SIZES, *SMALL, *overrides])
        engine = sampling.make_engine(changed, model, language.tokenizer.stop_ids)
        engine.load(params, 0)
        return sampling.make_collector(changed, engine, pool, assembly.make_language(changed), stream=0)

    with sampling.make_pool(config) as pool:
        yield make


def group_attempts():
    return [Attempt("train", task, task, member) for task, member in itertools.product(range(3), range(3))]


def collect(collector):
    collector.admit(group_attempts())
    found = {}
    while collector.in_flight:
        found |= {(a.group_id, a.member): trajectory for a, trajectory in collector.advance()}
    return [found[key] for key in sorted(found)]


def arrays(trajectories):
    names = ("prompt_tokens", "response_tokens", "behavior_logprobs", "entropies")
    return [getattr(turn, name) for t in trajectories for turn in t.turns for name in names]


@pytest.mark.slow
def test_in_deterministic_mode_a_collection_repeats_bit_by_bit(parts):
    first = collect(parts("rollout.deterministic=true"))
    second = collect(parts("rollout.deterministic=true"))
    assert len(first) == 9
    for a, b in zip(arrays(first), arrays(second), strict=True):
        assert a.tobytes() == b.tobytes()
    # Without it the tokens are the same, and the log-probs up to rounding.
    for a, b in zip(arrays(first), arrays(collect(parts())), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(parts):
    """The same tokens as without it, up to there, in bursts of any length; and the episode goes on."""
    free = collect(parts())
    stop = free[0].turns[0].response.split(" ")[3]  # a word that the policy says
    for burst in (3, 8):
        found = collect(parts(f"rollout.stop=[{stop}]", f"rollout.burst={burst}"))
        turns = [turn for trajectory in found for turn in trajectory.turns]
        for turn in turns:  # nothing stands behind it but the rest of its phrase
            assert len(turn.response.partition(stop)[2].split(" ")) <= 2
            assert turn.finish_reason == "stop" or stop not in turn.response
        assert {stop in turn.response for turn in turns} == {True, False}
        for one, other in zip(found, free, strict=True):
            first, whole = one.turns[0].response_tokens, other.turns[0].response_tokens
            np.testing.assert_array_equal(first, whole[: len(first)])
        assert len(found[0].turns[0].response_tokens) < len(free[0].turns[0].response_tokens)
        assert all(len(trajectory.turns) == 3 for trajectory in found)


def test_members_of_a_group_differ(parts):
    found = collect(parts())
    texts = {tuple(tuple(turn.response_tokens.tolist()) for turn in t.turns) for t in found}
    assert len(texts) == len(found)


@pytest.mark.parametrize(("context", "segments"), [("transcript", 1), ("window", 3)])
def test_prompts_of_both_contexts(parts, context, segments):
    options = [f"env.context={context}", "env.history=0"]
    collector = parts(*options, "rollout.share_prefix=false")
    found = collect(collector)
    assert {outcome(t) for t in found} == {(Status.TRAINED, "turn_limit")}
    prompts = sum(len(turn.prompt_tokens) for t in found for turn in t.turns)
    kept = 0
    for trajectory in found:
        assert len(merge_turns(trajectory, 0)) == segments
        assert all(turn.response and turn.observation for turn in trajectory.turns)
        for before, after in itertools.pairwise(trajectory.turns):
            held = np.concatenate([before.prompt_tokens, before.response_tokens])
            if context == "transcript":
                np.testing.assert_array_equal(after.prompt_tokens[: len(held)], held)
                kept += len(held) - 1
    # What is not kept is prefilled, but for the newest token of each prompt.
    turns = sum(len(t.turns) for t in found)
    assert collector.engine.stats.prefilled_tokens == prompts - kept - turns
    # The attempts at a task share its first prompt, and all prompts the instructions, without a difference.
    sharing = parts(*options)
    for a, b in zip(arrays(found), arrays(collect(sharing)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    stats = sharing.engine.stats
    assert stats.shared_tokens > 0 and stats.prefilled_tokens < collector.engine.stats.prefilled_tokens


def test_a_response_that_a_limit_cut_is_recorded_as_such(parts):
    found = collect(parts("rollout.max_response_tokens=2"))
    turns = [turn for t in found for turn in t.turns]
    assert {turn.finish_reason for turn in turns} >= {"length"}
    assert max(len(turn.response_tokens) for turn in turns) == 2
    assert all(len(merge_turns(t, 0)) == 1 for t in found)
