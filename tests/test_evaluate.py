"""Held-out evaluation: every task once, faults tried again, arithmetic of the summary."""

import contextlib
import dataclasses

import pytest

from empg_jax.errors import ConfigError, Interrupted
from empg_jax.evaluate import evaluate_run
from empg_jax.rollout.evaluator import summarize
from empg_jax.run import sampling
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.types import Outcome, Status
from empg_jax.workers.faults import tell_nobody
from tests import runs
from tests.episodes import Episodes, entropy_of

EPISODES = Episodes()


class Collector:
    """Ends every attempt, the last admitted first; ``fails(attempt)`` says whether it is discarded."""

    def __init__(self, fails):
        self.fails, self.queue, self.seen, self.is_cancelled = fails, [], [], False
        self.reason, self.check = "env_error", None

    def admit(self, attempts):
        self.queue += attempts

    def advance(self):
        attempt = self.queue.pop()
        self.seen.append(attempt)
        trajectory = EPISODES.transcript(
            [(2, 1)],
            task=attempt.task,
            member=attempt.member,
            split=attempt.split,
            group_id=attempt.group_id,
        )
        if self.fails(attempt):
            outcome = Outcome(Status.DISCARDED, self.reason, "the house burnt down")
            trajectory = dataclasses.replace(trajectory, outcome=outcome)
        return [(attempt, trajectory)]

    def cancel_all(self):
        self.is_cancelled = True


class Engine:
    lent_to = None

    @contextlib.contextmanager
    def lent(self, params, version, *, temperature, token_filter):
        self.lent_to, self.loaded = (params, version, temperature), True
        yield
        self.loaded = False


class Pool:
    splits = {"train": 9, "test": 5}  # noqa: RUF012
    tell = staticmethod(tell_nobody)


@pytest.fixture
def make_evaluator(monkeypatch):
    def make(fails=lambda attempt: False, *overrides, attempts=1):
        collector = Collector(fails)
        monkeypatch.setattr(sampling, "make_collector", lambda *args, **kwargs: collector)
        config = runs.configure("unused", *overrides)
        return sampling.make_evaluator(
            config, Engine(), Pool, None, first_handle=0, attempts=attempts
        ), collector

    return make


def test_every_task_once_in_order(make_evaluator):
    evaluator, collector = make_evaluator()
    told = []
    result = evaluator.run("weights", 7, advance=lambda n, values: told.append(n))
    assert evaluator.num_tasks == 5 and sum(told) == 5  # eval.tasks is 8, the panel holds 5
    assert evaluator.engine.lent_to == ("weights", 7, 1.0) and not evaluator.engine.loaded
    assert [(t.split, t.task) for t in result.trajectories] == [("test", task) for task in range(5)]
    assert {(a.task, a.group_id, a.member, a.retry) for a in collector.seen} == {
        (t, t, 0, 0) for t in range(5)
    }


def test_two_panels_are_played_one_after_the_other(make_evaluator):
    evaluator, collector = make_evaluator(
        lambda a: (a.split, a.task) == ("test", 1), "env.eval_split=train+test", "eval.tasks=3"
    )
    result = evaluator.run(None, 0)
    assert evaluator.panels == {"train": 3, "test": 3} and evaluator.num_tasks == 6
    assert len({a.group_id for a in collector.seen}) == 6  # sampling keys of their own
    played = [("train", 0), ("train", 1), ("train", 2), ("test", 0), ("test", 2)]
    assert [(t.split, t.task) for t in result.trajectories] == played
    assert result.missing == (4,) and len(result.wins) == 6 and result.wins[4] == "-"
    assert {"eval_success/train", "eval_success/test"} < result.metrics.keys()


def test_attempts_at_a_task_have_keys_of_their_own(make_evaluator):
    evaluator, collector = make_evaluator(attempts=3)
    result = evaluator.run(None, 0)
    assert {(a.task, a.group_id, a.member) for a in collector.seen} == {
        (task, task, member) for task in range(5) for member in range(3)
    }
    assert [(t.task, t.member) for t in result.trajectories] == [(t, m) for t in range(5) for m in range(3)]


def test_of_several_attempts_only_those_that_fail_are_missing(make_evaluator):
    evaluator, collector = make_evaluator(lambda a: a.task == 2 and a.member == 1, attempts=3)
    result = evaluator.run(None, 0)
    assert len(collector.seen) == 15 + 2 and len(result.trajectories) == 14
    assert result.missing == (2,) and result.metrics["eval_missing"] == 1


