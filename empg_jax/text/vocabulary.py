"""The check that a tokenizer belongs to a model, based on the files in the model's folder."""

from __future__ import annotations

import pathlib

from empg_jax.files import read_json_object
from empg_jax.text.tokenizer import Tokenizer, load_backend


def check_vocabulary(tokenizer: Tokenizer, folder: pathlib.Path) -> None:
    """Check that a tokenizer matches the files in a model's folder.

    If the folder has a ``tokenizer.json``, ids that both tokenizers know must have the same string; either
    may have additional tokens. The end-of-text ids in ``config.json`` must exist in the tokenizer.

    Args:
      tokenizer: the tokenizer to use with the model.
      folder: the model's folder.

    Raises:
      ValueError: the tokenizer does not match; the message gives the first difference.
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
    """Return the end-of-text ids of a config.json.

    An unreadable file gives no ids; loading the model reports that error.
    """
    try:
        value = read_json_object(file).get("eos_token_id")
    except (OSError, ValueError):
        return []
    return [index for index in (value if isinstance(value, list) else [value]) if isinstance(index, int)]
