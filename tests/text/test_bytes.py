"""The byte-level tokenizer: every text comes back exactly, an id is a byte, a control token ends a turn."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer, build_byte_tokenizer, load_tokenizer

TOKENIZER = build_byte_tokenizer()
CONTROLS = [TOKENIZER.id_to_token(index) for index in sorted(TOKENIZER.special_ids)]
# Lone surrogates are no text in UTF-8; a control token's spelling means the token (its own test below).
TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(
    lambda text: not any(control in text for control in CONTROLS)
)


@settings(deadline=None)
@given(TEXTS)
def test_an_id_is_a_byte_and_comes_back_exactly(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@settings(deadline=None)
@given(TEXTS, st.sampled_from(CONTROLS), TEXTS)
def test_a_control_token_in_a_text_means_itself(before, control, after):
    assume(not any(other in before + control + after for other in CONTROLS if other != control))
    ids = TOKENIZER.encode(before + control + after)
    assert ids == [*before.encode(), TOKENIZER.token_to_id(control), *after.encode()]


def test_control_tokens_come_behind_the_bytes():
    assert TOKENIZER.vocab_size == 261 and TOKENIZER.special_ids == frozenset(range(256, 261))
    assert TOKENIZER.stop_ids == (TOKENIZER.token_to_id("<|end|>"),)
    assert TOKENIZER.pad_id == TOKENIZER.token_to_id("<|pad|>")


def test_bytes_that_are_no_text_are_decoded_all_the_same():
    assert TOKENIZER.decode([0xC3, 0x28, 0xFF]) == "\ufffd(\ufffd"


@settings(deadline=None)
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
