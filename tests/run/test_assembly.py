"""From configuration to parts: every key of the algorithm reaches it."""

import pytest

from empg_jax.algorithms import ALGORITHMS, Recipe, parts
from empg_jax.algorithms.configure import spec_of
from empg_jax.algorithms.keys import flatten, written_out
from empg_jax.config import Config, load_config
from empg_jax.config.algorithm import AlgorithmConfig
from empg_jax.errors import ConfigError
from empg_jax.run import assembly, sampling
from tests import runs

# A value that differs from the default for every key of the section, and what else makes it act.
CHANGED = {
    "name": "rloo",
    "modulation": "aem",
    "entry_point": "tests.run.test_assembly:OWN",
    "empg": {"k": 2.0, "center": "token", "mixed_groups_only": True, "reverse": True, "shuffle_seed": 5},
    "aem": {"lam": 0.5, "mean": "token", "shuffle_seed": 3},
    "baseline": "none",
    "eps": 1e-5,
    "rows": "mean",
    "statistics": "step_rows",
    "anchor_similarity": 0.9,
    "turn_gamma": 0.8,
    "group_baseline": True,
    "overlong_factor": 0.5,
    "ratio_unit": "turn",
    "tau_pos": 2.0,
    "tau_neg": 3.0,
    "mask_truncated": "turn",
    "drop_void": "trajectory",
    "aggregation_unit": "trajectory",
    "loss": "cispo",
    "aggregation": "seq-mean-token-mean",
    "loss_scale": 7.0,
    "clip_low": 0.1,
    "clip_high": 0.3,
    "dual_clip": 5.0,
    "kl_coef": 0.1,
    "kl_kind": "k2",
    "reward_kl_coef": 0.1,
    "entropy_coef": 0.01,
    "scale_by_std": False,
    "singleton": "raw",
    "omega": 0.5,
    "gamma": 0.9,
    "critic": {"lam": 0.9, "value_coef": 1.0, "value_clip": 0.2, "learning_rate": 0.1, "bootstrap": True},
    "overlong_length": 9,
    "overlong_cache": 3,
    "correction": {
        **{"kind": "mis", "level": "sequence", "low": 0.9, "high": 1.1, "sequence_delta": 0.2},
        "sequence_logprobs": "learner",
    },
    "hgpo": {"history": 1, "alpha": 2.0, "level_offset": 3.0, "drop_zeros": False, "base_group": True},
    "graph": {"beta": 0.5, "weight": 2.0},
    "milestone_weight": 0.5,
    "milestone_scale": 5.0,
    "gain_statistics": "separate",
    "gain_kind": "logprob",
    "gain_weight": 0.6,
    "gain_clip_range": 0.1,
    "turn_lam": 0.7,
    "gagpo_normalize": "none",
    "turn_ratio": "product",
    "drop_uniform": "group",
}
NOT_OF_THE_RECIPE = {"entropy_source"}  # of scoring
NEEDS = {
    "loss_scale": {"aggregation": "seq-mean-token-sum-norm"},
    "omega": {"name": "gigpo"},
    "gamma": {"name": "reinforce_pp"},
    "aem": {"modulation": "aem"},
    "empg": {"modulation": "empg"},
    "baseline": {"name": "reinforce"},
    "rows": {"name": "grpo_turn_rows"},
    "statistics": {"name": "gigpo"},
    "anchor_similarity": {"name": "gigpo"},
    "turn_gamma": {"name": "gigpo"},
    "group_baseline": {"name": "reinforce_pp"},
    "kl_kind": {"kl_coef": 0.1},
    "overlong_factor": {"overlong_length": 9, "overlong_cache": 3},
    "ratio_unit": {"loss": "gspo"},
    "tau_pos": {"name": "sapo"},
    "tau_neg": {"name": "sapo"},
    "aggregation_unit": {"aggregation": "seq-mean-token-mean"},
    "reward_kl_coef": {"name": "reinforce_pp"},
    "critic": {"name": "ppo"},
    "overlong_length": {"overlong_cache": 3},
    "overlong_cache": {"overlong_length": 9},
    "correction": {"entropy_source": "learner"},
    "hgpo": {"name": "hgpo"},
    "graph": {"name": "crbc"},
    "milestone_weight": {"name": "beacon"},
    "milestone_scale": {"name": "beacon"},
    "gain_statistics": {"name": "igpo"},
    "gain_kind": {"name": "igpo"},
    "gain_weight": {"name": "a2tgpo"},
    "gain_clip_range": {"name": "a2tgpo"},
    "turn_lam": {"name": "gagpo"},
    "gagpo_normalize": {"name": "gagpo"},
    "turn_ratio": {"loss": "turn_ratio_clip"},
}


