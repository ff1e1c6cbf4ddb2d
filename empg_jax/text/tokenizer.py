"""A thin wrapper over a Hugging Face fast tokenizer: encoding, stop ids, chat template, saving and loading.

It wraps a ``tokenizers.Tokenizer``. ``transformers`` is imported only for a folder without
``tokenizer.json``, to convert a slow tokenizer.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from empg_jax.files import read_json_object
from empg_jax.hf.hub import find_folder
from empg_jax.text.template import ChatTemplate, ChatTemplateError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Parts of a response's text that parsers read, though some vocabularies have them as control tokens.
_TAGS = frozenset(("<think>", "</think>", "<tool_call>", "</tool_call>"))
_PROBE = "empgprobe"  # a content that no template changes
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)


class Tokenizer:
    """A tokenizer with its chat template and its special ids.

    Args:
      backend: the fast tokenizer.
      chat_template: Jinja source, or None for a model without one.
      special_tokens: named special tokens, for example ``{"eos_token": "<|im_end|>"}``.
      stop_tokens: tokens that end a turn; ``eos_token`` is always added to them.
      config: additional keys for ``tokenizer_config.json``.
      generation: additional keys for ``generation_config.json``, such as the model's own temperature.

    Raises:
      ValueError: a special or stop token is not in the vocabulary, or no token ends a turn.

    Attributes:
      pad_id: id of the padding token, or of the first stop token if the tokenizer has none.
      turn_end_id: id of the control token with which the chat template ends an assistant's turn, or None.
      stop_ids: ids at which a sampler stops: ``turn_end_id`` first, then the stop tokens.
      special_ids: ids of all control tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        stop_tokens: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
    ):
        self._backend = backend
        # Some tokenizer files enable padding or truncation, which would change the ids silently.
        backend.no_padding()
        backend.no_truncation()
        self._config, self._generation = dict(config or {}), dict(generation or {})
        self.special_tokens = dict(special_tokens or {})
        for name, token in self.special_tokens.items():
            self._require_id(token, name)
        self._mark_special(stop_tokens)
        # Ids may have gaps, so the size of the embedding follows from the largest id, not from the count.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.chat_template = (
            None if chat_template is None else ChatTemplate(chat_template, self.special_tokens)
        )
        added = backend.get_added_tokens_decoder().items()
        self.special_ids = frozenset(index for index, token in added if token.special)
        self._tags = frozenset(index for index, token in added if token.special and token.content in _TAGS)
        self._hidden = self.special_ids - self._tags
        hidden = sorted((token.content for i, token in added if i in self._hidden), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, hidden)) or "(?!)")
        self.turn_end_id = self._find_turn_end()
        eos = self.special_tokens.get("eos_token")
        self.stop_tokens: tuple[str, ...] = tuple(dict.fromkeys([*stop_tokens, *([eos] if eos else [])]))
        named = [self._require_id(name, "stop token") for name in self.stop_tokens]
        # A base model's eos_token often differs from the token that ends its chat turns: stop at both.
        first = [] if self.turn_end_id is None else [self.turn_end_id]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*first, *named]))
        if not self.stop_ids:
            raise ValueError("the tokenizer names no token that ends a turn: give eos_token or stop_tokens")
        self.special_ids |= frozenset(self.stop_ids)
        pad = self.special_tokens.get("pad_token")
        self.pad_id: int = self._require_id(pad, "pad_token") if pad is not None else self.stop_ids[0]

    def encode(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the ids of a text, with the tokenizer's own begin of text only if ``add_special``."""
        return self._backend.encode(text, add_special_tokens=add_special).ids

    def find_control(self, text: str) -> tuple[str, int] | None:
        """Return the first control token that a text holds, and its place in characters; None without one.

        `encode` makes the control token of it. Tags of thoughts and of tool calls do not count.
        """
        found = self._control.search(text)
        return None if found is None else (found.group(), found.start())

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids, without control tokens unless ``skip_special`` is False.

        Tags of thoughts and of tool calls stay, whatever the vocabulary calls them.
        """
        ids = list(ids)
        if skip_special and not self._tags.isdisjoint(ids):
            ids, skip_special = [index for index in ids if index not in self._hidden], False
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token's exact string, or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, index: int) -> str | None:
        """Return the string of one id, or None for an id outside the vocabulary."""
        return self._backend.id_to_token(index)

    def bytes_of(self, index: int) -> bytes | None:
        """Return the bytes of a token that may be a part of a character; None where its string does not tell.

        Strings of byte-level vocabularies tell, and SentencePiece's pieces of a byte (``<0xE2>``).
        """
        token = self.id_to_token(index) or ""
        if piece := re.fullmatch("<0x([0-9A-F]{2})>", token):
            return bytes.fromhex(piece[1])
        found = [_byte_table().get(character) for character in token]
        return bytes(byte for byte in found if byte is not None) if found and None not in found else None

    def vocabulary(self) -> dict[str, int]:
        """Return every token's string with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **options: Any
    ) -> str:
        """Return the chat template's text of a conversation.

        Raises:
          ChatTemplateError: there is no template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template: add chat_template.jinja to its folder, "
                "a chat_template key to its tokenizer_config.json, or use the model's instruct version"
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **options)

    def save(self, folder: str | pathlib.Path) -> None:
        """Write the tokenizer in Hugging Face's format, with its stop tokens in generation_config.json.

        The other files are tokenizer.json, tokenizer_config.json and special_tokens_map.json.
        """
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, **self.special_tokens}
        config["stop_tokens"] = list(self.stop_tokens)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template.source
        self._backend.save(str(path / "tokenizer.json"))
        _write_json(path / "tokenizer_config.json", config)
        _write_json(path / "special_tokens_map.json", self.special_tokens)
        ids = {"eos_token_id": list(self.stop_ids), "pad_token_id": self.pad_id}
        _write_json(path / "generation_config.json", self._generation | ids)

    def _find_turn_end(self) -> int | None:
        if self.chat_template is None:
            return None
        probe = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            tail = self.render(probe, add_generation_prompt=False).rpartition(_PROBE)[2]
        except ChatTemplateError:
            return None
        ids = self.encode(tail)
        return ids[0] if ids and ids[0] in self.special_ids else None

    def _mark_special(self, stop_tokens: Sequence[str]) -> None:
        """Make named tokens and stop tokens special in the backend, as transformers does when it loads.

        A file may have them as ordinary added tokens. The token of unknown words stays what it is, so that
        lost words are seen in decoded text; and so do stop tokens that are ordinary words.
        """
        added = {token.content: token for token in self._backend.get_added_tokens_decoder().values()}
        named = [token for name, token in self.special_tokens.items() if name != "unk_token"]
        marked = []
        for text in dict.fromkeys([*named, *(text for text in stop_tokens if text in added)]):
            token = added.get(text, tokenizers.AddedToken(text, normalized=False))
            if not token.special:
                token.special = True
                marked.append(token)
        self._backend.add_special_tokens(marked)

    def _require_id(self, token: str, what: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise ValueError(f"{what} {token!r} is not in the tokenizer's vocabulary")
        return index


def load_tokenizer(path: str | pathlib.Path, *, chat_template: str | None = None) -> Tokenizer:
    """Load a tokenizer from a local folder or, when there is no such folder, from a hub id (``owner/name``).

    Args:
      path: folder with ``tokenizer.json`` (or files that ``transformers`` can convert), or a hub id.
      chat_template: Jinja source that replaces the folder's own template.

    Raises:
      FileNotFoundError: there is neither such a folder nor such a hub id.
      ValueError: a file does not parse, or a special or stop token is unknown.
    """
    folder = find_folder(path, _FILES, "tokenizer")
    config = _read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    if chat_template is None:
        chat_template = _read_chat_template(folder, config)
    backend = load_backend(folder)
    stop_tokens = config.get("stop_tokens", [])
    if not isinstance(stop_tokens, list) or not all(isinstance(token, str) for token in stop_tokens):
        file = folder / "tokenizer_config.json"
        raise ValueError(f"{file}: stop_tokens={stop_tokens!r} is no list of texts")
    stop_tokens = list(stop_tokens)
    generation = _read_json(folder / "generation_config.json")
    named = "generation_config.json" if generation.get("eos_token_id") is not None else "config.json"
    for index in _stop_ids(_read_json(folder / named), named):
        token = backend.id_to_token(index)
        if token is None:
            raise ValueError(f"{folder / named}: eos_token_id {index} is not in the tokenizer's vocabulary")
        stop_tokens.append(token)
    try:
        return Tokenizer(
            backend,
            chat_template=chat_template,
            special_tokens=special_tokens,
            stop_tokens=stop_tokens,
            config=config,
            generation=generation,
        )
    except ValueError as error:
        raise ValueError(f"tokenizer in {folder}: {error}") from error


def read_chat_template(path: str | pathlib.Path) -> str | None:
    """Read the source of the chat template in a tokenizer's folder; None where there is none."""
    folder = find_folder(path, _FILES, "tokenizer")
    return _read_chat_template(folder, _read_json(folder / "tokenizer_config.json"))


