"""Metrics: the glossary, the weighted mean, and a log that survives crashes and resumes."""

import json
import types

import pytest

from empg_jax.config import load_config
from empg_jax.metrics import METRICS, MetricsLog, describe_metric, grouped, read_metrics, reduce_metrics
from empg_jax.report.tracking import open_trackers


def test_every_metric_has_one_sentence():
    for name, meaning in METRICS.items():
        assert meaning.endswith(".") and "\n" not in meaning, name


def test_families_cover_their_members():
    assert describe_metric("seconds_rollout") == METRICS["seconds_*"]
    assert describe_metric("second") is None


def test_reduction_weighs_each_part_by_its_size():
    # (1 * 1 + 3 * 3) / 4 = 2.5; `b` is known from the second part only; weight 0 says nothing of `c`.
    parts = [({"a": 1.0}, 1), ({"a": 3.0, "b": 7.0}, 3), ({"a": 99.0, "c": 1.0}, 0)]
    assert reduce_metrics(parts) == {"a": 2.5, "b": 7.0}
    with pytest.raises(ValueError, match="negative"):
        reduce_metrics([({"a": 1.0}, -1)])


def test_one_line_per_update_visible_at_once(tmp_path):
    log = MetricsLog(tmp_path)
    for update in range(3):
        log.write(update, {"loss": update / 2, "entropy": 0.5})
        assert [record["update"] for record in read_metrics(log.path)] == list(range(update + 1))
    log.close()
    log.close()
    assert read_metrics(log.path)[2]["loss"] == 1.0


def test_values_that_json_lacks_become_null(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(0, {"loss": float("nan"), "grad_norm": float("inf"), "entropy": 1})
    record = read_metrics(log.path)[0]
    assert (record["loss"], record["grad_norm"], record["entropy"]) == (None, None, 1.0)


def test_resume_removes_the_updates_that_will_be_repeated(tmp_path):
    with MetricsLog(tmp_path) as log:
        for update in range(5):
            log.write(update, {"loss": float(update)})
    with log.path.open("ab") as file:
        file.write(b'{"update": 5, "lo')  # killed while writing
    with MetricsLog(tmp_path, resume_at=3) as log:
        log.write(3, {"loss": 30.0})
    assert [(r["update"], r["loss"]) for r in read_metrics(log.path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]


def test_damaged_lines_are_skipped_and_named_once(tmp_path, capsys):
    path, told = tmp_path / "metrics.jsonl", []
    bad = [b"nonsense", b"\0\0\0\0", b"\xff\xfe", b"[1]", b'{"loss": 1}', b"[" * 100_000]
    path.write_bytes(b"\n".join([b'{"update": 0}', *bad, b'{"update": 2}']) + b"\n")
    assert [record["update"] for record in read_metrics(path, warn=told.append)] == [0, 2]
    assert told == [f"{path}: 6 damaged lines are skipped (2, 3, 4, 5, 6, 7)"]
    read_metrics(path)
    assert capsys.readouterr().err == told[0] + "\n"


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\0" * 9 + b"\n", b'{"upda', b""])
def test_what_a_crash_leaves_at_the_end_is_no_damage(tmp_path, tail):
    path, told = tmp_path / "metrics.jsonl", []
    path.write_bytes(b'{"update": 0}\n{"update": 1}\n' + tail)
    assert [record["update"] for record in read_metrics(path, warn=told.append)] == [0, 1]
    assert told == []


def test_a_metric_without_meaning_fails_under_tests(tmp_path):
    with MetricsLog(tmp_path) as log, pytest.raises(KeyError, match="nameless"):
        log.write(0, {"nameless": 1.0})
    with MetricsLog(tmp_path, strict=False) as log:
        log.write(0, {"nameless": 1.0})
    assert [json.loads(line)["nameless"] for line in log.path.read_text().splitlines()] == [1.0]


def test_tensorboard_events_are_written_under_grouped_names(tmp_path):
    trackers = open_trackers(load_config("quickstart"), tmp_path, resume_at=None)
    with MetricsLog(tmp_path, trackers=trackers) as log:
        log.write(0, {"loss": 1.0, "seconds_rollout": 2.0})
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    assert b"loss/loss" in content and b"speed/seconds_rollout" in content


def test_every_metric_has_a_group():
    names = {name.replace("*", "x") for name in METRICS}
    groups = {grouped(name).partition("/")[0] for name in names}
    assert groups == {"episodes", "credit", "loss", "speed", "eval", "sft"}
    assert all(grouped(name).endswith(f"/{name}") for name in names)
    assert grouped("kl") == "loss/kl" and grouped("eval_env_x") == "eval/eval_env_x"
    assert grouped("env_x") == "episodes/env_x" and grouped("nameless") == "nameless"


def test_trackers_get_the_same_numbers_and_are_closed_once(tmp_path):
    calls = []
    tracker = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
    )
    with MetricsLog(tmp_path, trackers=[tracker]) as log:
        log.write(4, {"loss": 1.0})
        log.close()
    assert calls == [(4, {"loss/loss": 1.0}), "finish"]
