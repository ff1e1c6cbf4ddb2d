"""Conversion between text and token ids: tokenizers, chat templates, and the chat renderer."""

from empg_jax.text.builtin import build_byte_tokenizer, build_phrase_tokenizer
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.template import ChatTemplate, ChatTemplateError
from empg_jax.text.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "ChatRenderer",
    "ChatTemplate",
    "ChatTemplateError",
    "Tokenizer",
    "build_byte_tokenizer",
    "build_phrase_tokenizer",
    "load_tokenizer",
]
