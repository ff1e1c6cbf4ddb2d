"""Tokens to text while they arrive: pieces that never change again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from empg_jax.text.stops import REPLACEMENT, Decode, cut_at_stop


class TextStream:
    """A response's text, piece by piece.

    A piece is held back while it could still change: an incomplete character at the end, or the beginning of
    a stop string.

    Args:
      decode: maps token ids to text, without control tokens.
      stops: strings that end the response; the text ends before the first one.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        self._sent = 0  # characters

    def feed(self, tokens: np.ndarray, *, is_final: bool) -> str:
        """Return the new piece, given all tokens so far."""
        text = cut_at_stop(self._decode(tokens.tolist()), self._stops)
        end = len(text) if is_final else self._settled(text)
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _settled(self, text: str) -> int:
        """Return the length of the text that later tokens cannot change."""
        end = len(text.rstrip(REPLACEMENT))
        for stop in self._stops:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text[:end].endswith(stop[:size]):
                    end -= size
                    break
        return end
