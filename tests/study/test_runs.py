"""The runs of a study: each is made once, by whatever process, and every end is recorded or gone on with."""

import json
import os
import signal
import sys

import pytest
import study
import study_runs
from study_ledger import Ledger, newest
from study_plan import Triple

from tests import runs
from tests.compiling import optimized_programs
from tests.study import made_up

SCRIPT = "import sys; sys.path.insert(0, 'scripts'); import study; sys.exit(study.main())"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "study"


@pytest.fixture
def runs_dir(tmp_path):
    return tmp_path / "runs"


@pytest.fixture
def call(monkeypatch, folder, runs_dir):
    """`study.py run` in this process, with a program that takes no time; returns the exit code."""
    monkeypatch.setattr(study_runs, "PROGRAM", (sys.executable, str(made_up.PROGRAM)))

    def run(*words):
        return study.main(["run", str(folder), "--runs-dir", str(runs_dir), "--nice", "0", *words])

    return run


def journal_names(runs_dir):
    return [name for name, _ in made_up.journal(runs_dir)]


def test_a_study_goes_on_where_it_was(call, folder, runs_dir, capsys):
    names = [triple.name for triple in made_up.make_study(folder, seeds=(3, 4)).triples()]
    assert call("--limit", "3") == 0
    assert journal_names(runs_dir) == names[:3]
    assert "house aem    1 finished, 0 failed, 0 running, 1 to do" in capsys.readouterr().out.splitlines()
    assert call("--arms", "aem") == 0
    assert call("--jobs", "2") == 0 and call() == 0
    assert sorted(journal_names(runs_dir)) == sorted(names)
    assert journal_names(runs_dir)[3:6] == [name for name in names[3:] if "aem" in name]


def test_a_seed_of_another_processor_is_left_to_it(call, folder, runs_dir, capsys):
    study_file = made_up.make_study(folder, seeds=(3, 4))
    first, *_ = study_file.triples()
    Ledger(study_file).append(made_up.line(study_file, first, [0.25, 0.5, 0.75]))  # made on an abacus
    assert call() == 0
    told = "seed 3 of house is left to the processor of its runs, abacus (--any-processor)"
    assert told in capsys.readouterr().err.splitlines()
    others = [triple.name for triple in study_file.triples() if (triple.task, triple.seed) != ("house", 3)]
    assert sorted(journal_names(runs_dir)) == sorted(others)
    assert call("--any-processor") == 0 and journal_names(runs_dir)[len(others) :] == ["house-aem-3"]


def test_a_run_that_moves_to_another_machine_has_no_record_of_cpu_seconds(
    call, folder, runs_dir, monkeypatch, capsys
):
    """It waits for the processor that began it; made elsewhere, its seconds are a sum of unlike ones."""
    study_file = made_up.make_study(folder, seeds=(3,), other="deadly")
    monkeypatch.setattr(study_runs, "processor", lambda: "abacus")
    assert call("--arms", "deadly", "--tasks", "house") == 0 and not Ledger(study_file).read()
    monkeypatch.setattr(study_runs, "processor", lambda: "slide rule")
    assert call("--tasks", "house") == 0 and len(made_up.journal(runs_dir)) == 1
    told = "seed 3 of house is left to the processor of its runs, abacus (--any-processor)"
    assert told in capsys.readouterr().err.splitlines()
    (runs_dir / "alive").touch()
    assert call("--any-processor", "--tasks", "house") == 0
    lines = {line["arm"]: line for line in Ledger(study_file).read()}
    assert lines["deadly"]["status"] == "finished" and lines["deadly"]["attempts"] == 2
    assert lines["deadly"]["spent"] is None and lines["plain"]["spent"] is not None


def test_the_line_of_a_run(call, folder):
    study_file = made_up.make_study(folder, replace={"\nseeds": "\nend_tasks: 512\nseeds"})
    assert call("--limit", "1") == 0
    (line,) = Ledger(study_file).read()
    expected = {
        "task": "house",
        "arm": "plain",
        "seed": 3,
        "status": "finished",
        "settings": ["quickstart", "eval.every=10", "algorithm.name=grpo", "seed=3"],
        "attempts": 1,
        "updates": 20,
        "weights_before": "w",
        "wall_seconds": 2.0,
        "curve": [[0, 0.25], [10, 0.5], [20, 0.75]],
        "area": 0.5,
        "updates_to_60": 14.0,
        "end_success": 0.75,
        "end_tasks": 512,
        "commit": "c" * 40,
    }
    assert {key: line[key] for key in expected} == expected
    assert line["cpu_seconds"] > 0 and line["date"].endswith("+00:00") and line["hardware"]["cpus"] == 1
    assert line["series"]["update"] == list(range(1, 21))
    assert line["series"]["entropy"][9::10] == [0.5, 0.25] and line["series"]["grad_norm"] == [None] * 20
    assert isinstance(line["changes"], list)
    assert line["spent"] == {"environment_steps": [0, 50, 100], "cpu_seconds": [0, 5, 10]}


