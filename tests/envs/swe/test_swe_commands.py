"""The commands ``python -m empg_envs.swe.generate`` and ``.score``: bad input is one line and exit code 2."""

import subprocess
import sys

import pytest

from tests.runs import ROOT

PIP_FAILS = (
    "import subprocess, sys\n"
    "from empg_envs.swe import fetch, generate\n"
    "failed = subprocess.CompletedProcess([], 1, '', 'Looking for nope\\nERROR: No matching release\\n')\n"
    "fetch.subprocess.run = lambda *args, **kwargs: failed\n"
    "generate.main(sys.argv[1:])"
)


def refuse(*arguments):
    """Runs a command that must refuse; returns its line."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT / "envs",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "no folder or archive no/such/folder; a source is one of these, embedded:NAME or"),
        ("embedded:nope", "no embedded repository 'nope'"),
        ("pypi:toolz", "pypi:toolz names no release; expected pypi:NAME==VERSION"),
    ],
)
def test_generate_names_the_source_that_it_cannot_read(tmp_path, source, says):
    out = tmp_path / "tasks.jsonl"
    line = refuse("-m", "empg_envs.swe.generate", "embedded:spans", source, "--out", out)
    assert says in line and list(tmp_path.iterdir()) == []


def test_an_unknown_package_is_pips_last_word(tmp_path):
    kept = ["--sources", tmp_path / "sources"]
    line = refuse("-c", PIP_FAILS, "pypi:nope==1", "--out", tmp_path / "tasks.jsonl", *kept)
    assert line == "error: pip cannot download the source of nope 1: ERROR: No matching release\n"


def test_generate_looks_at_its_target_first(tmp_path):
    line = refuse("-m", "empg_envs.swe.generate", "embedded:spans", "--out", tmp_path / "no" / "tasks.jsonl")
    assert "there is no folder" in line and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no_tasks.jsonl", "gold"], "no_tasks.jsonl"),
        (["tiny", "no_predictions.jsonl"], "no_predictions.jsonl"),
        (["tiny", "gold", "--split", "tset"], "unknown split 'tset'; the splits are"),
        (["tiny", "gold", "--out", "no/such/report.json"], "there is no folder no/such"),
    ],
)
def test_score_names_what_it_cannot_read(arguments, says):
    assert says in refuse("-m", "empg_envs.swe.score", *arguments)
