"""Taggers that find the nouns of a product title, the only part of WebShop's reward with a language model.

The original uses spaCy. Its models are not on the package index, so the tagger is replaceable. Every ``info``
contains the name of the used tagger: ``spacy:<model>`` if a model is installed, else ``tokens``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

TAGGERS = ("auto", "spacy", "tokens")
_MODELS = ("en_core_web_sm", "en_core_web_md", "en_core_web_lg")
_NOUNS = frozenset(("NOUN", "PROPN"))
_CACHED_TITLES = 4096


class Tagger(NamedTuple):
    """A named function from a title to its nouns in lower case, in order and with repetitions."""

    name: str
    nouns: Callable[[str], tuple[str, ...]]


def make_tagger(name: str) -> Tagger:
    """Build a tagger.

    Args:
      name: ``spacy`` (the first installed one of the small, medium and large English web models), ``tokens``
        (every word and every punctuation mark counts as a noun; this never changes the reward of the goal's
        own product), or ``auto`` (spaCy if a model is installed, else tokens).

    Raises:
      ValueError: the name is unknown, or ``spacy`` has no installed model.
    """
    if name not in TAGGERS:
        raise ValueError(f"unknown webshop tagger {name!r}; the taggers are {', '.join(TAGGERS)}")
    model = None if name == "tokens" else _installed_model()
    if name == "spacy" and model is None:
        raise ValueError(
            f"webshop tagger 'spacy' needs the package spacy and one of its models {', '.join(_MODELS)}; "
            "none is installed (tagger 'tokens' needs nothing)"
        )
    return Tagger("tokens", _every_token) if model is None else _spacy_tagger(model)


def lexicon_tagger(nouns: Iterable[str]) -> Tagger:
    """Make a tagger for which exactly these words are nouns, for a catalog with a known vocabulary."""
    known = frozenset(nouns)
    return Tagger("lexicon", lambda title: tuple(word for word in _every_token(title) if word in known))


def _installed_model() -> str | None:
    if importlib.util.find_spec("spacy") is None:
        return None
    return next((model for model in _MODELS if importlib.util.find_spec(model) is not None), None)


@functools.lru_cache(maxsize=_CACHED_TITLES)
def _every_token(title: str) -> tuple[str, ...]:
    return tuple(token.lower() for token in re.findall(r"\w+|[^\w\s]", title))


@functools.lru_cache(maxsize=1)
def _spacy_tagger(model: str) -> Tagger:
    pipeline: Any = importlib.import_module("spacy").load(model)

    @functools.lru_cache(maxsize=_CACHED_TITLES)
    def nouns(title: str) -> tuple[str, ...]:
        return tuple(token.text.lower() for token in pipeline(title) if token.pos_ in _NOUNS)

    return Tagger(f"spacy:{model}", nouns)