def test_failures_are_recorded_with_their_reason_and_made_again_on_request(call, folder, runs_dir):
    study_file = made_up.make_study(folder, seeds=(3,), other="broken")
    assert call() == 0 and call() == 0
    lines = newest(Ledger(study_file).read())
    failed = lines[Triple("house", "broken", 3)]
    assert failed["status"] == "failed" and failed["reason"] == "exit code 1: error: no such luck"
    assert [line["status"] for line in lines.values()].count("finished") == 2
    assert len(made_up.journal(runs_dir)) == 4
    assert call("--retry") == 0
    assert made_up.journal(runs_dir)[4:] == [("house-broken-3", True), ("shop-broken-3", True)]
    assert Ledger(study_file).count()[Triple("house", "broken", 3)] == 2


def test_a_run_that_is_killed_goes_on_and_fails_only_when_it_always_is(call, folder, runs_dir):
    study_file = made_up.make_study(folder, seeds=(3,), other="deadly")
    for number in range(1, 6):
        assert call("--arms", "deadly", "--limit", "1") == 0
        assert made_up.journal(runs_dir)[-1] == ("house-deadly-3", number > 1)
        assert len(Ledger(study_file).read()) == (number == 5)
    assert Ledger(study_file).read()[0]["reason"].startswith("killed by signal 9")


def test_a_run_without_a_result_is_a_failure(call, folder, runs_dir, monkeypatch):
    def read(folder):
        raise study_runs.Incomplete("half a curve")

    monkeypatch.setattr(study_runs, "read_run", read)
    study_file = made_up.make_study(folder)
    assert call("--limit", "1") == 0
    (line,) = Ledger(study_file).read()
    assert line["status"] == "failed" and "half a curve" in line["reason"]


def test_folders_of_other_settings_are_refused(call, folder, capsys):
    made_up.make_study(folder)
    assert call("--limit", "1") == 0
    (folder / "runs.jsonl").unlink()
    made_up.make_study(folder, replace={"[eval.every=10]": "[eval.every=5]"})
    assert call() == 2
    assert "house-plain-3 was begun with" in capsys.readouterr().err
    assert call("--arms", "ame") == 2
    assert "--arms ame: no such arm (did you mean aem?)" in capsys.readouterr().err
    assert call("--tasks", "hose") == 2
    assert "--tasks hose: no such task (did you mean house?)" in capsys.readouterr().err


def test_processes_share_a_study_and_make_every_run_once(folder, runs_dir):
    study_file = made_up.make_study(folder, seeds=range(5))
    processes = [made_up.start(folder, runs_dir, "--jobs", "2") for _ in range(2)]
    for process in processes:
        assert process.wait(timeout=300) == 0, process.communicate()[1]
        process.communicate()
    triples = list(study_file.triples())
    assert sorted(journal_names(runs_dir)) == sorted(triple.name for triple in triples)
    assert Ledger(study_file).count() == dict.fromkeys(triples, 1)


def test_a_run_that_ends_while_another_process_starts_is_made_once(call, folder, runs_dir, monkeypatch):
    """The other process finishes it between our look at the lines and everything after."""
    study_file = made_up.make_study(folder, seeds=(3,))
    other, read = next(iter(study_file.triples())), Ledger.read

    def read_and_be_late(ledger):
        lines = read(ledger)
        monkeypatch.setattr(Ledger, "read", read)
        ledger.append(made_up.line(study_file, other, [0.2, 0.4]))
        return lines

    monkeypatch.setattr(Ledger, "read", read_and_be_late)
    assert call() == 0
    assert other.name not in journal_names(runs_dir)
    assert set(Ledger(study_file).count().values()) == {1}


