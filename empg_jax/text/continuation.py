"""The text of a response's tokens, as it stands behind its prompt."""

from __future__ import annotations

from collections.abc import Iterable

from empg_jax.text.tokenizer import Tokenizer


class Continuation:
    """The text of tokens that go on with a text.

    Some decoders strip the space at the beginning of what they are given. So the tokens are decoded behind an
    ordinary one, whose text is cut off.

    Args:
      tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode, self._before = tokenizer.decode, tokenizer.encode("a")[-1:]
        self._cut = {skip: len(self._decode(self._before, skip_special=skip)) for skip in (False, True)}

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ids, as `Tokenizer.decode`."""
        text = self._decode([*self._before, *ids], skip_special=skip_special)
        return text[self._cut[skip_special] :]
