"""Both histories from the configuration to the learner's rows and the episodes on disk."""

import datetime
import gzip
import json
import shutil

import numpy as np
import pytest

from empg_jax import trainer
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.run.assembly import make_language
from empg_jax.text.builtin import build_phrase_tokenizer
from tests import runs
from tests.houses import HOUSE

# It prints a date, and before an answer a mark that it leaves out of the history.
REWRITING = """
{{- '<|system|>' ~ strftime_now('%Y%m%d') ~ '<|end|>' }}
{%- for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>!' }}{% endif %}
"""
STEADY = ["rollout.deterministic=true", "log.rollouts_every=1", "log.rollouts_tokens=true", "eval.tasks=2"]
SHORT = [
    "sft.updates=0",
    "train.updates=2",
    "env.max_turns=3",
    "log.transcripts=0",
    "algorithm.entropy_source=learner",
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A household whose tokenizer has the template that rewrites."""
    folder = tmp_path_factory.mktemp("history")
    build_phrase_tokenizer(HOUSE.phrases()).save(folder / "tokenizer")
    (folder / "rewriting.jinja").write_text(REWRITING)
    files = [f"model.tokenizer={folder / 'tokenizer'}", f"model.chat_template={folder / 'rewriting.jinja'}"]
    return [*runs.HOUSE, *STEADY, *files, *SHORT]


class Seen:
    """A run, and the batches and messages that it made."""

    def __init__(self, folder, *overrides):
        self.batches, self.messages = [], []
        make_batch, message = trainer.make_batch, trainer.make_progress

        def watch(*args, **options):
            self.batches.append(make_batch(*args, **options))
            return self.batches[-1]

        def listen(*args):
            progress = message(*args)
            say = progress.message
            progress.message = lambda text: (self.messages.append(text), say(text))
            return progress

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "make_batch", watch)
            patch.setattr(trainer, "make_progress", listen)
            self.folder = runs.train(folder, *overrides)
        self.lines = read_metrics(self.folder / "metrics.jsonl")

    def episodes(self, update):
        with gzip.open(self.folder / "rollouts" / f"update-{update:06}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    def rows(self, update):
        """(tokens, mask) of every row of an update, by trajectory."""
        batch, _ = self.batches[update - 1]
        found = {}
        for number in range(int(batch.sequence_ids.max()) + 1):
            where = batch.sequence_ids == number
            mask = batch.loss_mask[where]
            owner = int(batch.trajectory_ids[where][mask][0])
            found.setdefault(owner, []).append((batch.tokens[where], mask))
        return [found[owner] for owner in sorted(found)]


@pytest.fixture(scope="module")
def seen(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("history-runs")
    return {
        mode: Seen(folder / mode, *settings, f"env.history_mode={mode}") for mode in ("template", "append")
    }


@pytest.mark.slow
def test_a_row_per_turn_becomes_one_row_per_episode(seen):
    for update in (1, 2):
        for mode, run in seen.items():
            episodes, rows = run.episodes(update), run.rows(update)
            assert len(episodes) == len(rows) == 4
            for episode, parts in zip(episodes, rows, strict=True):
                sampled = [ids for turn in episode["turns"] for ids in turn["token_ids"]]
                assert np.concatenate([tokens[mask] for tokens, mask in parts]).tolist() == sampled
                assert len(parts) == (1 if mode == "append" else len(episode["turns"]))
            line = run.lines[update - 1]
            turns = line["episode_turns"] if mode == "template" else 1
            assert line["segments_per_episode"] == pytest.approx(turns)
            assert line["logprob_gap_max"] < 1e-4 and line["recompiles"] == 0
    assert any(len(episode["turns"]) > 1 for episode in seen["append"].episodes(1))


@pytest.mark.slow
def test_both_sample_alike_until_the_history_differs_and_one_has_fewer_tokens(seen):
    for one, other in zip(seen["template"].episodes(1), seen["append"].episodes(1), strict=True):
        assert (one["task"], one["member"]) == (other["task"], other["member"])
        assert one["turns"][0]["token_ids"] == other["turns"][0]["token_ids"]
    tokens = {
        mode: run.batches[0][1].num_tokens / run.lines[0]["episode_turns"] for mode, run in seen.items()
    }
    assert tokens["append"] < tokens["template"]


@pytest.mark.slow
def test_a_row_is_the_start_the_responses_and_the_text_between(seen):
    """Read back from the row alone: what stands between two responses is the template's fixed text."""
    run = seen["append"]
    language = make_language(load_config(run.folder / "config.yaml"), run.folder / "tokenizer")
    renderer = language.renderer
    for episode, ((tokens, mask),) in zip(run.episodes(1), run.rows(1), strict=True):
        prompts = HOUSE.prompts()
        first, *later = episode["turns"]
        ids = renderer.start(prompts.start(first["observation"], {"task": "", "admissible": []}))
        rest = tokens.tolist()
        begin = len(rest) - len(rest[int(mask.argmax()) :])
        assert rest[:begin][-2:] == ids[-2:] == renderer.tokenizer.encode("<|assistant|>!")
        for before, turn in zip(episode["turns"], later, strict=False):
            new = [{"role": "user", "content": prompts.follow(turn["observation"], {"admissible": []})}]
            stopped = before["token_ids"][-1] == renderer.end_id
            delta = renderer.tokenizer.encode(renderer.end_token + renderer.suffix((), new))[stopped:]
            begin += len(before["token_ids"])
            assert rest[begin : begin + len(delta)] == delta
            begin += len(delta)
            assert rest[begin : begin + len(turn["token_ids"])] == turn["token_ids"]


@pytest.mark.slow
def test_the_start_tells_how_many_rows_and_why(seen):
    told = {mode: [line for line in run.messages if "rows per episode" in line] for mode, run in seen.items()}
    assert told["append"] == ["rows per episode: 1 (env.history_mode=append; with template 3 in 3 turns)"]
    (line,) = told["template"]
    assert line.startswith(
        "rows per episode: 3 in 3 turns, because at turn 2 line 3 of the chat template prints"
    )
    assert line.endswith("env.history_mode=append keeps answers as sampled: rows per episode: 1")
    for mode, run in seen.items():
        assert json.loads((run.folder / "environment.json").read_text())["rows"] == told[mode][0]


@pytest.mark.slow
def test_the_date_is_that_of_the_start(seen):
    """The day is in the run's configuration, and what reads the run prints that day for ever."""
    run = seen["append"].folder
    config = load_config(run / "config.yaml")
    day = datetime.date.fromisoformat(config.model.chat_date)
    assert 0 <= (datetime.date.today() - day).days <= 1
    later = load_config(run / "config.yaml", ["model.chat_date=1999-12-31"])
    for told, expected in ((config, f"{day:%Y%m%d}"), (later, "19991231")):
        renderer = make_language(told, run / "tokenizer").renderer
        assert renderer.render([{"role": "user", "content": "a"}]).startswith(f"<|system|>{expected}<|end|>")


@pytest.mark.slow
def test_a_resumed_run_is_the_same_on_another_day(seen, tmp_path, monkeypatch):
    whole = seen["append"].folder
    again = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr("empg_jax.trainer.datetime", None)  # nothing asks which day it is
    trainer.train(load_config(again / "config.yaml"), resume=again, step=1)
    assert runs.lines(again) == runs.lines(whole) and runs.weights(again) == runs.weights(whole)
    assert load_config(again / "config.yaml") == load_config(whole / "config.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.context=window"], r"env\.history_mode=append has no effect with env\.context=window"),
        (["model.chat_date=soon"], r"model\.chat_date=soon is no date: write year, month and day"),
    ],
)
def test_settings_that_do_not_fit_are_told(overrides, message):
    with pytest.raises(ConfigError, match=message):
        runs.configure("unused", "env.history_mode=append", *overrides)


def test_a_template_without_fixed_text_is_told(settings, tmp_path):
    (tmp_path / "counting.jinja").write_text(
        REWRITING.replace("message.content", "loop.index ~ message.content")
    )
    config = runs.configure(
        "unused", *settings, "env.history_mode=append", f"model.chat_template={tmp_path / 'counting.jinja'}"
    )
    with pytest.raises(
        ConfigError, match=r"env\.history_mode=append: after an answer .* use env\.history_mode"
    ):
        make_language(config)
