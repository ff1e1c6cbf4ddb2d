"""Whole runs that train adapters: with a reference, on quantized weights, stopped, resumed, evaluated."""

import json

import jax
import numpy as np
import pytest

from empg_jax import trainer
from empg_jax.errors import ConfigError, Interrupted
from empg_jax.evaluate import evaluate_run
from empg_jax.learner.fingerprint import checksum
from empg_jax.models.lora import combine
from empg_jax.run.checkpoint import CheckpointError
from empg_jax.run.saved import open_saved
from tests import runs

pytestmark = pytest.mark.slow

ADAPTERS = [
    *runs.HOUSE,
    "model.lora.rank=4",
    "model.quantize=int8",
    "algorithm.kl_coef=0.01",
    "train.updates=2",
    "rollout.deterministic=true",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A warm start on adapters, then RL with a KL term."""
    return runs.train(tmp_path_factory.mktemp("lora") / "run", *ADAPTERS)


@pytest.mark.long
def test_a_run_that_stops_before_its_first_boundary_goes_on(tmp_path, monkeypatch):
    """What is saved then names the base below the adapters, too."""

    def stop(*_, **__):
        raise Interrupted

    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(trainer.Stopped):
        patch.setattr("empg_jax.sft.phase.gather_examples", stop)
        runs.train(run, *ADAPTERS, "train.updates=1")
    runs.resume(run)
    assert [line["update"] for line in runs.lines(run)] == [1]


def test_checkpoints_hold_adapters_only(run_dir):
    state = runs.restored(run_dir).state
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert names == {"lora_a", "lora_b"}
    assert any(np.any(leaf) for leaf in jax.tree.leaves(state.params))
    biggest = max(leaf.size for leaf in jax.tree.leaves(state))
    assert biggest <= 64 * 4  # no matrix of the base, and no moment of one


def test_the_base_is_what_the_run_began_with(run_dir):
    saved = open_saved(run_dir, [], warn=print)
    assert runs.restored(run_dir).progress["base"] == checksum(saved.base)
    combined = combine(saved.base, saved.params)
    assert combined["layers"]["q_proj"].keys() == {"kernel_int8", "kernel_scale", "bias", "lora_a", "lora_b"}


def test_sampler_and_learner_agree(run_dir):
    """The engine samples from base and adapters: what it records is what the learner computes."""
    gaps = [line["logprob_gap_max"] for line in runs.lines(run_dir) if "logprob_gap_max" in line]
    assert gaps and max(gaps) < 1e-4


def test_nothing_compiles_after_the_warm_up(run_dir):
    assert json.loads((run_dir / "summary.json").read_text())["recompiles_after_warmup"] == 0


@pytest.mark.long
def test_resumed_equals_uninterrupted(run_dir, tmp_path):
    first = runs.train(tmp_path / "run", *ADAPTERS[:-2], "train.updates=1", "rollout.deterministic=true")
    resumed = runs.resume(first, "train.updates=2")
    assert runs.weights(resumed) == runs.weights(run_dir)
    assert runs.lines(resumed)[-1] == runs.lines(run_dir)[-1]


def test_another_base_is_refused(run_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"belong to the base .* but the model at hand is"):
        open_saved(run_dir, ["seed=7"], warn=print)


def test_it_can_be_evaluated(run_dir):
    result = evaluate_run(run_dir, ["eval.tasks=4"])
    assert result["step"] == 2 and 0 <= result["eval_success"] <= 1


def test_impossible_adapters_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model\.quantize=nf4 is for frozen weights; .*model\.lora\.rank=16"
    ):
        runs.configure(tmp_path / "run", "model.quantize=nf4")
    config = runs.configure(tmp_path / "run", *runs.HOUSE, "model.lora.rank=2", "model.lora.targets=[wq]")
    with pytest.raises(ConfigError, match="LoRA target wq fits no linear layer; the model has down_proj"):
        trainer.train(config)
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_configuration_says_what_is_adapted(run_dir):
    assert "targets:\n    - '*_proj'" in (run_dir / "config.yaml").read_text()
    assert json.loads((run_dir / "summary.json").read_text())["updates"] == 2
