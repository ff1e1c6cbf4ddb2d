"""What a witness in the process of the tests says, and what follows from a log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from empg_envs.swe import reports
from empg_envs.swe.guest import witness
from empg_envs.swe.imaged import Suite
from empg_envs.swe.judge.logs import LogSession
from empg_envs.swe.sandbox import ExecResult

NONCE = "5a5a5a5a5a5a5a5a"
TESTS = """
import os, subprocess, sys

def test_good():
    assert "PYTEST_ADDOPTS" not in os.environ  # a pytest of the tests' own has no witness
    assert sys.stdin is None or not os.read(0, 10)  # and nobody reads the secret again

def test_bad():
    print("PASSED test_x.py::test_bad")
    assert os.environ.get("LEAVE") != "1" or os._exit(0)
    assert 0
"""


def run(folder: Path, **env: str) -> LogSession:
    """Run tests as in a container."""
    (folder / "test_x.py").write_text(TESTS)
    (folder / f"{witness.MODULE}.py").write_bytes(Path(witness.__file__).read_bytes())
    given = {"PYTHONPATH": str(folder), "PYTEST_ADDOPTS": f"-p {witness.MODULE}", **env}
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "test_x.py"],
        cwd=folder,
        env={**os.environ, **given},
        input=NONCE.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    result = ExecResult(found.stdout.decode(), found.returncode)
    return LogSession(result, reports.parse_pytest, found.returncode, NONCE)


def test_the_witness_has_the_last_word(tmp_path: Path) -> None:
    session = run(tmp_path)
    assert session.statuses["test_x.py::test_good"] == "PASSED"
    assert (session.end, session.is_sound) == (1, True)
    left = run(tmp_path, LEAVE="1")
    assert (left.end, left.is_sound) == (None, False)
    assert left.doubts() == ["early exit: code 0 before the end of the tests"]


LOG = "PASSED a.py::test_a\n"


@pytest.mark.parametrize(
    ("log", "code", "reason", "is_sound", "doubt"),
    [
        (f"{LOG}{NONCE} 0\n", 0, "exit", True, ""),
        (f"{LOG}{NONCE} 1\n", 0, "exit", True, "exit code 0 does not fit the end of the tests, 1"),
        (f"{LOG}{'0' * 16} 0\n", 0, "exit", False, "early exit"),  # another's secret
        (LOG, 4, "exit", False, ""),  # pytest could not begin: honest
        (LOG, -9, "timeout", False, ""),
        (f"{LOG}FAILED a.py::test_a\n{NONCE} 0\n", 0, "exit", True, "contradiction"),
    ],
)
def test_logs(log: str, code: int, reason: str, is_sound: bool, doubt: str) -> None:
    session = LogSession(ExecResult(log, code, reason), reports.parse_pytest, code, NONCE)
    assert session.is_sound == is_sound
    found = session.doubts()
    assert found[0].startswith(doubt) if doubt else not found


def test_the_second_session_runs_no_others_of_its_files() -> None:
    suite = Suite("pytest -rA", ("tests",), reports.parse_pytest, True, True, "o/r")
    names = ["a.py::test_x[1 - y]", "a.py::A::test_z"]
    assert suite.line(["a.py"], names).endswith("pytest -rA 'a.py::test_x[1 - y]' a.py::A::test_z 2>&1")
    # By their files: names that are cut off, and runners that do not take names.
    assert suite.line(["a.py"], ["a.py::test_x[1"]).endswith("pytest -rA a.py 2>&1")
    django = Suite("runtests.py", (), reports.parse_django, True, False, "django/django")
    assert django.line(["tests/a/t.py"], ["test_x (a.t.T)"]) == "runtests.py a.t 2>&1"
    assert suite.line([], names).endswith("pytest -rA tests 2>&1")
