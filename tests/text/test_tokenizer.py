"""The tokenizer folder: written for and read like Hugging Face's, with errors that say what is wrong."""

import json
import subprocess
import sys

import pytest

from empg_jax.text import (
    ChatRenderer,
    ChatTemplateError,
    Tokenizer,
    build_byte_tokenizer,
    build_phrase_tokenizer,
    load_tokenizer,
)
from tests.text.families import CHATML, HEADERS, TEMPLATES, build_bpe

MESSAGES = [
    {"role": "user", "content": "Where is  the apple?\n"},
    {"role": "assistant", "content": "<think>\nlook\n</think>\n\ngo to shelf 2"},
    {"role": "user", "content": "You see naïve 🍎 <b>&amp;</b>."},
]


@pytest.mark.parametrize("family", [*sorted(TEMPLATES), "phrases"])
def test_transformers_loads_the_folder_and_gives_the_same_ids(family, tmp_path):
    import transformers

    ours = (
        build_phrase_tokenizer(["go to", "shelf 2", "You see"]) if family == "phrases" else build_bpe(family)
    )
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == ChatRenderer(ours).start(MESSAGES)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False) == ours.render(
        MESSAGES, add_generation_prompt=False
    )
    assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
    assert theirs.eos_token_id in ours.stop_ids
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == ours.stop_ids
    assert again.pad_id == ours.pad_id
    assert ChatRenderer(again).start(MESSAGES) == ids


def test_what_transformers_saves_is_loaded(tmp_path):
    import transformers

    ours = build_bpe("headers")
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = load_tokenizer(tmp_path / "theirs")
    assert ChatRenderer(again).start(MESSAGES) == ChatRenderer(ours).start(MESSAGES)
    assert again.stop_ids == ours.stop_ids


def test_the_sampler_stops_at_the_templates_end_before_the_named_ones(tmp_path):
    tokenizer = build_bpe("headers")  # ends turns with <|eot_id|>; its eos_token is another
    assert tokenizer.stop_ids == tuple(map(tokenizer.token_to_id, ("<|eot_id|>", "<|end_of_text|>")))
    tokenizer.save(tmp_path)
    extra = tokenizer.token_to_id("<|start_header_id|>")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [extra, tokenizer.stop_ids[0]]})
    )
    assert load_tokenizer(tmp_path).stop_ids == (tokenizer.stop_ids[0], tokenizer.stop_ids[1], extra)
    # As transformers does, those of the model's own file where that one names none.
    (tmp_path / "generation_config.json").write_text("{}")
    keys = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(keys | {"stop_tokens": []}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [extra]}))
    assert set(load_tokenizer(tmp_path).stop_ids) == {*tokenizer.stop_ids, extra}


def test_control_tokens_are_left_out_of_text_unless_asked_for():
    tokenizer = build_bpe("chatml")
    ids = [*tokenizer.encode("<think>go"), tokenizer.turn_end_id]
    assert tokenizer.decode(ids) == "<think>go"
    assert tokenizer.decode(ids, skip_special=False) == "<think>go<|im_end|>"


