"""The warm start: what is recorded, what is learned, what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest

from empg_envs.base import ParsedAction
from empg_jax import trainer
from empg_jax.algorithms import ALGORITHMS
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.run import assembly
from empg_jax.run.splits import check_split
from empg_jax.sft import warm_start as sft
from empg_jax.sft.demonstrations import DemonstrationError, record_demonstrations
from tests import runs
from tests.cages import need_cages


@pytest.fixture(scope="module")
def language():
    return assembly.make_language(runs.configure("unused"))


def record(language, count=12, **sections):
    config = runs.configure("unused", *(f"{key}={value}" for key, value in sections.items()))
    return config, record_demonstrations(config, language, count)


def test_the_expert_wins_and_its_words_are_the_responses(language):
    config, episodes = record(language, **{"sft.noise": 0, "env.max_turns": 20, "rollout.max_tokens": 384})
    assert len(episodes) == 12 and all(episode.is_success for episode in episodes)
    stop = set(language.tokenizer.stop_ids)
    for episode in episodes:
        assert episode.split == "train" and episode.outcome.is_trained
        held = np.zeros(0, np.int32)
        for turn in episode.turns:
            # Each prompt extends the conversation: prompts and responses make one token stream.
            assert turn.prompt_tokens[: len(held)].tolist() == held.tolist()
            assert turn.response_tokens[-1] in stop and not stop & set(turn.response_tokens[:-1].tolist())
            assert language.tokenizer.decode(turn.response_tokens[:-1].tolist()).strip() == turn.response
            held = np.concatenate([turn.prompt_tokens, turn.response_tokens])
        assert len(held) <= config.rollout.max_tokens


def test_noise_is_random_admissible_actions_and_the_seed_repeats(language):
    def words(episodes):
        return [[turn.response for turn in episode.turns] for episode in episodes]

    _, clean = record(language, **{"sft.noise": 0})
    _, noisy = record(language, **{"sft.noise": 0.5})
    _, again = record(language, **{"sft.noise": 0.5})
    _, other = record(language, **{"sft.noise": 0.5, "seed": 1})
    assert words(noisy) == words(again) != words(clean)
    assert words(other) != words(noisy)


def test_demonstrations_that_do_not_fit_are_left_out(language):
    def length(episode):
        return len(episode.turns[-1].prompt_tokens) + len(episode.turns[-1].response_tokens)

    _, all_of_them = record(language, **{"rollout.max_tokens": 384})
    limit = sorted(map(length, all_of_them))[5]
    _, few = record(language, **{"rollout.max_tokens": limit})
    assert [e.group_id for e in few] == [e.group_id for e in all_of_them if length(e) <= limit]
    assert 0 < len(few) < len(all_of_them) == 12
    with pytest.raises(DemonstrationError, match=r"none of 2 .* fits rollout\.max_tokens=8"):
        record(language, 2, **{"rollout.max_tokens": 8, "rollout.prefill_buckets": "null"})


def test_in_a_window_no_turn_is_longer_than_a_row(language):
    window = {"env.context": "window", "env.history": 2}
    config = runs.configure("unused", *(f"{key}={value}" for key, value in window.items()))
    language = assembly.make_language(config)

    def longest(episode):
        return max(len(turn.prompt_tokens) + len(turn.response_tokens) for turn in episode.turns)

    _, all_of_them = record(language, 30, **window, **{"rollout.max_tokens": 384})
    limit = sorted(map(longest, all_of_them))[15]
    _, few = record(language, 30, **window, **{"rollout.max_tokens": limit})
    assert [e.group_id for e in few] == [e.group_id for e in all_of_them if longest(e) <= limit]
    last = [len(e.turns[-1].prompt_tokens) + len(e.turns[-1].response_tokens) for e in all_of_them]
    assert len(few) < sum(size <= limit for size in last)  # turns before the last one are often the longest


def test_an_environment_without_expert_or_with_a_fault_is_named(language):
    spec = {"env.name": "null", "env.options.level": "tiny"}
    with pytest.raises(DemonstrationError, match=r"tests\.houses:MUTE has no expert.*sft\.updates=0"):
        record(language, **spec, **{"env.entry_point": "tests.houses:MUTE"})
    broken = {"env.options.trouble": "raise", "env.options.diary": "/dev/null"}
    with pytest.raises(DemonstrationError, match=r"its expert played .* RuntimeError: the house"):
        record(language, **spec, **broken, **{"env.entry_point": "tests.houses:HOUSE"})


GAMES = {"source": "generated", "level": "tiny"}
BARE = [
    ("household", {}, {"parser": "plain"}),
    ("household", {"style": "alfworld"}, {"style": "alfworld", "require_admissible": True}),
    ("alfworld", GAMES, {"style": "compact", "parser": "line"}),
    ("webshop", {"level": "tiny"}, {"parser": "plain"}),
    ("webshop", {"level": "tiny", "style": "page"}, {"style": "page", "parser": "plain"}),
    ("deepsearch", {"level": "tiny"}, {"parser": "search_r1"}),
    ("deepsearch", {"level": "tiny"}, {"parser": "verl_agent"}),
    ("swe", {"tools": "functions"}, {"tools": "functions"}),
    ("swe", {"tools": "terse"}, {"tools": "terse"}),
]
FORMED = [
    ("household", {"style": "alfworld"}, {"style": "alfworld", "parser": "tags"}),
    ("alfworld", GAMES, {"parser": "tags"}),
    ("webshop", {"level": "tiny", "style": "page"}, {"style": "page", "parser": "tags"}),
    ("swe", {"tools": "bash"}, {"tools": "bash"}),
]


@pytest.mark.parametrize(("name", "options", "prompt_options"), BARE + FORMED)
def test_the_run_reads_the_action_in_every_response_or_refuses_it(name, options, prompt_options):
    if name == "swe":
        need_cages()
    config = load_config(
        "quickstart",
        [
            f"env.name={name}",
            f"env.options={options}",
            f"env.prompt_options={prompt_options}",
            *("model.tokenizer=bytes", "env.max_turns=12", "sft.noise=0.3"),
            *("rollout.max_tokens=60000", "train.micro_tokens=60000"),
        ],
    )
    language = assembly.make_language(config)
    if (name, options, prompt_options) in FORMED:
        with pytest.raises(DemonstrationError, match=r"the run's parser reads .*: set sft\.updates=0, or"):
            record_demonstrations(config, language, 1)
        return
    for episode in record_demonstrations(config, language, 2):
        for turn in episode.turns:
            said = language.tokenizer.decode(turn.response_tokens.tolist())
            assert language.parser(said, {"admissible": [turn.response]}) == ParsedAction(turn.response, True)


def test_a_split_that_has_no_demonstrations_is_told_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"^sft\.split=nope does not exist; the environment has train, "):
        trainer.run_sft(runs.configure(tmp_path / "run", "sft.split=nope"))
    with pytest.raises(ConfigError, match=r"^sft\.split=train has no tasks$"):
        check_split(SimpleNamespace(splits={"train": 0}), "sft.split", "train")


def test_the_loss_is_cross_entropy_on_sampled_tokens_alone():
    import jax.numpy as jnp

    class Rows:
        loss_mask = jnp.asarray([[False, True, True], [False, False, True]])

    algorithm = sft.make_cross_entropy()
    weights = algorithm.credit(Rows, None).loss_weights
    np.testing.assert_allclose(weights, np.asarray(Rows.loss_mask) / 3, rtol=1e-6)
    logprobs = jnp.asarray([[-9.0, -1.0, -2.0], [-9.0, -9.0, -3.0]])
    per_token, metrics = algorithm.loss(logprobs, logprobs, Rows, None, logprobs)
    assert float((per_token * weights).sum()) == pytest.approx(2.0) and metrics == {}
    assert "sft" not in ALGORITHMS  # it is not for RL


@pytest.mark.parametrize(
    "option",
    ["train.profile=2:3", "train.warmup_updates=2", "algorithm.critic.warmup_updates=2"],
)
def test_the_configuration_of_a_warm_start_alone_can_be_loaded(tmp_path, monkeypatch, option):
    """Whatever else counts the updates of RL, which it leaves out."""
    kept = []
    monkeypatch.setattr(trainer, "train", kept.append)
    ppo = ["algorithm.name=ppo", "algorithm.modulation=none"] if "critic" in option else []
    trainer.run_sft(runs.configure(tmp_path / "run", option, *ppo))
    path = tmp_path / "config.yaml"
    path.write_text(kept[0].to_yaml())
    assert load_config(path).to_yaml() == path.read_text() and kept[0].train.updates == 0


@pytest.mark.slow
def test_the_warm_start_alone_is_a_run_that_learns(tmp_path):
    run = trainer.run_sft(runs.configure(tmp_path / "run", "sft.updates=30", "eval.tasks=4"))
    losses = [line["sft_loss"] for line in runs.read_metrics(run / "sft_metrics.jsonl")]
    assert len(losses) == 30 and losses[-1] < 0.75 * losses[0]
    assert (run / "metrics.jsonl").read_text() == "" and runs.restored(run).step == 0