def load_backend(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """Read only the ``tokenizers`` backend of a folder, without special token names and template.

    Raises:
      FileNotFoundError: the folder contains no tokenizer.
      ValueError: the file does not parse.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{file} is not a valid fast tokenizer: {error}") from error
    slow = [name for name in ("tokenizer.model", "vocab.json", "vocab.txt") if (folder / name).is_file()]
    if not slow:
        found = sorted(entry.name for entry in folder.iterdir())
        raise FileNotFoundError(f"{folder} holds no tokenizer.json; it holds {found}")
    import transformers  # imported late: it takes about a second, and only slow tokenizers need it

    return transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=True).backend_tokenizer


def _read_chat_template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates; the plain chat one is called "default"
        try:
            named = {entry["name"]: entry["template"] for entry in template}
        except (TypeError, KeyError):
            raise ValueError(f"{folder}: chat_template is no list of templates with names") from None
        if "default" not in named:
            raise ValueError(f"{folder}: chat_template has no entry named 'default', only {sorted(named)}")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{folder}: chat_template is a {type(template).__name__}, not a text")
    return template


@functools.cache
def _byte_table() -> dict[str, int]:
    """Return the bytes behind the characters of byte-level vocabularies, as GPT-2 began them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _special_tokens(config: Mapping[str, Any], special_map: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in _SPECIAL_NAMES:
        token = config.get(name, special_map.get(name))
        if isinstance(token, dict):  # an AddedToken as JSON
            token = token.get("content", token)
        if token is not None:
            if not isinstance(token, str):
                raise ValueError(f"{name}={token!r} in the tokenizer's files is no text")
            named[name] = token
    return named


def _stop_ids(keys: Mapping[str, Any], named: str) -> list[int]:
    ids = keys.get("eos_token_id")
    if ids is None:
        return []
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(index) is int for index in ids):
        raise ValueError(f"eos_token_id={ids} in {named} are no token ids")
    return ids


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
