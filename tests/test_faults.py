"""What goes wrong in a run costs what it must and nothing more."""

import dataclasses
import gc
import json
import math
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax import trainer
from empg_jax.cli import app
from empg_jax.metrics import read_metrics
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.run.folder import write_run_info
from empg_jax.run.guards import TrainingError
from empg_jax.workers.pool import PoolError
from tests import runs

HOUSE = [*runs.HOUSE, "sft.updates=0"]


@pytest.fixture
def opened(monkeypatch):
    """Parts and states of the runs that were opened; functions in ``changes`` may replace the parts."""
    found = []
    real = trainer.open_run

    def open_run(*args, **options):
        parts, run = real(*args, **options)
        for change in open_run.changes:
            parts = change(parts) or parts
        found.append((parts, run))
        return parts, run

    open_run.changes = []
    monkeypatch.setattr(trainer, "open_run", open_run)
    found_with_changes = type("Opened", (), {"runs": found, "changes": open_run.changes})
    return found_with_changes


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def told(run, name, *fields):
    """These fields of every event of a name."""
    events = [event for event in read_metrics(run / "events.jsonl") if event["event"] == name]
    return [tuple(event[field] for field in fields) for event in events]


# ------------------------------------------------------------------------------------ loss and gradient


def poison(*bad):
    """Makes the advantages of these optimizer steps NaN (counted from 1, over the whole run)."""

    def change(parts):
        steps, update = iter(range(1, 1000)), parts.learner.update

        def poisoned(state, batch, scores, credit, start, stop):
            if next(steps) in bad:
                credit = dataclasses.replace(credit, advantages=credit.advantages * np.float32("nan"))
            return update(state, batch, scores, credit, start, stop)

        return dataclasses.replace(parts, learner=dataclasses.replace(parts.learner, update=poisoned))

    return change


