"""From configuration to parts: every key of the algorithm reaches it."""

import pytest

from empg_jax.algorithms import ALGORITHMS
from empg_jax.config import Config, load_config
from empg_jax.config.algorithm import AlgorithmConfig
from empg_jax.errors import ConfigError
from empg_jax.run import assembly

# A value that differs from the default for every key of the section, and what else makes it act.
CHANGED = {
    "name": "rloo",
    "modulation": "aem",
    "empg": {"k": 2.0, "center": "token", "mixed_groups_only": True},
    "aem": {"lam": 0.5, "mean": "token", "shuffle_seed": 3},
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
    "critic": {"lam": 0.9, "value_coef": 1.0, "value_clip": 0.2},
    "overlong_length": 9,
    "overlong_cache": 3,
    "correction": {"kind": "mis", "level": "sequence", "low": 0.9, "high": 1.1, "sequence_delta": 0.2},
}
NOT_OF_THE_RECIPE = {"turn_gamma", "entropy_source"}  # of batching and of scoring
NEEDS = {
    "loss_scale": {"aggregation": "seq-mean-token-sum-norm"},
    "omega": {"name": "gigpo"},
    "gamma": {"name": "reinforce_pp"},
    "reward_kl_coef": {"name": "reinforce_pp"},
    "critic": {"name": "ppo"},
    "overlong_length": {"overlong_cache": 3},
    "overlong_cache": {"overlong_length": 9},
    "correction": {"entropy_source": "learner"},
}


@pytest.fixture
def built(monkeypatch):
    """What `make_algorithm` was asked for: name, keywords."""
    calls = []
    monkeypatch.setattr(assembly, "make_algorithm", lambda name, **options: calls.append((name, options)))

    def build(overrides):
        assembly.make_algorithm_from(load_config("quickstart", overrides))
        return calls[-1]

    return build


def test_every_key_of_the_section_is_covered():
    assert CHANGED.keys() == AlgorithmConfig.model_fields.keys() - NOT_OF_THE_RECIPE


@pytest.mark.parametrize("key", CHANGED)
def test_every_key_reaches_the_algorithm(built, key):
    values = {key: CHANGED[key]} | NEEDS.get(key, {})
    name, options = built([f"algorithm.{k}={v}" for k, v in values.items()])
    options |= {"name": name, "aggregation": options["loss_aggregation"]}
    for k, v in values.items():
        if k in NOT_OF_THE_RECIPE:
            continue
        found = {inner: options[k][inner] for inner in v} if isinstance(v, dict) else options[k]
        assert found == v, k


def test_the_size_of_groups_is_told(built):
    overrides = ["rollout.group_size=1", "algorithm.name=reinforce", "train.num_minibatches=2"]
    _, options = built(overrides)
    assert (options["group_size"], options["num_minibatches"]) == (1, 2)


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
        assembly.make_engine(config, assembly.make_model(config, tokenizer), tokenizer)
