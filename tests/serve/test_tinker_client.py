"""The official client of the Tinker API against our server; it comes with the extra `tinker`."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.serve.servers import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tinker") is None,
    reason="the client is not installed: pip install -e '.[tinker]'",
)


def run(studio, *command):
    """Runs Python as a user of the client would."""
    environment = {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1", "TINKER_API_KEY": "tml-secret"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **environment, "TINKER_BASE_URL": studio.url},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_response_agrees_and_saved_weights_go_on(studio):
    assert run(studio, "-m", "tests.serve.tinker_scenes", "agree", "go_on") == "agree\ngo_on\n"


@pytest.mark.slow
def test_empg_is_computed_on_the_server_from_turns(studio):
    assert run(studio, "-m", "tests.serve.tinker_scenes", "credit") == "credit\n"


@pytest.mark.long
@pytest.mark.slow
def test_the_example_learns_in_25_steps(studio):
    printed = run(studio, "scripts/examples/tinker_client.py", "pupil")
    found = re.findall(r"step (\d+): reward ([\d.]+) of 8, log-prob gap ([\d.e-]+)", printed)
    assert len(found) == 25
    rewards, gaps = ([float(step[place]) for step in found] for place in (1, 2))
    assert rewards[0] < 0.6 and rewards[-1] > 3.5
    assert max(gaps) <= 1e-5
