"""Completion in a shell: typer's own scripts, and the names that they ask for."""

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from tests import runs


def complete(words, folder, *, shell="bash"):
    """What bash is told when Tab is pressed behind these words."""
    asked = {
        "_EMPG_JAX_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    code = "from empg_jax.cli import main; import sys; sys.argv[0] = 'empg-jax'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env={**os.environ, **asked}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("empg-jax new-", ["new-env", "new-algorithm"]),
        ("empg-jax train quicks", ["quickstart"]),
        ("empg-jax train my", ["my.yaml", "my_world/"]),
        ("empg-jax train quickstart train.upd", ["train.updates="]),
        ("empg-jax play alf", ["alfworld"]),
    ],
)
def test_names_are_completed(words, expected, tmp_path):
    (tmp_path / "my.yaml").touch()
    (tmp_path / "my.txt").touch()
    (tmp_path / "my_world").mkdir()
    assert complete(words, tmp_path) == expected


def test_values_are_completed():
    from empg_jax.cli.completing import complete_override

    assert complete_override("algorithm.modulation=") == [
        f"algorithm.modulation={each}" for each in ("none", "empg", "aem")
    ]
    assert complete_override("env.name=web") == ["env.name=webshop"]
    assert complete_override("no.such") == []


def test_the_script_of_a_shell_and_the_help_that_tells_of_it():
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'empg-jax'\nfrom empg_jax.cli import main; main()",
         "--show-completion", "bash"],
        cwd=runs.ROOT, env={**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "_EMPG_JAX_COMPLETE=complete_bash" in done.stdout, done.stderr
    told = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in told and "Tab key" in told