@pytest.mark.slow
def test_nan_stops_with_the_batch_and_the_last_good_checkpoint(tmp_path, opened):
    opened.changes.append(poison(4))  # the second step of update 2
    with pytest.raises(TrainingError, match=r"update 2: .*not finite in 1 of 2 .*bad_batch_2\.npz"):
        runs.train(tmp_path / "run", *HOUSE)
    (dumped,) = (tmp_path / "run" / "debug").glob("bad_batch_*")
    with np.load(dumped) as batch:
        assert batch["loss_mask"].any() and batch["tokens"].shape == batch["loss_mask"].shape
    assert told(tmp_path / "run", "steps_left_out", "update", "reason", "steps") == [(2, "nonfinite", 1)]
    found = runs.restored(tmp_path / "run")
    assert found.step == 1 and found.progress["update"] == 1
    assert all(np.isfinite(leaf).all() for leaf in _arrays(found.state))
    # Without the poison, the run goes on from there.
    opened.changes.clear()
    runs.resume(tmp_path / "run")
    assert [line["update"] for line in runs.lines(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_nan_may_be_skipped(tmp_path, opened):
    opened.changes.append(poison(4))
    run = runs.train(tmp_path / "run", *HOUSE, "train.on_nonfinite=skip")
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["nonfinite_steps"] for line in lines] == [0, 1, 0]
    assert int(opened.runs[0][1].state.step) == 2 * 3 - 1
    assert all(np.isfinite(leaf).all() for leaf in _arrays(opened.runs[0][1].state))
    assert lines[1]["loss"] is None or math.isfinite(lines[1]["loss"])
    told_of = CliRunner().invoke(app, ["inspect", str(run)])
    assert told_of.exit_code == 0, told_of.stderr
    first, _, bad, *_ = told_of.stdout.splitlines()
    assert first == f"{run / 'debug' / 'bad_batch_2.npz'}: update 2, 2 optimizer steps"
    assert bad.startswith("  step 2: ") and bad.endswith("left out: not finite")
    # The poison came behind the credit.
    assert "nothing in batch, scores, credit and parameters" in told_of.stdout


@pytest.mark.slow
def test_nan_may_roll_back(tmp_path, opened, capsys):
    opened.changes.append(poison(4))
    run = runs.train(tmp_path / "run", *HOUSE, "train.on_nonfinite=rollback")
    assert told(run, "rollback", "reason") == [("nonfinite",)] and told(run, "steps_left_out", "update")
    assert int(opened.runs[0][1].state.step) == 2 + 0 + 2  # update 2 was undone
    assert runs.weights(run, 2) == runs.weights(run, 1)
    assert "update 2: loss or gradient was not finite" in capsys.readouterr().err


@pytest.mark.slow
def test_rolling_back_again_and_again_stops(tmp_path, opened):
    opened.changes.append(poison(*range(1, 99)))
    with pytest.raises(TrainingError, match=r"update 4: .*not finite"):
        runs.train(tmp_path / "run", *HOUSE, "train.on_nonfinite=rollback", "train.updates=9")


def _arrays(state):
    import jax

    return [leaf for leaf in jax.tree.leaves(jax.device_get(state)) if np.issubdtype(leaf.dtype, np.floating)]


# ------------------------------------------------------------------------------------------ checkpoints

FULL_DISK = """
import resource
from empg_jax import cli, trainer

real = trainer.save
def save(parts, run):
    if run.update == 2:  # from here on no file may grow beyond 8 kB
        parts.checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    real(parts, run)
trainer.save = save
cli.main()
"""


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    run = tmp_path / "run"
    process = runs.start(runs.command(run, *HOUSE), code=FULL_DISK)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1, err
    message = err[err.index("error: ") :]
    assert message.startswith("error: checkpoint 2 could not be written to "), err
    assert str(run / "checkpoints") in message and message.rstrip().endswith("usable: [0, 1]"), err
    assert "Traceback" not in err, err
    assert runs.restored(run).step == 1
    runs.resume(run)
    assert [line["update"] for line in runs.lines(run)] == [1, 2, 3]


def damage(folder):
    """Cuts every file of a checkpoint to half its length."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


# Orbax leaves a coroutine behind when it finds a file damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
def test_damaged_checkpoints_are_passed_over(tmp_path, capsys):
    run = runs.train(tmp_path / "run", *HOUSE, "rollout.deterministic=true")
    weights, lines = runs.weights(run), runs.lines(run)
    damage(run / "checkpoints" / "3")
    (run / "checkpoints" / "2" / "stray").mkdir()
    runs.resume(run)
    assert "checkpoint 3: " in capsys.readouterr().err
    ((detail,),) = told(run, "checkpoint_skipped", "detail")
    assert detail.startswith("3: ") or "checkpoint 3: " in detail
    assert runs.lines(run) == lines and runs.weights(run) == weights
    # It is set aside: else it would stay the newest, for which what is written since is removed.
    assert (run / "checkpoints" / "3.aside").exists() and told(run, "went_back", "step") == [(2,)]
    for folder in (run / "checkpoints").iterdir():
        damage(folder)
    with pytest.raises(CheckpointError, match="no usable checkpoint in"):
        runs.resume(run)
    gc.collect()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_byte_costs_its_checkpoint_and_nothing_else(tmp_path):
    """One bit of the newest checkpoint is wrong: the command goes on from the one before."""
    run = runs.train(tmp_path / "run", *HOUSE, "rollout.deterministic=true")
    weights, lines = runs.weights(run), runs.lines(run)
    newest = run / "checkpoints" / "3" / "state"
    path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    (run / "summary.json").unlink()  # as if the run had been killed before its last file
    code, err = _call("train", "--resume", run)
    assert code == 0 and "checkpoint 3: " in err, err
    ((detail,),) = told(run, "checkpoint_skipped", "detail")
    assert "checkpoint 3: " in detail and (run / "summary.json").exists()
    assert runs.lines(run) == lines and runs.weights(run) == weights
    gc.collect()


@pytest.mark.slow
def test_damaged_logs_never_stop_a_resume(tmp_path):
    run = runs.train(tmp_path / "run", *runs.HOUSE, "rollout.deterministic=true", "train.updates=2")
    lines, nulls = runs.lines(run), b"\0" * 512
    for name in ("metrics.jsonl", "sft_metrics.jsonl"):
        first, *rest = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(first + b"no JSON\n" + b"\xff" + nulls + b"\n" + b"".join(rest) + nulls)
    (run / "events.jsonl").write_bytes(b"no JSON\n" + nulls)
    code, err = _call("train", "--resume", run, "train.updates=3")
    assert code == 0, err
    assert err.count(f"{run / 'metrics.jsonl'}: 2 damaged lines are skipped (2, 3)") == 1
    first, second, third = runs.lines(run)
    # The second one gets the evaluation that was at the end, and keeps what it had.
    assert first == lines[0] and lines[1].items() <= second.items() and third["update"] == 3
    assert (run / "curves.png").exists()
    # The warm start is over, so that nothing is written to its log: the damage stays and is passed over.
    assert [line["update"] for line in read_metrics(run / "sft_metrics.jsonl")] == [0, 1]
    assert read_metrics(run / "events.jsonl") == []


# ----------------------------------------------------------------------------------------- environments


def trouble_after_evaluation(diary):
    """Evaluation before RL goes well: the diary says that every trouble has been had."""
    diary.write_text("x" * 10**6)

    def change(parts):
        evaluate, begun = parts.evaluator.run, []

        def run_and_begin(*args, **kwargs):
            result = evaluate(*args, **kwargs)
            if not begun:
                diary.write_text("")
            begun.append(True)
            return result

        parts.evaluator.run = run_and_begin

    return change


@pytest.mark.slow
def test_an_environment_that_raises_is_discarded_and_refilled_and_never_a_reward(tmp_path, opened):
    diary, collected = tmp_path / "diary", []
    opened.changes += [trouble_after_evaluation(diary), lambda parts: _record(parts, collected)]
    options = ["env.options.trouble=raise", "env.options.times=2", f"env.options.diary={diary}"]
    run = runs.train(tmp_path / "run", *HOUSE, *options)
    assert summary_of(run)["trajectories"]["discarded:env_error"] == 2
    assert told(run, "episode_discarded", "reason", "split") == [("env_error", "train")] * 2
    lines = read_metrics(run / "metrics.jsonl")
    assert sum(line["episodes_discarded"] for line in lines) == 2
    assert sum(line.get("outcome_env_error", 0) for line in lines) == 2
    ended = sum(line.get(f"outcome_{reason}", 0) for line in lines for reason in ("won", "turn_limit"))
    assert ended == sum(line["episodes_trained"] for line in lines) == 12
    assert len(collected) == 12 and all(t.outcome.is_trained and t.turns for t in collected)
    keys = [(t.group_id, t.member) for t in collected]
    assert keys == [(group, member) for group in range(6) for member in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["hang", "kill"])
def test_a_hang_or_a_dead_worker_costs_its_episode(tmp_path, trouble, opened):
    diary = tmp_path / "diary"
    options = [f"env.options.trouble={trouble}", "env.options.times=1", f"env.options.diary={diary}"]
    run = runs.train(tmp_path / "run", *HOUSE, *options, "workers.step_timeout=4", "eval.tasks=1")
    stats = opened.runs[0][0].rollout.collector.pool.stats
    assert stats.failures == {{"hang": "timeout", "kill": "worker_died"}[trouble]: 1}
    assert stats.restarts == 1
    reason = {"hang": "timeout", "kill": "worker_died"}[trouble]
    assert told(run, "worker_restarted", "worker", "reason") == [(0, reason)]
    # The diary and the summary count alike, wherever it happened: evaluation is told too.
    discarded = told(run, "episode_discarded", "reason", "split")
    assert [name for name, _ in discarded] == [reason]
    outcomes = summary_of(run)["trajectories"]
    assert sum(count for name, count in outcomes.items() if name.startswith("trained:")) == 12
    assert sum(count for name, count in outcomes.items() if name.startswith("discarded:")) <= 1


@pytest.mark.slow
def test_a_worker_killed_from_outside_costs_at_most_its_episode(tmp_path, opened):
    def change(parts):
        pool, rounds = parts.rollout.collector.pool, iter(range(1000))
        advance = parts.rollout.collector.advance

        def kill_now_and_then(wanted):
            if next(rounds) in (3, 5):
                os.kill(pool.worker_pids()[0], signal.SIGKILL)
            return advance(wanted)

        parts.rollout.collector.advance = kill_now_and_then

    opened.changes.append(change)
    run = runs.train(tmp_path / "run", *HOUSE)
    stats = opened.runs[0][0].rollout.collector.pool.stats
    assert stats.restarts == 2 and sum(stats.failures.values()) <= 2
    assert told(run, "worker_restarted", "reason") == [("worker_died",)] * 2
    lines = read_metrics(run / "metrics.jsonl")
    assert sum(line["worker_restarts"] for line in lines) == 2
    assert sum(line["episodes_recovered"] for line in lines) == stats.recovered
    assert {event["update"] for event in read_metrics(run / "events.jsonl")} <= {1, 2, 3}
    outcomes = summary_of(run)["trajectories"]
    assert sum(count for name, count in outcomes.items() if name.startswith("trained:")) == 12


@pytest.mark.slow
def test_tasks_that_never_work_are_given_up_and_told(tmp_path):
    """Every third task fails: its attempts are tried again, it is quarantined, its group replaced."""
    options = ["env.options.broken=3", "faults.breaker_min=1000", "eval.tasks=1", "train.updates=6"]
    run = runs.train(tmp_path / "run", *HOUSE, *options)
    lines = read_metrics(run / "metrics.jsonl")
    tasks = {task for (task,) in told(run, "task_quarantined", "task")}
    assert tasks and all(task % 3 == 0 for task in tasks)
    replaced = told(run, "group_replaced", "reason", "group_id")
    assert replaced and {reason for reason, _ in replaced} <= {"failed", "quarantined"}
    assert sum(line["groups_failed"] for line in lines) == len(replaced)
    assert sum(line["episodes_discarded"] for line in lines) == len(told(run, "episode_discarded", "split"))
    assert max(line["tasks_quarantined"] for line in lines) >= 1


@pytest.mark.slow
def test_a_task_with_a_too_long_prompt_costs_its_own_group_only(tmp_path):
    options = ["env.options.tasks=3", "env.options.wordy=1", "eval.tasks=1", "train.updates=4"]
    run = runs.train(tmp_path / "run", *HOUSE, *options)
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert told(run, "task_quarantined", "split", "task", "reason") == [("train", 0, "prompt_too_long")]
    replaced = told(run, "group_replaced", "task", "reason")
    assert replaced[0] == (0, "prompt_too_long") and set(replaced[1:]) <= {(0, "quarantined")}
    discarded = told(run, "episode_discarded", "task", "reason", "detail")
    (said,) = {detail for _, reason, detail in discarded if reason == "prompt_too_long"}
    assert re.fullmatch(r"the first prompt has \d+ tokens, but rollout.max_tokens=96: no response fits", said)
    assert {task for task, *_ in discarded} == {0}
    assert lines[-1]["tasks_quarantined"] == 1 and sum(line["groups_failed"] for line in lines) == len(
        replaced
    )
    # A resumed run knows of it.
    runs.resume(run, "train.updates=5")
    assert told(run, "task_quarantined", "task") == [(0,)]


def test_a_panel_in_which_no_first_prompt_fits_is_refused(tmp_path):
    options = ["env.options.tasks=3", "env.options.wordy=3", "eval.tasks=1"]
    done = CliRunner().invoke(app, runs.command(tmp_path / "run", *HOUSE, *options))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    message = done.stderr.splitlines()[-1]
    assert re.search(
        r"^error: no first prompt leaves room for a response: those of 3 tasks of env\.split=train have "
        r"(\d{3,}) to (\d{3,}) tokens, but rollout\.max_tokens=96; it must be larger than \2 ",
        message,
    )
    assert "Traceback" not in done.stderr


def _take_away(backend, seconds, before=0):
    """The backend goes away in each of the first collections after ``before`` updates, for some seconds."""

    def change(parts):
        advance, was_away = parts.rollout.collector.advance, []

        def advance_without(wanted):
            if parts.engine.version >= before and not was_away:
                was_away.append(True)
                backend.unlink()
                if seconds is not None:
                    threading.Timer(seconds, backend.touch).start()
            return advance(wanted)

        parts.rollout.collector.advance = advance_without

    return change


@pytest.mark.parametrize(
    "mode",
    ["rollout.deterministic=false", pytest.param("rollout.deterministic=true", marks=pytest.mark.slow)],
)
def test_an_outage_of_every_environment_costs_time_only(tmp_path, opened, mode):
    backend, collected = tmp_path / "backend", []
    backend.touch()
    opened.changes += [_take_away(backend, 1.5, before=1), lambda parts: _record(parts, collected)]
    options = [f"env.options.backend={backend}", "faults.breaker_min=4", "faults.probe=0.1", mode]
    run = runs.train(tmp_path / "run", *HOUSE, *options)
    assert told(run, "breaker_open", "update", "reason") == [(2, "env_error")]
    ((seconds,),) = told(run, "breaker_closed", "seconds")
    assert 0.1 < seconds < 60
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["update"] for line in lines] == [1, 2, 3]
    assert lines[1]["breaker_seconds"] == pytest.approx(seconds, abs=0.1)
    assert lines[0]["breaker_seconds"] == lines[2]["breaker_seconds"] == 0
    # Every planned episode was trained on, once; no task paid for it.
    keys = [(t.group_id, t.member) for t in collected]
    assert keys == [(group, member) for group in range(6) for member in range(2)]
    assert told(run, "group_replaced") == told(run, "task_quarantined") == []
    discarded = {name for (name,) in told(run, "episode_discarded", "reason")}
    assert "outage" in discarded and discarded <= {"outage", "env_error"}


@pytest.mark.slow
def test_an_outage_beyond_patience_ends_the_run_with_a_checkpoint(tmp_path, opened, capsys):
    backend = tmp_path / "backend"
    backend.touch()
    opened.changes.append(_take_away(backend, None, before=2))
    options = [f"env.options.backend={backend}", "rollout.deterministic=true", "checkpoint.every=25"]
    run = tmp_path / "run"
    with pytest.raises(PoolError, match=r"env_error 4.*faults\.patience(.|\n)*the backend does not answer"):
        faults = ["faults.breaker_min=4", "faults.probe=0.1", "faults.patience=1"]
        runs.train(run, *HOUSE, *options, *faults)
    assert "checkpoint 2 holds the last update" in capsys.readouterr().err
    assert runs.restored(run).step == 2
    backend.touch()
    opened.changes.clear()
    runs.resume(run)
    assert [line["update"] for line in runs.lines(run)] == [1, 2, 3]


def _record(parts, collected):
    """Keeps every trajectory that the learner gets."""
    take = parts.rollout.next_batch

    def take_and_keep(check):
        delivery = take(check)
        collected.extend(delivery.trajectories)
        return delivery

    parts.rollout.next_batch = take_and_keep


# ------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_workers_of_a_live_run_hold_no_jax_and_sigterm_ends_it_cleanly(tmp_path):
    run, spy = tmp_path / "run", tmp_path / "spy"
    options = ["env.options.latency=0.05", f"env.options.spy={spy}", "train.updates=500"]
    process = runs.start(runs.command(run, *HOUSE, *options))
    try:
        log = run / "metrics.jsonl"
        _wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
        workers = [pid for pid in _children(process.pid) if "empg_envs.worker" in _read(pid, "cmdline")]
        assert len(workers) == 1
        assert "jaxlib" in _read(process.pid, "maps")
        for pid in workers:
            maps = _read(pid, "maps")
            assert "python" in maps and "jaxlib" not in maps and "numpy" not in maps
        loaded = spy.read_text().split()
        assert "empg_envs" in loaded and not {"jax", "jaxlib", "empg_jax", "numpy"} & set(loaded)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert f"stopped by signal 15; go on with: empg-jax train --resume {run}" in err
    assert out == "" and "Traceback" not in err
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists()
    done = runs.lines(run)[-1]["update"]
    assert runs.restored(run).step == done


def _children(parent):
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _read(entry.name, "stat").rpartition(")")[2].split()[1:2] == [
            str(parent)
        ]:
            yield int(entry.name)


def _read(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _wait_for(is_there, process, seconds=120):
    end = time.monotonic() + seconds
    while not is_there():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"the run ended or hung ({process.returncode}): {process.communicate()[1]}")
        time.sleep(0.01)


def _call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def test_missing_things_are_named(tmp_path):
    code, err = _call("train", tmp_path / "no.yaml")
    assert code == 2 and "no.yaml" in err
    code, err = _call("train", "--resume", tmp_path / "none")
    assert code == 2 and "no run there" in err
    code, err = _call("eval", tmp_path / "run" / "checkpoints" / "7")
    assert code == 2 and "7 is not a folder" in err
    code, err = _call("eval", tmp_path)
    assert code == 2 and "neither a run folder (no config.yaml in it) nor RUN/checkpoints/STEP" in err


def test_a_run_without_checkpoints_is_named(tmp_path):
    run = tmp_path / "run"
    config = runs.configure(run)
    run.mkdir()
    write_run_info(run, config)
    runs.assembly.make_language(config).tokenizer.save(run / "tokenizer")
    (run / "metrics.jsonl").write_text('{"update": 1}\n')  # there were checkpoints once
    for command in (["eval", run], ["train", "--resume", run]):
        code, err = _call(*command)
        assert code == 1 and "error: no usable checkpoint in" in err and "Traceback" not in err


# ------------------------------------------------------------------- an error costs no update that was made


def fail_at(update, error, where):
    """Raises such an error in update ``update`` + 1, inside the rollout or in the evaluation after it."""

    def change(parts):
        if where == "rollout":
            advance = parts.rollout.collector.advance

            def fail(wanted):
                if parts.engine.version == update:
                    raise error("the engine is broken")
                return advance(wanted)

            parts.rollout.collector.advance = fail
        else:
            run = parts.evaluator.run

            def fail_after(params, version, **options):
                if version == update:
                    raise error("the search server is away")
                return run(params, version, **options)

            parts.evaluator.run = fail_after

    return change


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("rollout", KeyboardInterrupt),
        pytest.param("evaluation", RuntimeError, marks=pytest.mark.long),
        pytest.param("rollout", RuntimeError, marks=pytest.mark.long),
        pytest.param("evaluation", KeyboardInterrupt, marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_an_error_leaves_a_checkpoint_of_the_last_update(tmp_path, opened, capsys, error, where):
    options = [*HOUSE, "rollout.deterministic=true", "eval.every=1", "eval.tasks=2"]
    whole = runs.train(tmp_path / "whole", *options)
    opened.changes.append(fail_at(2, error, where))
    run = tmp_path / "run"
    with pytest.raises(error):
        runs.train(run, *options, "checkpoint.every=25")
    told_user = f"checkpoint 2 holds the last update; go on with: empg-jax train --resume {run}"
    assert told_user in capsys.readouterr().err
    assert told(run, "run_failed", "error", "checkpoints") == [(error.__name__, [0, 2])]
    assert runs.restored(run).step == 2
    opened.changes.clear()
    runs.resume(run)
    assert runs.lines(run) == runs.lines(whole)  # no update is repeated or lost, nor its evaluation
    assert runs.weights(run) == runs.weights(whole)


@pytest.mark.slow
def test_an_error_in_the_middle_of_an_update_saves_nothing_of_it(tmp_path, opened, capsys):
    def change(parts):
        steps, update = iter(range(1, 99)), parts.learner.update

        def fail(*arguments):
            if next(steps) == 4:  # the second step of update 2
                raise RuntimeError("out of memory")
            return update(*arguments)

        return dataclasses.replace(parts, learner=dataclasses.replace(parts.learner, update=fail))

    opened.changes.append(change)
    with pytest.raises(RuntimeError, match="out of memory"):
        runs.train(tmp_path / "run", *HOUSE)
    assert "RuntimeError: the newest checkpoint is 1; go on with" in capsys.readouterr().err
    assert runs.restored(tmp_path / "run").progress["update"] == 1


@pytest.mark.long
@pytest.mark.slow
def test_an_error_in_the_first_evaluation_keeps_the_warm_start(tmp_path, opened):
    opened.changes.append(fail_at(0, RuntimeError, "evaluation"))
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="the search server is away"):
        runs.train(run, *runs.HOUSE)
    saved = runs.restored(run)
    assert saved.step == 0 and saved.progress["record"]["phase"] == "rl"
    opened.changes.clear()
    runs.resume(run)
    assert [line["update"] for line in read_metrics(run / "sft_metrics.jsonl")] == [0, 1]
    assert "eval_success_before" in summary_of(run)
