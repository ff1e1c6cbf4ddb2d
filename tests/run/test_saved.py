"""What a command finds out about a run before it opens the run's checkpoint."""

from pathlib import Path

import pytest

from empg_jax.run import saved
from empg_jax.run.folder import checkpoint_dir
from tests import runs


def test_without_a_device_for_the_learner_its_mesh_is_left_alone(tmp_path, monkeypatch):
    """The engine's devices are what is too many then, and are refused by their own key."""
    config = runs.configure(tmp_path, "rollout.devices=4", "mesh.fsdp=4", "train.micro_tokens=768")
    monkeypatch.setattr(saved, "learner_devices", lambda config: [])
    assert saved._fit_mesh(config, pytest.fail) is config


def test_a_folder_of_checkpoints_at_home_is_at_home(tmp_path):
    config = runs.configure(tmp_path, "checkpoint.dir=~/checkpoints of a run")
    assert checkpoint_dir(config, tmp_path) == Path.home() / "checkpoints of a run"
    assert checkpoint_dir(runs.configure(tmp_path), tmp_path) == tmp_path / "checkpoints"