def test_a_fault_is_tried_again_and_never_counted(make_evaluator):
    evaluator, collector = make_evaluator(lambda a: a.task == 2 and a.retry < 2)
    result = evaluator.run(None, 0)
    assert len(collector.seen) == 5 + 2 and len(result.trajectories) == 5
    assert all(t.outcome.is_trained for t in result.trajectories)


def test_outages_cost_an_attempt_neither_its_retries_nor_its_keys(make_evaluator):
    seen = []

    def fails(attempt):
        if attempt.task != 2:
            return False
        seen.append(attempt.retry)
        collector.reason = "outage" if len(seen) <= 4 else "env_error"
        return len(seen) <= 5

    evaluator, collector = make_evaluator(fails)
    result = evaluator.run(None, 0)
    assert seen == [0, 0, 0, 0, 0, 1] and result.missing == ()


def test_a_request_to_stop_is_seen_while_a_round_waits(make_evaluator):
    evaluator, collector = make_evaluator()
    checks = iter([None, Interrupted])

    def check():
        if (error := next(checks)) is not None:
            raise error

    collector.advance = lambda: collector.check()  # as where environments do not answer
    with pytest.raises(Interrupted):
        evaluator.run(None, 0, check=check)
    assert collector.is_cancelled


def test_a_task_that_keeps_failing_is_missing_and_told(make_evaluator, monkeypatch):
    told = []
    monkeypatch.setattr(Pool, "tell", staticmethod(lambda event, **fields: told.append((event, fields))))
    evaluator, collector = make_evaluator(lambda a: a.task == 2)
    result = evaluator.run(None, 0)
    assert len(collector.seen) == 5 + 2 and [t.task for t in result.trajectories] == [0, 1, 3, 4]
    assert result.missing == (2,) and result.metrics["eval_missing"] == 1
    assert result.wins[2] == "-" and len(result.wins) == 5
    assert result.metrics["eval_turns"] == 1  # a mean over the others
    fields = {"split": "test", "task": 2, "reason": "env_error", "detail": "the house burnt down"}
    assert told[-1] == ("evaluation_task_missing", fields)


def test_a_task_for_which_no_response_fits_is_attempted_once(make_evaluator):
    evaluator, collector = make_evaluator(lambda a: a.task == 2)
    collector.reason = "prompt_too_long"
    assert evaluator.run(None, 0).missing == (2,) and len(collector.seen) == 5
    assert evaluator.last_failure.startswith("prompt_too_long: ")


def test_where_every_task_is_missing_there_is_no_mean(make_evaluator):
    evaluator, _ = make_evaluator(lambda a: True)
    result = evaluator.run(None, 0)
    assert result.metrics == {"eval_missing": 5.0} and result.wins == "-----"


def test_a_request_to_stop_ends_it_and_frees_the_slots(make_evaluator):
    evaluator, collector = make_evaluator()

    def check():
        if len(collector.seen) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        evaluator.run(None, 0, check=check)
    assert len(collector.seen) == 2 and collector.is_cancelled


def test_an_unknown_split_is_named(make_evaluator):
    with pytest.raises(ConfigError, match=r"env\.eval_split=valid does not exist.* train, test"):
        make_evaluator(lambda a: False, "env.eval_split=valid")


def test_summary_by_hand():
    won = EPISODES.trajectory([EPISODES.turn([1], 3), EPISODES.turn([1], 1, is_valid=False)])
    lost = EPISODES.transcript([(2, 2)], episode_return=-0.5, is_success=False)
    tokens = [token for t in (won, lost) for turn in t.turns for token in turn.response_tokens.tolist()]
    assert summarize([won, lost]) == {
        "eval_success": 0.5,
        "eval_return": 0.25,
        "eval_turns": 1.5,
        "eval_entropy": pytest.approx(float(entropy_of(tokens).mean())),  # over tokens, not over turns
        "eval_invalid_actions": pytest.approx(1 / 3),
    }
    scored = [dataclasses.replace(t, metrics=m) for t, m in [(won, {"task_score": 0.5}), (lost, {})]]
    assert summarize(scored)["eval_env_task_score"] == 0.5  # over the episodes that report it


def test_what_is_no_run_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "checkpoints" / "3"):
        with pytest.raises(CheckpointError, match="is neither a run folder"):
            evaluate_run(path, [])


def test_evaluation_samples_with_keys_of_its_own(monkeypatch):
    """Stream 1, and handles behind those of training."""
    found, real = {}, sampling.make_collector
    monkeypatch.setattr(sampling, "make_collector", lambda *args, **kwargs: found.update(kwargs))
    sampling.make_evaluator(runs.configure("unused"), Engine(), Pool, None, first_handle=4)
    assert found == {"stream": 1, "first_handle": 4}
    assert real.__kwdefaults__ == {"first_handle": 0, "num_tasks": None}
