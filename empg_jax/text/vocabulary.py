"""Whether a tokenizer is the one that a model was trained with, as far as the model's folder can tell."""

from __future__ import annotations

import json
import pathlib

from empg_jax.text.tokenizer import Tokenizer, load_backend


def check_vocabulary(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Compare a tokenizer with what stands in a model's folder.

    The model's own ``tokenizer.json``, where there is one, must give no id another meaning (a tokenizer may
    lack tokens, or know more); the end-of-text tokens that ``config.json`` names by id must exist.

    Args:
      tokenizer: the tokenizer that is to be used with the model.
      folder: the model's folder.

    Raises:
      ValueError: they do not fit; says where they differ.
    """
    for index in _end_ids(folder / "config.json"):
        if tokenizer.id_to_token(index) is None:
            raise ValueError(
                f"{folder / 'config.json'} says eos_token_id={index}, but the tokenizer (largest id "
                f"{tokenizer.vocab_size - 1}) has no such token: it is another model's"
            )
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    own = {index: token for token, index in load_backend(folder).get_vocab(with_added_tokens=True).items()}
    other = {index: token for token, index in tokenizer.vocabulary().items()}
    shared = own.keys() & other.keys()
    wrong = sorted(index for index in shared if own[index] != other[index])
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"the tokenizer and the model's own ({file}) disagree on {len(wrong):,} of {len(shared):,} ids; "
            f"the first is {first}: {other[first]!r} instead of {own[first]!r}"
        )


def _end_ids(file: pathlib.Path) -> list[int]:
    """Return the end-of-text ids of a config.json; none without a readable file (whoever loads the model
    tells).
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError):
        return []
    return [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]
