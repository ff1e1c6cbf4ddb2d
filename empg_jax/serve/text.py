"""Tokens to text: in pieces that never change again, and with the place of each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from empg_jax.text.stops import CHARACTER_TOKENS, REPLACEMENT, Decode, cut_at_stop


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


class TextPlaces:
    """The places in a response's text at which its tokens begin.

    A place is the number of characters that the tokens before it complete. Tokens of a stop string, which is
    no part of the text, have places behind the text's end.

    Args:
      decode: maps token ids to text that goes on with the text before them.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._start = self._whole = 0  # characters before the open tokens, and whole ones in them
        self._open: list[int] = []  # newest tokens, with an incomplete character at their end

    def take(self, tokens: Iterable[int]) -> list[int]:
        """Return the places of the next tokens, in characters."""
        places = []
        for token in tokens:
            places.append(self._start + self._whole)
            self._open.append(token)
            text = self._decode(self._open)
            self._whole = len(text.rstrip(REPLACEMENT))
            if self._whole == len(text) or len(self._open) >= CHARACTER_TOKENS:
                self._start, self._whole, self._open = self._start + len(text), 0, []
        return places
