"""Keys that would do nothing, or something else than they say, are refused; the others do what they say."""

import numpy as np
import pytest

from empg_jax.algorithms import make_recipe
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.run.assembly import make_recipe_from, make_rl_optimizer, make_sft_optimizer

ALONE = "rollout.group_size=1"
REFUSED = {
    (ALONE, "algorithm.name=reinforce_pp_baseline"): r"group_size=1 with algorithm\.group_baseline=true",
    (ALONE, "algorithm.name=reinforce_pp", "algorithm.group_baseline=true"): r"with .*group_baseline=true",
    (
        ALONE,
        "algorithm.name=reinforce",
        "algorithm.drop_uniform=group",
    ): r"with algorithm\.drop_uniform=group",
    (
        ALONE,
        "algorithm.name=ppo_empg",
        "algorithm.empg.mixed_groups_only=true",
    ): r"with algorithm\.empg\.mixed_groups_only=true: it compares the attempts of one task",
    ("train.learning_rate=1e-6",): r"final_learning_rate=5e-05 is above train\.learning_rate=1e-06",
    ("sft.learning_rate=1e-5", "sft.final_learning_rate=1e-4"): r"sft\.final_learning_rate=0\.0001 is above",
    (
        "algorithm.name=erc",
        "model.dtype=bfloat16",
    ): r"source=engine: .* by rounding with model\.dtype=bfloat16",
    (
        "algorithm.name=gigpo",
        "algorithm.anchor_similarity=0.9",
        "env.anchor=state",
    ): r"anchor_similarity=0\.9, which compares observations",
    ("sft.holdout=0.5",): r"sft\.holdout=0\.5 has no effect without sft\.data",
    ("sft.eval_every=3",): r"sft\.eval_every=3 has no effect without sft\.data",
    ("train.on_kl=stop",): r"train\.on_kl=stop has no effect without train\.max_kl",
    ("train.num_minibatches=1", "train.max_kl=0.1"): r"max_kl=0\.1 has no effect with one optimizer step",
    (
        "algorithm.name=ppo",
        "algorithm.critic.warmup_updates=180",
    ): r"the policy none of train\.updates=180",
    ("algorithm.eps=0",): r"algorithm\.eps=0: must be greater than 0",
    (
        "algorithm.correction.sequence_delta=0.1",
        "algorithm.correction.sequence_logprobs=learner",
    ): r"sequence_logprobs=learner compares learner and sampler.*entropy_source=learner",
}


@pytest.mark.parametrize("keys", REFUSED, ids=" ".join)
def test_what_would_do_nothing_is_refused(keys):
    with pytest.raises(ConfigError, match=REFUSED[keys]):
        load_config("quickstart", list(keys))


@pytest.mark.parametrize(("steps", "told"), [(1, ["entropy_low", "entropy_high"]), (4, [])])
def test_bands_that_every_step_is_in_are_told(steps, told):
    config = load_config("quickstart", ["algorithm.name=erc", f"train.num_minibatches={steps}"])
    notes = [note for note in config.notes if "no effect with one optimizer step per update" in note]
    assert [note.partition("=")[0] for note in notes] == [f"algorithm.correction.{key}" for key in told]


TOLD = {
    ("train.schedule=constant",): [
        "train.final_learning_rate=5e-05 has no effect with train.schedule=constant"
    ],
    ("train.schedule=constant", "train.final_learning_rate=null"): [],
    ("env.context=transcript", "env.history=5"): ["env.history=5 has no effect with env.context=transcript"],
    ("env.context=window", "env.history=5"): [],
    ("model.lora.alpha=64", "model.lora.targets=q_proj"): [
        "model.lora.alpha=64 has no effect with model.lora.rank=0",
        "model.lora.targets=['q_proj'] has no effect with model.lora.rank=0",
    ],
    ("model.lora.alpha=64", "model.lora.rank=4"): [],
}


@pytest.mark.parametrize("keys", TOLD, ids=" ".join)
def test_what_others_switch_off_is_told(keys):
    notes = [note for note in load_config("quickstart", list(keys)).notes if "no effect" in note]
    assert len(notes) == len(TOLD[keys])
    assert all(note.startswith(told) for note, told in zip(notes, TOLD[keys], strict=True)), notes


