"""A run that was copied or moved, and one that goes on where the disk is full."""

import errno
import os
import shutil

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from tests import runs

SHORT = [*runs.HOUSE, "sft.updates=0", "eval.tasks=2", "train.updates=2"]


def call(*arguments):
    """Exit code and stderr of ``empg-jax``."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def content(folder):
    """Every file below a folder, by its path, with what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return runs.train(tmp_path_factory.mktemp("copied") / "whole", *SHORT)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_copy_leaves_the_checkpoints_of_its_original_alone(here):
    original, place, copy = here / "original", here / "place", here / "copy"
    runs.train(original, *SHORT, "checkpoint.dir=place")
    shutil.copytree(original, copy)
    before = content(here)
    again = ["train", "--resume", copy, "--step", 1, "train.updates=3"]
    code, err = call(*again)
    assert code == 2 and f"checkpoint.dir={place} belongs to the run {original}, not to {copy}: " in err
    assert "Traceback" not in err and content(here) == before
    code, err = call(*again, "checkpoint.dir=plcae")
    assert code == 2 and f"{here / 'plcae'} has no checkpoint 1" in err
    code, err = call("train", "--resume", copy, "train.updates=3", "checkpoint.dir=plcae")
    assert code == 1 and f"no usable checkpoint in {here / 'plcae'}" in err
    assert {path: text for path, text in content(here).items() if path in before} == before

    shutil.copytree(place, here / "second")  # what the refusal advises
    code, err = call(*again, "checkpoint.dir=second")
    assert code == 0, err
    assert steps(place) == [0, 1, 2] and steps(here / "second") == [1, 2, 3]
    assert {path: text for path, text in content(place).items() if path in before} == content(place)
    code, err = call("train", "--resume", copy, "train.updates=4")  # it keeps the folder
    assert code == 0 and steps(here / "second") == [2, 3, 4], err

    original.rename(here / "moved")
    code, err = call("train", "--resume", here / "moved", "train.updates=3")
    assert code == 0 and steps(place) == [1, 2, 3], err
    place.rename(here / "away")
    code, err = call("train", "--resume", here / "moved", "train.updates=4", "checkpoint.dir=away")
    assert code == 0 and steps(here / "away") == [2, 3, 4], err


def _find_no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("call_that_fails", "says", "exit_code"),
    [
        ("pwrite", "run.lock cannot be written", 2),
        ("fsync", "config.yaml or environment.1.json cannot be", 1),
    ],
)
def test_a_full_disk_refuses_a_resume_in_a_line(here, monkeypatch, whole, call_that_fails, says, exit_code):
    run = shutil.copytree(whole, here / "run")
    before = content(run)
    monkeypatch.setattr(os, call_that_fails, _find_no_space)
    code, err = call("train", "--resume", run, "train.updates=3")
    assert code == exit_code and f"{says}" in err and "No space left on device" in err
    assert content(run) == before
