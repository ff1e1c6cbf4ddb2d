"""Whole runs of what needs more than a loss: a critic, dynamic sampling, the drift of the entropy."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax import trainer
from empg_jax.algorithms import Recipe, parts
from empg_jax.config import load_config
from empg_jax.models.decoder import init_params
from empg_jax.rollout.episode import anchor_of
from empg_jax.run import assembly, weights
from tests import runs
from tests.moments import Moments

STEADY = [*runs.HOUSE, "rollout.deterministic=true", "checkpoint.keep=9", "sft.updates=0"]
PPO = ["algorithm.name=ppo", "rollout.group_size=1", "rollout.tasks_per_update=4"]
# The critic's head has an optimizer of its own, which is saved and restored with the rest.
PPO += ["algorithm.critic.learning_rate=0.01", "algorithm.critic.warmup_updates=1"]
DAPO = ["algorithm.name=dapo", "rollout.max_refills=3"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [PPO, pytest.param(DAPO, marks=pytest.mark.long)], ids=["ppo", "dapo"])
def test_a_stopped_and_resumed_run_equals_the_whole_one(tmp_path, monkeypatch, options):
    moments = Moments(monkeypatch)
    whole = runs.train(tmp_path / "whole", *STEADY, *options)
    moments.at, moments.passed = moments.passed // 2, 0
    with pytest.raises(trainer.Stopped):
        runs.train(tmp_path / "cut", *STEADY, *options)
    moments.at = None
    runs.resume(tmp_path / "cut")
    assert runs.lines(tmp_path / "cut") == runs.lines(whole)
    weights = runs.weights(whole)
    assert runs.weights(tmp_path / "cut") == weights
    lines = runs.lines(whole)
    assert all(line["recompiles"] == 0 for line in lines)
    if options is PPO:
        head = np.frombuffer(weights[".params['value_head']['kernel']"], np.float32)
        assert head.shape == (32,) and head.any()  # it began at zero
        assert all(line["value_loss"] > 0 and line["explained_variance"] <= 1 for line in lines)
    else:
        assert all(line["groups_uniform"] == 0 or line["groups_replaced"] == 3 * 2 for line in lines)
        assert all(line["mixed_groups"] == 1 - line["groups_uniform"] / 2 for line in lines)
        assert any(line["groups_replaced"] > 0 for line in lines)


@pytest.mark.slow
def test_credit_compares_the_states_that_the_environment_tells(tmp_path):
    options = ["algorithm.name=crbc", "env.anchor=state", "sft.updates=0", "train.updates=1", "eval.tasks=2"]
    folder = runs.train(tmp_path / "run", *options, "log.rollouts_every=1")
    (path,) = (folder / "rollouts").glob("*.jsonl.gz")
    with gzip.open(path, "rt") as file:
        episodes = [json.loads(line) for line in file]
    turns = [turn for episode in episodes for turn in episode["turns"]]
    assert all(turn["anchor"] != f"{anchor_of(turn['observation']):016x}" for turn in turns)
    assert len({turn["anchor"] for turn in turns}) < len(turns)  # a group's first states are one


@pytest.mark.slow
def test_a_recipe_of_ones_own_is_trained_and_named_first(tmp_path, capfd):
    own = ["algorithm.entry_point=tests.test_algorithm_runs:OWN", "algorithm.empg.zeta=0.3"]
    folder = runs.train(tmp_path / "own", *STEADY, *own, "train.updates=1", "eval.tasks=2")
    err = capfd.readouterr().err
    assert err.splitlines()[0].startswith(
        "tests.test_algorithm_runs:OWN + EMPG (k=1, k'=1, zeta=0.3, batch); "
    )
    (line,) = runs.lines(folder)
    assert np.isfinite(line["loss"]) and line["modulation_max"] >= 1
    packaged = runs.configure(tmp_path / "x", "algorithm.name=grpo")
    assert packaged.notes[0].startswith("algorithm.empg.zeta=0.05 of quickstart.yaml is dropped")


def own_estimator(batch, scores, worth):
    """The return less the batch's mean: what a user would write."""
    mean = jnp.sum(worth.returns) / jnp.maximum(jnp.sum(batch.group_ids >= 0, dtype=jnp.float32), 1)
    return jnp.broadcast_to((worth.returns - mean)[:, None], worth.mask.shape)


OWN = Recipe(estimate=own_estimator, modulate=parts.empg())


@pytest.mark.slow
def test_the_drift_of_the_entropy_is_measured_after_the_update(tmp_path):
    """Only every other update; measuring changes nothing of the run itself."""
    plain = runs.train(tmp_path / "plain", *STEADY)
    measured = runs.train(tmp_path / "measured", *STEADY, "log.drift_every=2")
    assert runs.weights(plain) == runs.weights(measured)
    drifts = [line.get("entropy_drift_measured") for line in runs.lines(measured)]
    assert drifts[1] is None and all(np.isfinite(drifts[i]) for i in (0, 2))
    for line, drift in zip(runs.lines(measured), drifts, strict=True):
        assert drift is None or (drift != 0) == (line["grad_norm"] > 0)
    assert all("entropy_drift_predicted" in line for line in runs.lines(measured))
    assert not any("entropy_drift_measured" in line for line in runs.lines(plain))
    assert all(line["recompiles"] == 0 for line in runs.lines(measured))


def test_a_critic_starts_from_weights_without_one(tmp_path, monkeypatch):
    config = load_config("quickstart", ["algorithm.name=ppo", "model.path=somewhere"])
    model = assembly.make_model(load_config("quickstart", ["algorithm.name=ppo"]), _Vocabulary())
    whole = init_params(jax.random.key(0), model)
    bare = {name: part for name, part in whole.items() if name != "value_head"}
    monkeypatch.setattr(weights, "load_hf", lambda *args, **options: (model, dict(bare)))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = weights.make_params(config, model, jax.tree.map(lambda _: place, whole))
    assert jax.tree.structure(params) == jax.tree.structure(whole)


class _Vocabulary:
    vocab_size = 50
