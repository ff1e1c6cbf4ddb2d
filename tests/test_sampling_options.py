"""Sampling options through whole runs: the learner's log-probs are the engine's, stop strings end turns."""

import gzip
import json

import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.run import assembly, sampling
from empg_jax.text.tokenizer import load_tokenizer
from tests import runs

FEW = [*runs.HOUSE, "sft.updates=0", "eval.tasks=2", "train.updates=2", "log.rollouts_every=1"]
STOP = "o"  # stands inside many phrases
ALL = ["rollout.top_p=0.9", "rollout.top_k=20", "rollout.min_p=0.02", f"rollout.stop=[{STOP}]"]
ALL += ["eval.top_k=3", "eval.temperature=0.7", "algorithm.kl_coef=0.1"]


def check_gap(run):
    assert json.loads((run / "summary.json").read_text())["recompiles_after_warmup"] == 0
    gaps = [line["logprob_gap_max"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(gaps) == 2 and max(gaps) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("option", ["top_p=0.7", "top_k=5", "min_p=0.3"])
def test_the_learner_agrees_with_the_engine_with_each_option(tmp_path, option):
    check_gap(runs.train(tmp_path / "run", *FEW, "algorithm.entropy_source=learner", f"rollout.{option}"))


@pytest.mark.slow
def test_all_options_together(tmp_path):
    run = runs.train(tmp_path / "run", *FEW, "algorithm.entropy_source=learner", *ALL)
    check_gap(run)
    decode = load_tokenizer(run / "tokenizer").decode
    texts = [gzip.decompress(path.read_bytes()).decode() for path in run.glob("rollouts/*.jsonl.gz")]
    turns = [turn for text in texts for line in text.splitlines() for turn in json.loads(line)["turns"]]
    assert sum(STOP in turn["response"] for turn in turns) > len(turns) / 4
    for turn in turns:
        assert STOP not in decode(turn["token_ids"][:-1])
        assert turn["finish_reason"] == "stop" or STOP not in turn["response"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.top_p=0", "rollout.top_p"),
        ("rollout.top_p=1.1", "rollout.top_p"),
        ("eval.top_p=0", "eval.top_p"),
        ("rollout.top_k=-1", "rollout.top_k"),
        ("rollout.min_p=1", "rollout.min_p"),
        ("eval.min_p=-0.1", "eval.min_p"),
        ("rollout.stop=['']", "rollout.stop"),
    ],
)
def test_values_without_a_meaning_are_refused_by_name(override, says):
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        load_config("quickstart", [override])


@pytest.mark.parametrize("key", ["rollout.top_k", "eval.top_k"])
def test_a_top_k_beyond_the_vocabulary_is_refused_before_anything_is_written(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"{key}=5000 must lie in \[0, \d+\], the size of the vocabulary"):
        runs.train(tmp_path / "run", f"{key}=5000")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "has_filter"),
    [([], False), (["rollout.stop=[x]"], False), (["rollout.top_p=0.9"], True), (["eval.top_k=2"], True)],
)
def test_an_engine_has_a_filter_where_training_or_evaluation_asks_for_one(overrides, has_filter):
    config = runs.configure("unused", *overrides)
    tokenizer = assembly.make_language(config).tokenizer
    engine = sampling.make_engine(config, assembly.make_model(config, tokenizer), tokenizer.stop_ids)
    assert engine.config.has_filter is has_filter
    np.testing.assert_allclose(engine.token_filter, (config.rollout.top_p, 0, 0.0))