def test_the_rate_falls_from_its_peak():
    keys = ["train.learning_rate=1e-6", "train.final_learning_rate=null", "train.warmup_updates=0"]
    config = load_config("quickstart", keys)
    schedule = make_rl_optimizer(config)[1]
    steps = config.train.updates * config.train.num_minibatches * config.train.epochs
    rates = np.asarray([schedule(step) for step in (0, steps // 2, steps)])
    np.testing.assert_allclose(rates[[0, -1]], [1e-6, 5e-8], rtol=1e-4)
    assert np.all(np.diff(rates) < 0)


def test_the_warm_start_heeds_what_is_said_of_the_optimizer():
    params = {"kernel": np.ones(2, np.float32), "bias": np.ones(2, np.float32)}

    def change(*keys):
        """What two steps with gradients of 1 and 0 make of the parameters."""
        config = load_config("quickstart", ["sft.learning_rate=0.1", *keys])
        optimizer, _ = make_sft_optimizer(config)
        state, total = optimizer.init(params), np.zeros(2)
        for gradient in (1.0, 0.0):
            gradients = {name: np.full_like(each, gradient) for name, each in params.items()}
            steps, state = optimizer.update(gradients, state, params)
            total += np.asarray([steps["kernel"][0], steps["bias"][0]])
        return total

    plain = change()
    assert plain == pytest.approx(change("train.beta1=0.9", "train.weight_decay=0"))
    assert np.all(np.abs(change("train.beta1=0.5") - plain) > 0.01)
    kernel, bias = change("train.weight_decay=0.2") - plain
    assert kernel == pytest.approx(-2 * 0.1 * 0.2, rel=0.01) and bias == pytest.approx(0, abs=1e-6)


def test_a_correction_is_left_out_alone():
    keys = ["algorithm.name=erc", "algorithm.correction.kind=none", "algorithm.correction.sequence_delta=0.1"]
    kept = [part.name for part in make_recipe_from(load_config("quickstart", keys)).correct]
    assert sorted(kept) == ["entropy_ratio", "sequence_mask"]


def test_the_divisor_of_dr_grpo_does_not_depend_on_shared_beginnings():
    for keys in (["train.share_prefix=true"], []):
        config = load_config("quickstart", ["algorithm.name=dr_grpo", *keys])
        assert make_recipe_from(config).aggregate.options["scale"] == config.rollout.max_tokens


def test_a_group_of_one_may_keep_its_raw_return():
    keys = ["rollout.group_size=1", "algorithm.name=grpo", "rollout.min_group_size=null"]
    with pytest.raises(ConfigError, match="the policy would learn nothing"):
        load_config("quickstart", keys)
    load_config("quickstart", [*keys, "algorithm.singleton=raw"])


def test_single_attempts_train_where_nothing_compares_them():
    keys = ["algorithm.name=reinforce_pp_baseline", "algorithm.group_baseline=false"]
    assert not load_config("quickstart", [ALONE, *keys]).algorithm.group_baseline
    load_config("quickstart", [ALONE, "algorithm.name=ppo_aem"])


def test_entropies_of_both_sides_are_compared_where_they_agree():
    keys = ["algorithm.name=erc"]
    assert load_config("quickstart", keys).algorithm.entropy_source == "engine"  # in float32
    load_config("quickstart", [*keys, "model.dtype=bfloat16", "algorithm.entropy_source=learner"])


def test_a_name_with_a_modulation_has_it():
    with pytest.raises(ValueError, match="'grpo_empg' means 'empg', and modulation is 'none'"):
        make_recipe("grpo_empg", {"modulation": "none"})


def test_null_of_both_keys_leaves_the_penalty_out():
    own = make_recipe("grpo", {"overlong_length": 40, "overlong_cache": 20})
    assert [part.name for part in own.penalise] == ["overlong"]
    assert make_recipe(own, {"overlong_length": None, "overlong_cache": None}).penalise == ()
    assert [part.name for part in make_recipe(own, {"overlong_length": None}).penalise] == ["overlong"]
