"""Tokens to text while they arrive: pieces that never change again, and the search for stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Decode = Callable[[Iterable[int]], str]
REPLACEMENT = "\ufffd"  # what an incomplete character decodes to


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


class StopSearch:
    """The search for the end of a response that the engine itself does not see.

    Args:
      decode: maps token ids to text.
      stops: stop strings.
      stop_ids: further stop tokens.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], stop_ids: Sequence[int]) -> None:
        self._decode, self._stops, self._stop_ids = decode, tuple(stops), np.asarray(stop_ids, np.int32)
        self._seen = 0  # tokens

    def __call__(self, tokens: np.ndarray) -> int | None:
        """Return how many tokens the response has if it ends, else None; the last one completes the stop."""
        start, self._seen = self._seen, len(tokens)
        found = np.flatnonzero(np.isin(tokens[start:], self._stop_ids))
        limit = start + int(found[0]) + 1 if len(found) else None
        if self._stops and has_stop(self._decode(tokens[:limit].tolist()), self._stops):
            # Few tokens are new, so each length is tried: the result must not depend on the burst's size.
            for count in range(start + 1, len(tokens) + 1):
                if has_stop(self._decode(tokens[:count].tolist()), self._stops):
                    return count
        return limit


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Return whether a stop string occurs."""
    return any(stop in text for stop in stops)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