def test_named_tokens_are_special_whatever_the_file_says(tmp_path):
    import transformers

    build_byte_tokenizer().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    for token in content["added_tokens"]:
        token |= {"special": False, "rstrip": True}
    file.write_text(json.dumps(content))
    generation = {
        "eos_token_id": [
            ord("."),
            next(t["id"] for t in content["added_tokens"] if t["content"] == "<|user|>"),
        ]
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    ids = ours.encode("hi.<|end|>  <|pad|>")
    assert ids == theirs.encode("hi.<|end|>  <|pad|>")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "hi."
    assert ours.turn_end_id == ours.token_to_id("<|end|>")
    ChatRenderer(ours)  # it ends turns
    user, assistant = map(ours.token_to_id, ("<|user|>", "<|assistant|>"))
    # A stop token is special where it is an added token; a full stop is still text.
    assert ours.decode([user, assistant, ord(".")]) == "<|assistant|>."


def test_padding_and_truncation_in_the_file_are_ignored():
    source = build_bpe("chatml")
    backend = source._backend
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    tokenizer = Tokenizer(backend, special_tokens=source.special_tokens)
    assert tokenizer.decode(tokenizer.encode("go to shelf 2")) == "go to shelf 2"


def test_the_template_may_be_named_or_replaced(tmp_path):
    build_bpe("chatml").save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template.source == CHATML
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert (
        load_tokenizer(tmp_path).render(MESSAGES[:1], add_generation_prompt=False) == MESSAGES[0]["content"]
    )
    assert load_tokenizer(tmp_path, chat_template=HEADERS).chat_template.source == HEADERS


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer folder at"):
        load_tokenizer(tmp_path / "nothing")


def test_folder_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json; it holds \['config.json'\]"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ['{"cut', "[]"])
def test_corrupt_file(tmp_path, name, text):
    build_bpe("chatml").save(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys", "cause"),
    [
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template is a int, not a text"),
        ("tokenizer_config.json", {"chat_template": ["a"]}, "chat_template is no list of templates"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token=5 in the tokenizer's files is no text"),
        ("tokenizer_config.json", {"eos_token": {"a": 1}}, "eos_token={'a': 1} in"),
        ("tokenizer_config.json", {"stop_tokens": 5}, "stop_tokens=5 is no list of texts"),
        ("generation_config.json", {"eos_token_id": "2"}, r"eos_token_id=\['2'\] .* no token ids"),
    ],
)
def test_values_of_a_wrong_type(tmp_path, name, keys, cause):
    build_bpe("chatml").save(tmp_path)
    (tmp_path / name).write_text(json.dumps(json.loads((tmp_path / name).read_text()) | keys))
    with pytest.raises(ValueError, match=cause):
        load_tokenizer(tmp_path)


def test_tags_that_parsers_read_are_text_though_they_are_control_tokens():
    source = build_bpe("chatml")
    tags = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
    source._backend.add_special_tokens([*tags, "<|other|>"])
    tokenizer = Tokenizer(
        source._backend, special_tokens=source.special_tokens, chat_template=source.chat_template.source
    )
    text = "<think>hm</think> go <tool_call>{}</tool_call>"
    ids = tokenizer.encode(text.replace(" go", "<|other|> go") + "<|im_end|>")
    assert all(tokenizer.token_to_id(tag) in ids for tag in tags)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=False) == text.replace(" go", "<|other|> go") + "<|im_end|>"


def test_no_chat_template():
    source = build_bpe("chatml")
    tokenizer = Tokenizer(source._backend, special_tokens=source.special_tokens)
    with pytest.raises(ChatTemplateError, match="has no chat template: add"):
        ChatRenderer(tokenizer)


def test_unknown_stop_token(tmp_path):
    source = build_bpe("chatml")
    with pytest.raises(ValueError, match=r"stop token '<\|halt\|>' is not in the tokenizer's vocabulary"):
        Tokenizer(source._backend, stop_tokens=["<|halt|>"])
    with pytest.raises(ValueError, match="names no token that ends a turn"):
        Tokenizer(source._backend)
    source.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 99999}))
    with pytest.raises(ValueError, match="eos_token_id 99999 is not in"):
        load_tokenizer(tmp_path)


def test_template_that_does_not_parse():
    source = build_bpe("chatml")
    with pytest.raises(ChatTemplateError, match="does not parse: line 2"):
        Tokenizer(source._backend, chat_template="\n{% for %}", special_tokens=source.special_tokens)


def test_generation_blocks_loop_controls_and_dates_render():
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
    )
    source = build_bpe("chatml")
    tokenizer = Tokenizer(source._backend, chat_template=template, special_tokens=source.special_tokens)
    messages = [{"role": "tool", "content": "x"}, {"role": "user", "content": "<é>"}]
    assert tokenizer.render(messages, add_generation_prompt=False) == '"<é>"20'


def test_text_imports_neither_transformers_nor_jax():
    code = "import sys, empg_jax.text; print(sorted({'transformers', 'jax', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
