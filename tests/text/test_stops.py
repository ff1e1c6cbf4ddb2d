"""Stop strings in text that arrives by tokens: any burst, any split into tokens, long responses."""

import numpy as np
import pytest

from empg_jax.text import build_byte_tokenizer, build_phrase_tokenizer
from empg_jax.text.stops import StopSearch, cut_at_stop, has_stop


def decode(ids):
    return bytes(ids).decode(errors="replace")


def tokens(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def search_by(burst, search, said):
    """The end that is found where tokens come in bursts."""
    ends = (search(said[:n]) for n in range(burst, len(said) + burst, burst))
    return next((count for count in ends if count is not None), None)


@pytest.mark.parametrize("burst", [1, 3, 50])
def test_a_stop_string_ends_at_the_same_token_in_any_burst(burst):
    said = tokens("one stop xx")
    assert search_by(burst, StopSearch(decode, ["xx", "stop"], [0]), said) == len("one stop")
    assert StopSearch(decode, ["x"], [ord("n")])(said) == 2
    assert search_by(burst, StopSearch(decode, [], [ord("p")]), said) == len("one stop")


@pytest.mark.parametrize("tokenizer", ["bytes", "phrases"])
def test_the_end_is_the_first_token_whose_text_holds_a_stop_string(tokenizer):
    """Against the search in the whole text, on random tokens: parts of characters, spaces, control tokens."""
    words = ["a", "b", "</b>", "c d", "é", "?"]
    backend = build_byte_tokenizer() if tokenizer == "bytes" else build_phrase_tokenizer(words)
    ids = [ord("a"), ord(" "), 0xC3, 0xA9, 0xE2, 0x82, 0xAC, 256] if tokenizer == "bytes" else range(18)
    generator, ends = np.random.default_rng(0), []
    for stops in (["a a"], ["é", "aaa"], ["€", " a é"], ["</b>. a"], [", c d"]):
        for burst in (1, 4, 7):
            said = generator.choice(np.asarray(ids, np.int32), 300)
            expected = next(
                (n for n in range(1, 301) if has_stop(backend.decode(said[:n].tolist()), stops)), None
            )
            assert search_by(burst, StopSearch(backend.decode, stops), said) == expected
            ends.append(expected)
    assert sum(end is not None and end > 20 for end in ends) > 3


def decode_fallback(ids):
    """As tokenizers with byte fallback: a run of bytes that is no text as a whole is replaced as a whole."""
    parts, run = [], b""
    for index in [*ids, 256]:
        if index < 256:
            run += bytes([index])
            continue
        try:
            parts.append(run.decode())
        except UnicodeDecodeError:
            parts.append("\ufffd" * len(run))
        parts.append(chr(index - 256) if index > 256 else "")
        run = b""
    return "".join(parts)


def fallback_tokens(text):
    """Words of ASCII letters have tokens; everything else is spelled in bytes."""
    ids = ([256 + ord(c)] if c.isalpha() and c.isascii() else list(c.encode()) for c in text)
    return np.asarray([index for part in ids for index in part], np.int32)


@pytest.mark.parametrize("text", ["😀😀\nUser: hi there", "é\n😀x", "hello😀 you😀😀\nUser"])
@pytest.mark.parametrize("burst", [1, 2, 4, 8, 100])
def test_a_stop_string_in_a_run_of_bytes_is_found_in_any_burst(text, burst):
    end = len(fallback_tokens(text[: text.index("\n") + 1]))
    assert search_by(burst, StopSearch(decode_fallback, ["\n"]), fallback_tokens(text)) == end


@pytest.mark.parametrize("burst", [1, 3, 8, 300])
def test_bytes_that_are_no_text_do_not_change_the_end(burst):
    generator = np.random.default_rng(1)
    ids = np.asarray([0xF0, 0x9F, 0x98, 0x80, 0x0A, 0xC3, 0xA9, 256 + 97, 256 + 98], np.int32)
    for _ in range(10):
        said = generator.choice(ids, 60)
        for stops in (["\n"], ["\na"], ["ab", "é\n"], ["😀"]):
            texts = (decode_fallback(said[:n].tolist()) for n in range(1, 61))
            expected = next((n for n, text in enumerate(texts, 1) if has_stop(text, stops)), None)
            assert search_by(burst, StopSearch(decode_fallback, stops), said) == expected


@pytest.mark.parametrize("burst", [8, 3000])
def test_a_long_response_costs_no_more_per_token(burst):
    lengths = []

    def counted(ids):
        lengths.append(len(ids))
        return decode(ids)

    said = tokens("word " * 400 + "€" * 3 + "<stop>")
    assert search_by(burst, StopSearch(counted, ["<stop>"]), said) == len(said)
    assert max(lengths) < 80


def test_text_is_cut_before_the_first_stop_string():
    assert cut_at_stop("one two", ["two", "e"]) == "on" and cut_at_stop("one", ["x"]) == "one"
