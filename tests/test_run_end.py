"""What a run leaves at its end: on a full disk, under a slow tracker, and where it goes on after it."""

import json
import os
import resource
import sys
import types

import pytest

from empg_jax.metrics import read_metrics
from empg_jax.report import comparison
from empg_jax.report.view.reading import read_facts
from empg_jax.run import concluding, guards
from tests import runs
from tests.test_faults import _call, told

HOUSE = [*runs.HOUSE, "sft.updates=0", "eval.tasks=2"]


def on_a_full_disk(call):
    """Calls a function while no file may grow beyond 4 kB."""

    def fails(*args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        try:
            return call(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return fails


@pytest.mark.slow
def test_the_evaluation_at_the_end_stays_where_a_run_goes_on(tmp_path):
    run = runs.train(tmp_path / "run", *HOUSE, "train.updates=2")
    ended = json.loads((run / "summary.json").read_text())
    code, err = _call("train", "--resume", run, "train.updates=3", "log.progress=false")
    assert code == 0, err
    points = read_facts(run).held_out  # of the page
    assert list(points) == [0, 2, 3] and points[2] == ended["eval_success_after"]
    assert dict(comparison.read_run(run).series["held_out"]) == points
    kept = {name[:-6]: ended[name] for name in ended if name.endswith("_after") and "wins" not in name}
    _, line, last = read_metrics(run / "metrics.jsonl")
    assert kept.items() <= line.items() and not any(name.startswith("eval_") for name in last)


@pytest.mark.slow
def test_a_full_disk_at_the_end_costs_pictures_that_a_resume_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(concluding, "draw_results", on_a_full_disk(concluding.draw_results))
    run = runs.train(tmp_path / "run", *HOUSE, "train.updates=1")
    err = capsys.readouterr().err
    names = ("curves.png", "view.html")
    details = [detail for (detail,) in told(run, "not_drawn", "detail")]
    for name, detail in zip(names, details, strict=True):
        assert detail.startswith(f"warning: {run} gets no {name}: ") and detail in err
        assert not (run / name).exists()
    assert (run / "summary.json").exists() and (run / "eval" / "after.jsonl.gz").exists()
    (run / names[0]).write_bytes(b"of a shorter run")
    os.utime(run / names[0], (0, 0))
    before = (run / "summary.json").stat().st_mtime_ns
    code, err = _call("train", "--resume", run)
    assert code == 0 and "is finished" in err, err
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG") and (run / "view.html").exists()
    assert (run / "summary.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_summary_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def fails(*args):
        (tmp_path / "run" / "summary.json").mkdir()  # as good as a full disk
        write_results(*args)

    write_results = concluding.write_results
    monkeypatch.setattr(concluding, "write_results", fails)
    words = runs.command(tmp_path / "run", *HOUSE, "train.updates=1")
    code, err = _call(*words)
    assert code == 1 and f"error: {tmp_path / 'run' / 'summary.json'} cannot be written: " in err, err


@pytest.mark.slow
def test_a_full_disk_costs_the_batch_of_a_step_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(guards, "dump_update", on_a_full_disk(guards.dump_update))
    run = runs.train(tmp_path / "run", *HOUSE, "train.on_kl=skip", "train.max_kl=1e-12", "train.updates=1")
    assert told(run, "steps_left_out", "reason") == [("kl_exceeded",)]
    ((detail,),) = told(run, "batch_not_written", "detail")
    assert f"batch: not written ({detail}); skip" in capsys.readouterr().err
    assert (run / "summary.json").exists() and not list((run / "debug").iterdir())


@pytest.mark.slow
def test_results_are_written_before_a_tracker_ends(tmp_path, monkeypatch):
    run, found = tmp_path / "run", []

    class Tracker(types.SimpleNamespace):
        def finish(self):
            names = ("metrics.jsonl", "summary.json", "curves.png", "view.html", "eval/after.jsonl.gz")
            found.extend(name for name in names if (run / name).exists())
            found.append(len(read_metrics(run / "metrics.jsonl")))

    tracker = Tracker(log=lambda values, step: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: tracker))
    runs.train(run, *HOUSE, "train.updates=1", "log.wandb=true")
    assert found == ["metrics.jsonl", "summary.json", "curves.png", "view.html", "eval/after.jsonl.gz", 1]
