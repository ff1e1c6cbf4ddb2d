"""Small tokenizers for small models: a token per phrase of a closed vocabulary, or per byte of any text.

A tiny model that trains in minutes should not spend its capacity on spelling. A whole phrase ("go to",
"apple 1") is therefore one token, and a chat turn adds only two control tokens to its content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from empg_jax.text.tokenizer import Tokenizer

PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|unk|>",
)
BYTES = "bytes"  # the name of `build_byte_tokenizer` in a configuration
PUNCTUATION = ".,:;!?"  # always in the vocabulary; printed without a space before it

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' ~ message.role) }}"
    "{% endif %}"
    "{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_phrase_tokenizer(phrases: Sequence[str]) -> Tokenizer:
    """Build a word-level tokenizer over multi-word phrases.

    Encoding prefers the longest phrase; white space only separates phrases. A word outside the vocabulary
    becomes one ``<|unk|>``. Decoding joins phrases with single spaces and attaches punctuation to the left.
    Hence ``decode(encode(text)) == text`` for text of known phrases with this spacing.

    The ids are control tokens, punctuation, then the phrases in the given order (duplicates are dropped). The
    same list always gives the same ids.

    Args:
      phrases: the closed vocabulary, for example ``["go to", "apple 1", "fridge 1"]``. Case matters.

    Raises:
      ValueError: a phrase is empty or contains a control token.
    """
    controls = (PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN)
    vocabulary = list(dict.fromkeys([*controls, *PUNCTUATION, *(_normalize(phrase) for phrase in phrases)]))
    for phrase in vocabulary[len(controls) :]:
        if not phrase or any(control in phrase for control in controls):
            raise ValueError(
                f"phrase {phrase!r} is empty or contains a control token ({', '.join(controls)})"
            )

    backend = tokenizers.Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(vocabulary)}, unk_token=UNKNOWN)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    # Inverted removal keeps the matches and drops the text between them, which is only white space.
    pattern = rf"{_phrase_pattern(vocabulary[len(controls) :])}|\w+|[^\w\s]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    closing = re.escape(PUNCTUATION)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(Regex(rf"\A(?![{closing}]\z)"), " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    # <|unk|> is no special token, so that lost words stay visible in decoded text.
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in controls[:-1]])
    backend.add_tokens([tokenizers.AddedToken(UNKNOWN, special=False)])
    return Tokenizer(
        backend,
        chat_template=CHAT_TEMPLATE,
        special_tokens={"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN},
    )


def build_byte_tokenizer(chat_template: str | None = None) -> Tokenizer:
    """Builds a tokenizer with one token for each byte of UTF-8, so that any text comes back exactly.

    The id of a byte is its value; the control tokens come behind. In a text they mean themselves, as with any
    tokenizer: write no ``<|end|>`` into an observation.

    Args:
      chat_template: Jinja source in place of the built-in one, which ends every message with ``<|end|>``.
    """
    backend = tokenizers.Tokenizer(models.BPE(_byte_characters(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    controls = (PAD, END, USER, ASSISTANT, SYSTEM)
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in controls])
    return Tokenizer(
        backend,
        chat_template=chat_template or CHAT_TEMPLATE,
        special_tokens={"eos_token": END, "pad_token": PAD},
    )


def _byte_characters() -> dict[str, int]:
    """The printable character that a byte-level model shows for each byte (GPT-2's table), with the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    pairs = [*((byte, byte) for byte in shown), *((byte, 256 + place) for place, byte in enumerate(hidden))]
    return {chr(code): byte for byte, code in sorted(pairs)}


def _normalize(phrase: str) -> str:
    return " ".join(phrase.split())


def _phrase_pattern(phrases: Iterable[str]) -> str:
    """Build a regular expression that prefers the longest phrase and never ends inside a word.

    The phrases are merged into a tree of words. Without it, the expression would try hundreds of alternatives
    at every position, which would take most of the time of a short turn.
    """
    tree: dict[str, Any] = {}
    for phrase in phrases:
        node = tree
        for word in phrase.split(" "):
            node = node.setdefault(word, {})
        node[""] = {}  # a phrase may end here
    # A phrase must not start inside a word, but a phrase that starts with punctuation may start anywhere.
    words = {word: node for word, node in tree.items() if re.match(r"\w", word)}
    marks = {word: node for word, node in tree.items() if word not in words}
    return "|".join([rf"(?<!\w){_alternatives(words)}"] * bool(words) + [_alternatives(marks)] * bool(marks))


def _alternatives(tree: dict[str, Any]) -> str:
    branches = []
    for word in sorted((word for word in tree if word), key=lambda word: (-len(word), word)):
        boundary = r"(?!\w)" if re.search(r"\w\Z", word) else ""
        rest = {key: node for key, node in tree[word].items() if key}
        tail = f"(?: {_alternatives(rest)})" if rest else ""
        branches.append(re.escape(word) + boundary + tail + ("?" if tail and "" in tree[word] else ""))
    return f"(?:{'|'.join(branches)})"
