"""How a configuration becomes tokenizer and chat format, and what is said where it cannot."""

import functools
import json

import pytest

from empg_jax.errors import ConfigError
from empg_jax.run.assembly import asks_for_date, make_language
from empg_jax.text import Tokenizer
from tests import runs
from tests.text.families import CHATML, build_bpe

QUESTION = [{"role": "user", "content": "Where?"}]


@pytest.fixture
def folder(tmp_path):
    build_bpe("thinking").save(tmp_path)
    return tmp_path


def language(folder, *overrides, saved=None):
    return make_language(runs.configure("unused", f"model.tokenizer={folder}", *overrides), saved)


def test_options_reach_the_template(folder):
    assert language(folder).renderer.render(QUESTION).endswith("assistant\n")
    quiet = language(folder, "model.chat_options={enable_thinking: false}").renderer
    assert quiet.render(QUESTION).endswith("<think>\n\n</think>\n\n")
    tools = language(folder, "model.chat_options={keep_thinking: true}").renderer
    assert "</think>" in tools.render([*QUESTION, {"role": "assistant", "content": "a</think>b"}, *QUESTION])


def test_a_template_of_ones_own_replaces_the_tokenizers(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    found = language(folder, f"model.chat_template={tmp_path / 'mine.jinja'}")
    assert found.renderer.render(QUESTION).startswith("<|im_start|>system\nBe helpful.")
    # The run keeps what it was trained with, whatever becomes of the file.
    found.tokenizer.save(tmp_path / "saved")
    (tmp_path / "mine.jinja").unlink()
    again = language(folder, f"model.chat_template={tmp_path / 'mine.jinja'}", saved=tmp_path / "saved")
    assert again.renderer.render(QUESTION) == found.renderer.render(QUESTION)


def test_a_model_without_a_template_is_told_what_to_do(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"})
    )
    with pytest.raises(ConfigError, match=r"has no chat template: .*; model\.chat_template=FILE brings"):
        language(folder)


def test_a_template_whose_answers_do_not_end_is_told(folder):
    (folder / "open.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    with pytest.raises(ConfigError, match=r"does not end an assistant's turn .*model\.chat_template=FILE"):
        language(folder, f"model.chat_template={folder / 'open.jinja'}")


def test_files_that_cannot_be_used_are_told(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"the tokenizer cannot be loaded: .*mine\.jinja"):
        language(folder, f"model.chat_template={tmp_path / 'mine.jinja'}")
    with pytest.raises(ConfigError, match="the tokenizer cannot be loaded: no tokenizer folder at"):
        language(tmp_path / "nowhere")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"the tokenizer cannot be loaded: .*tokenizer\.json is not a valid"
    ):
        language(folder)
    with pytest.raises(ConfigError, match=r"model\.chat_template needs a tokenizer of your own"):
        make_language(runs.configure("unused", f"model.chat_template={folder / 'tokenizer_config.json'}"))


def test_another_models_tokenizer_is_refused(folder, tmp_path):
    model = tmp_path / "model"
    headers = build_bpe("headers")
    headers.save(model)
    path = f"model.path={model}"
    (model / "config.json").write_text(json.dumps({"eos_token_id": headers.turn_end_id}))
    assert isinstance(language("null", path).tokenizer, Tokenizer)
    with pytest.raises(ConfigError, match=r"disagree on \d+ of \d+ ids; the first is 0: '<\|im_start\|>'"):
        language(folder, path)
    (model / "config.json").write_text(json.dumps({"eos_token_id": 151643}))
    with pytest.raises(ConfigError, match=r"says eos_token_id=151643, but the tokenizer"):
        language("null", path)


def test_a_packaged_template_is_named(folder, tmp_path):
    found = language(
        folder, "model.chat_template=qwen3_training", "model.chat_options={enable_thinking: false}"
    )
    answered = [*QUESTION, {"role": "assistant", "content": "There."}, *QUESTION]
    assert "assistant\n<think>\n\n</think>\n\nThere.<|im_end|>" in found.renderer.render(answered)
    with pytest.raises(
        ConfigError, match="there is no chat template qwen9: name a file, or one of qwen3_train"
    ):
        language(folder, "model.chat_template=qwen9")


def test_a_date_in_a_template_is_the_configured_one(folder, tmp_path):
    (tmp_path / "dated.jinja").write_text("{{- strftime_now('%d %b %Y') }}" + CHATML)
    override = f"model.chat_template={tmp_path / 'dated.jinja'}"
    told = language(folder, override, "model.chat_date=2001-02-03").renderer.render(QUESTION)
    assert told.startswith("03 Feb 2001")
    ask = functools.partial(runs.configure, "unused", f"model.tokenizer={folder}")
    assert asks_for_date(ask(override)) and not asks_for_date(ask())
    assert not asks_for_date(ask(override, "model.chat_date=2001-02-03"))