OWN = Recipe(
    estimate=parts.gigpo(omega=0.25),
    penalise=(parts.turn_penalty(0.2), parts.overlong(40, 20)),
    modulate=parts.aem(lam=0.75),
    correct=(parts.tis(cap=3.0), parts.sequence_mask(delta=0.5)),
    keep=parts.mask_truncated(unit="trajectory"),
    kl=parts.kl(0.01, kind="k2"),
    entropy_coef=0.03,
)


def built(overrides):
    """The keys that the parts of the composed recipe were made with."""
    recipe = assembly.make_recipe_from(load_config("quickstart", overrides))
    keys = written_out(spec_of(recipe)) | {"entropy_coef": recipe.entropy_coef}
    return keys | {"name": recipe.estimate.name}


def test_every_key_of_the_section_is_covered():
    assert CHANGED.keys() == AlgorithmConfig.model_fields.keys() - NOT_OF_THE_RECIPE


@pytest.mark.parametrize("key", [key for key in CHANGED if key != "entry_point"])
def test_every_key_reaches_the_algorithm(key):
    values = {key: CHANGED[key]} | NEEDS.get(key, {})
    found = built([f"algorithm.{k}={v}" for k, v in values.items()])
    for k, v in flatten(values).items():
        if k not in NOT_OF_THE_RECIPE and (k, v) != ("name", "sapo"):
            assert found[k] == v, k


def test_a_recipe_of_ones_own_keeps_its_parts_and_takes_keys():
    entry = ["algorithm.entry_point=tests.run.test_assembly:OWN", "algorithm.entropy_source=learner"]
    assert built(entry) == written_out(spec_of(OWN)) | {"name": "gigpo"}
    found = built(entry)
    assert (found["omega"], found["aem.lam"], found["correction.cap"]) == (0.25, 0.75, 3.0)
    assert built([*entry, "env.invalid_penalty=0.3"])["invalid_penalty"] == 0.3
    assert "mask_truncated" not in built([*entry, "algorithm.mask_truncated=none"])
    found = built([*entry, "algorithm.aem.lam=0.5", "algorithm.modulation=aem", "algorithm.clip_high=0.3"])
    assert (found["omega"], found["aem.lam"], found["clip_high"]) == (0.25, 0.5, 0.3)


def test_the_size_of_groups_is_told():
    overrides = ["rollout.group_size=1", "algorithm.name=reinforce_aem"]
    with pytest.warns(UserWarning, match="falls back"):
        assembly.make_algorithm_from(load_config("quickstart", overrides))
    assert "batch" in assembly.describe_algorithm(load_config("quickstart", overrides))


def test_aem_on_single_attempts_warns():
    overrides = ["rollout.group_size=1", "algorithm.name=reinforce", "algorithm.modulation=aem"]
    with pytest.warns(UserWarning, match="falls back"):
        assembly.make_algorithm_from(load_config("quickstart", overrides))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_can_be_built_from_its_name(name):
    config = Config(algorithm={"name": name})
    assert assembly.make_algorithm_from(config).credit is not None
    assert assembly.needs_reference(config) == name.startswith("reinforce_pp") - ("baseline" in name)


@pytest.mark.parametrize(
    "overrides, says",
    [(["rollout.data=3"], "do not split over rollout.data=3"), (["rollout.tensor=64"], "rollout.tensor")],
)
def test_an_engine_that_does_not_fit_its_devices_is_refused(overrides, says):
    config = load_config("quickstart", overrides)
    tokenizer = assembly.make_language(config).tokenizer
    with pytest.raises(ConfigError, match=says):
        sampling.make_engine(config, assembly.make_model(config, tokenizer), tokenizer.stop_ids)


@pytest.mark.parametrize(("is_deterministic", "rows"), [(True, (4,)), (False, (1, 4))])
def test_deterministic_rollouts_prefill_by_one_program(is_deterministic, rows):
    """Programs for other numbers of rows round differently: who is prefilled together must not matter."""
    config = runs.configure("unused", f"rollout.deterministic={is_deterministic}".lower())
    tokenizer = assembly.make_language(config).tokenizer
    engine = sampling.make_engine(config, assembly.make_model(config, tokenizer), tokenizer.stop_ids)
    assert engine.config.row_buckets == rows


@pytest.mark.parametrize(
    ("config", "overrides", "outcome"),
    [
        ("swe_tiny", [], "zero"),  # its agents can bring an overrun about
        ("swe_verified", [], "zero"),
        ("swe_tiny", ["env.timeout_outcome=discard"], "discard"),
        ("quickstart", [], "discard"),
        ("quickstart", ["env.timeout_outcome=zero"], "zero"),
    ],
)
def test_an_overrun_is_treated_as_the_environment_declares(config, overrides, outcome):
    assert sampling.make_rules(load_config(config, overrides)).timeout_outcome == outcome
