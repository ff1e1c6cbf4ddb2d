"""The phrase tokenizer: round trips, longest phrase first, minimal turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer, build_phrase_tokenizer, load_tokenizer

PHRASES = [
    "go to",
    "go",
    "apple 1",
    "apple 12",
    "apple",
    "fridge 1",
    "you see",
    "take",
    "in/on",
    "pick-two",
    "to",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_phrase_tokenizer(PHRASES)


def words(tokenizer, text):
    return [tokenizer.id_to_token(index) for index in tokenizer.encode(text)]


def test_ids_are_controls_punctuation_then_phrases_in_order(tokenizer):
    assert tokenizer.pad_id == 0
    assert tokenizer.stop_ids == (1,)
    assert tokenizer.token_to_id("<|unk|>") == 5
    assert tokenizer.token_to_id("go to") == 6 + 6
    assert tokenizer.vocab_size == 6 + 6 + len(PHRASES)


def test_longest_phrase_wins_and_words_are_not_cut(tokenizer):
    assert words(tokenizer, "go to apple 12") == ["go to", "apple 12"]
    assert words(tokenizer, "go apple") == ["go", "apple"]
    assert words(tokenizer, "apple 123") == ["apple", "<|unk|>"]
    assert words(tokenizer, "apples goes") == ["<|unk|>", "<|unk|>"]
    assert words(tokenizer, "pick-two in/on") == ["pick-two", "in/on"]


def test_white_space_only_separates(tokenizer):
    assert tokenizer.encode("  go \n to\tapple  1 ") == tokenizer.encode("go to apple 1")
    assert tokenizer.encode(" \n") == []


def test_punctuation_is_attached_to_the_left(tokenizer):
    text = "you see: apple 1, fridge 1. take apple 1!"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("apple 1 , fridge 1 .")) == "apple 1, fridge 1."


def test_unknown_words_are_one_visible_token_each(tokenizer):
    assert tokenizer.decode(tokenizer.encode("take zork 99!")) == "take <|unk|> <|unk|>!"


@given(st.lists(st.sampled_from([*PHRASES, "zork"]), min_size=1, max_size=8))
def test_text_of_encoded_text_is_a_fixed_point(phrases):
    tokenizer = build_phrase_tokenizer(PHRASES)
    text = " ".join(phrases)
    expected = text.replace("zork", "<|unk|>")
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.encode(expected) == tokenizer.encode(text)


def test_a_turn_costs_two_control_tokens(tokenizer):
    renderer = ChatRenderer(tokenizer)
    name = tokenizer.token_to_id
    start = renderer.start([{"role": "user", "content": "you see apple 1"}])
    assert start == [name(t) for t in ("<|user|>", "you see", "apple 1", "<|end|>", "<|assistant|>")]
    delta = renderer.follow(
        [{"role": "user", "content": "you see apple 1"}],
        "take apple 1",
        [{"role": "user", "content": "you see fridge 1"}],
        stopped=True,
    )
    assert delta == [name(t) for t in ("<|user|>", "you see", "fridge 1", "<|end|>", "<|assistant|>")]


@pytest.mark.parametrize("phrase", ["", "  ", "take <|end|>"])
def test_bad_phrases_are_refused(phrase):
    with pytest.raises(ValueError, match="is empty or contains a control token"):
        build_phrase_tokenizer(["go to", phrase])


def test_regular_expression_characters_are_literal():
    tokenizer = build_phrase_tokenizer(["a.b", "x (1)", "$5", "c++"])
    for text in ("a.b x (1)", "$5 c++"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.token_to_id("<|unk|>") not in tokenizer.encode(text)


def test_saved_and_loaded_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "go to apple 12, take zork."
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (again.vocab_size, again.pad_id, again.stop_ids) == (tokenizer.vocab_size, 0, (1,))
