"""The conformance kit: its judgment and its table, and its two cheapest surfaces as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import check_wire
import pytest

from tests.adapters.needs import need


def test_a_reward_must_rise_and_sampler_and_learner_agree():
    assert check_wire.judge(0.5, 0.5, 1e-6) == "ok"
    assert "rose by 0.10 (at least 0.5)" in check_wire.judge(0.1, 0.5, 1e-6)
    assert "differ by 1.0e-02 nats" in check_wire.judge(0.5, 0.5, 1e-2)
    for gap, rise in ((float("nan"), 1.0), (0.0, float("nan"))):
        assert check_wire.judge(rise, 0.5, gap).startswith("FAILED")


def test_an_absent_package_is_skipped_and_a_failure_leaves_the_others(monkeypatch, capsys, tmp_path):
    def fail(kit):
        raise RuntimeError("the server did not start")

    def learn(kit):
        return check_wire.Found([0.0, 0.1, 0.5, 0.9], 1e-6)

    surfaces = {
        "absent": check_wire.Surface("no-such-package", "adapters", 0.5, fail),
        "broken": check_wire.Surface("numpy", "test", 0.5, fail),
        "fine": check_wire.Surface("numpy", "test", 0.5, learn),
    }
    monkeypatch.setattr(check_wire, "SURFACES", surfaces)
    out = tmp_path / "wire.json"
    assert check_wire.main(["--out", str(out)]) == 1
    absent, broken, fine = json.loads(out.read_text())
    assert absent["verdict"] == "skipped: pip install -e '.[adapters]'"
    assert broken["verdict"] == "FAILED: RuntimeError: the server did not start"
    assert (fine["verdict"], fine["steps"], fine["first"], fine["last"]) == ("ok", 4, 0.0, 0.9)
    assert "0.00 → 0.90" in capsys.readouterr().out
    assert check_wire.main(["--only", "fine", "--only", "absent"]) == 0


@pytest.mark.slow
@pytest.mark.long
def test_rewards_rise_through_a_program_and_through_openenv(tmp_path):
    need("gymnasium", "websockets")
    out = tmp_path / "wire.json"
    command = [sys.executable, check_wire.__file__, "--only", "harness", "--only", "openenv", "--out", out]
    done = subprocess.run(
        list(map(str, command)), cwd=Path(tmp_path), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line["verdict"] for line in json.loads(out.read_text())] == ["ok", "ok"]