def test_a_stop_reaches_the_run_and_the_next_call_goes_on(folder, runs_dir):
    study_file = made_up.make_study(folder, seeds=(3,), other="slow")
    process = made_up.start(folder, runs_dir, "--arms", "slow")
    try:
        made_up.wait_for(lambda: (runs_dir / "house-slow-3" / "config.yaml").exists())
        process.terminate()
        _, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143 and "house-slow-3 was stopped; the next call goes on" in told
    assert not Ledger(study_file).read() and not list(Ledger(study_file).claimed())
    (runs_dir / "go").touch()
    after = made_up.start(folder, runs_dir, "--arms", "slow")
    _, told = after.communicate(timeout=120)
    assert after.returncode == 0, told
    names = [("house-slow-3", False), ("house-slow-3", True), ("shop-slow-3", False)]
    assert made_up.journal(runs_dir) == names
    lines = Ledger(study_file).read()
    assert [line["attempts"] for line in lines] == [2, 1] and lines[0]["cpu_seconds"] > 0


def test_the_run_of_a_killed_process_is_not_begun_twice(folder, runs_dir):
    """Its run goes on alone and keeps its claim; whoever comes after it is over records it."""
    study_file = made_up.make_study(folder, seeds=(3,), other="slow")
    process = made_up.start(folder, runs_dir, "--arms", "slow", "--limit", "1")
    made_up.wait_for(lambda: (runs_dir / "house-slow-3" / "config.yaml").exists())
    process.kill()
    process.communicate()
    assert list(Ledger(study_file).claimed()) == [Triple("house", "slow", 3)]
    second = made_up.start(folder, runs_dir, "--arms", "slow", "--limit", "1")
    made_up.wait_for(lambda: (runs_dir / "shop-slow-3" / "config.yaml").exists())
    (runs_dir / "go").touch()
    second.communicate(timeout=120)
    made_up.wait_for(lambda: not list(Ledger(study_file).claimed()))
    assert [line["task"] for line in Ledger(study_file).read()] == ["shop"]
    third = made_up.start(folder, runs_dir, "--arms", "slow")
    third.communicate(timeout=120)
    line = newest(Ledger(study_file).read())[Triple("house", "slow", 3)]
    assert line["status"] == "finished" and line["attempts"] == 2
    assert line["cpu_seconds"] is None  # nobody knows what the first attempt cost


@pytest.mark.slow
@pytest.mark.long
def test_a_study_of_real_runs(folder, tmp_path, monkeypatch):
    """Two arms start from the same weights; a run that is killed goes on from its checkpoint."""
    small = [each for each in (*runs.TINY, *runs.HOUSE) if not each.startswith("eval.every")]
    options = [*small, "eval.every=1", "log.drift_every=1", "env.options.latency=0.02"]
    text = "\n".join(
        [
            "preregistration: {question: q, primary: p, secondary: [], stop_rule: s, seeds: 1,",
            "  minimum_detectable_effect: {points: 5}}",
            "tasks: {house: quickstart}",
            f"overrides: {json.dumps(options)}",
            "arms: {grpo: [algorithm.name=grpo], aem: [algorithm.name=grpo_aem]}",
            "seeds: [3]\nend_tasks: 12",
        ]
    )
    folder.mkdir()
    (folder / "study.yaml").write_text(text)
    words = ["run", str(folder), "--runs-dir", str(tmp_path / "runs")]
    run = tmp_path / "runs" / "house-grpo-3"
    with optimized_programs():
        process = runs.start(words, code=SCRIPT)
        is_under_way = (run / "checkpoints" / "1").exists
        made_up.wait_for(lambda: is_under_way() or process.poll() is not None, seconds=300)
        assert process.poll() is None, process.communicate()[1]
        os.kill(json.loads((run / "run.lock").read_text())["pid"], signal.SIGKILL)
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
        study_file = study.read_study(folder)
        assert [line["arm"] for line in Ledger(study_file).read()] == ["aem"], told
        process = runs.start(words, code=SCRIPT)
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
    aem, grpo = Ledger(study_file).read()
    assert grpo["attempts"] == 2 and aem["attempts"] == 1
    assert grpo["weights_before"] == aem["weights_before"] and len(grpo["weights_before"]) == 16
    for line in (grpo, aem):
        assert [point[0] for point in line["curve"]] == [0, 1, 2, 3] and line["series"]["update"] == [1, 2, 3]
        assert not any(None in values for values in line["series"].values())
        assert line["end_tasks"] == 12 and line["eval_tasks"] == 8 and line["versions"]["jax"]
    assert grpo["curve"][0] == aem["curve"][0]
    assert {*aem["series"]["modulation_std"]} != {0.0} and {*grpo["series"]["modulation_std"]} == {0.0}
    assert (
        study.main(["report", str(folder), "--out", str(tmp_path / "r.md"), "--png", str(tmp_path / "r.png")])
        == 0
    )
    assert "2 of 2 runs are finished" in (tmp_path / "r.md").read_text() and (tmp_path / "r.png").exists()
