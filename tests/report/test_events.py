"""The diary: one line per happening, whatever a crash did to the last one."""

import json

import pytest

from empg_jax.metrics import read_metrics
from empg_jax.report.events import EventLog


def test_an_event_is_one_line(tmp_path):
    with EventLog(tmp_path) as log:
        log.tell("stop_requested", signal=15)
        log.update = 3
        log.tell("worker_restarted", worker=0, reason="timeout", detail="Tür\nzu")
        log.tell("odd", value=float("nan"), detail="half \udc80")
    first, second, third = read_metrics(log.path)
    assert first.pop("time") <= second["time"]
    assert first == {"update": 0, "event": "stop_requested", "signal": 15}
    assert (second["update"], second["event"], second["detail"]) == (3, "worker_restarted", "Tür\nzu")
    assert third["value"] is None and third["detail"] == "half \udc80"


@pytest.mark.parametrize("rest", [b"", b'{"time": 5, "ev', b"\x00\x00\x00"])
def test_lines_are_added_after_a_crash(tmp_path, rest):
    with EventLog(tmp_path) as log:
        log.tell("rollback")
    with log.path.open("ab") as file:
        file.write(rest)
    with EventLog(tmp_path) as log:
        log.tell("stop_requested")
    assert [json.loads(line)["event"] for line in log.path.read_text().splitlines()] == [
        "rollback",
        "stop_requested",
    ]
