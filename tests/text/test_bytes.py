"""The byte-level tokenizer: every text comes back exactly, an id is a byte, a control token ends a turn."""

from hypothesis import given
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer, build_byte_tokenizer, load_tokenizer

TOKENIZER = build_byte_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))  # lone surrogates are no text in UTF-8


@given(TEXTS)
def test_an_id_is_a_byte_and_comes_back_exactly(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_control_tokens_come_behind_the_bytes():
    assert TOKENIZER.vocab_size == 261 and TOKENIZER.special_ids == frozenset(range(256, 261))
    assert TOKENIZER.stop_ids == (TOKENIZER.token_to_id("<|end|>"),)
    assert TOKENIZER.pad_id == TOKENIZER.token_to_id("<|pad|>")


def test_bytes_that_are_no_text_are_decoded_all_the_same():
    assert TOKENIZER.decode([0xC3, 0x28, 0xFF]) == "\ufffd(\ufffd"


@given(TEXTS, TEXTS)
def test_a_conversation_only_grows(answer, observation):
    renderer = ChatRenderer(TOKENIZER)
    first = [{"role": "user", "content": "zwölf?\n"}]
    new = [{"role": "user", "content": observation}]
    begun = renderer.start(first) + renderer.encode_response(answer)
    grown = begun + renderer.follow(first, answer, new, stopped=True)
    assert grown == renderer.start([*first, {"role": "assistant", "content": answer}, *new])


def test_it_is_read_back_from_a_folder(tmp_path):
    TOKENIZER.save(tmp_path)
    again = load_tokenizer(tmp_path)
    text = "<think>é 漢 \U0001f600</think>\r\n\t x  y"
    assert again.encode(text) == list(text.encode()) and again.decode(again.encode(text)) == text
    assert again.stop_ids == TOKENIZER.stop_ids and again.chat_template.source
