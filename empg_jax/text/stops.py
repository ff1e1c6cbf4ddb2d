"""Stop strings: the search for the end of a response in its text, while its tokens arrive.

Rollouts and the server share it. It looks at text, because a tokenizer may split a string in many ways, and a
token may hold its end together with something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Decode = Callable[[Iterable[int]], str]
REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
# Characters at the start of a part's text that may differ from the whole's: a space that a decoder strips.
_UNSURE = 4
_BURST = 32  # tokens that are searched together: the cost of a long response must not grow with its square
CHARACTER_TOKENS = 8  # tokens before a place in the text among which a character begins, but for nonsense


class StopSearch:
    """The search for the end of one response that the engine itself does not see.

    Args:
      decode: maps token ids to text.
      stops: stop strings.
      stop_ids: further stop tokens.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], stop_ids: Sequence[int] = ()) -> None:
        self._decode, self._stops, self._stop_ids = decode, tuple(stops), np.asarray(stop_ids, np.int32)
        self._longest = max(map(len, self._stops), default=0)
        self._seen = 0  # tokens without an end
        self._start = 0  # token at which the text begins that may hold the beginning of a stop string

    def __call__(self, tokens: np.ndarray) -> int | None:
        """Return how many tokens the response has if it ends, else None; the last one completes the stop."""
        seen, self._seen = self._seen, len(tokens)
        found = np.flatnonzero(np.isin(tokens[seen:], self._stop_ids))
        limit = seen + int(found[0]) + 1 if len(found) else None
        end = len(tokens) if limit is None else limit
        for start in range(seen, end if self._stops else seen, _BURST):
            count = self._search(tokens[: min(start + _BURST, end)], start)
            if count is not None:
                return count
        return limit

    def _search(self, tokens: np.ndarray, seen: int) -> int | None:
        text = self._text(tokens)
        # Each length is tried, so that the result does not depend on the burst's size. The first bytes of a
        # character may turn a stop string before them into replacements until its last bytes are there.
        if REPLACEMENT in text or has_stop(text, self._stops):
            for count in range(seen + 1, len(tokens) + 1):
                if has_stop(self._text(tokens[:count]), self._stops):
                    return count
        self._advance(tokens)
        return None

    def _text(self, tokens: np.ndarray) -> str:
        return self._decode(tokens[self._start :].tolist())

    def _advance(self, tokens: np.ndarray) -> None:
        """Leave the text behind that no stop string can begin in: a long response costs no more per token."""
        needed, start, step = self._longest + _UNSURE, len(tokens), 1
        while start > self._start:
            start, step = max(self._start, start - max(needed, step)), 2 * step
            text = self._decode(tokens[start:].tolist())
            if len(text) - text.count(REPLACEMENT) < needed:
                continue
            for place in range(start, max(self._start, start - CHARACTER_TOKENS), -1):
                # Bytes in tokens of their own are decoded together, and all are replaced where one is wrong.
                # So the text must not begin inside a character, nor among bytes that are no text.
                if not self._decode(tokens[self._start : place].tolist()).endswith(REPLACEMENT):
                    self._start = place
                    return


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Return whether a stop string occurs."""
    return any(stop in text for stop in stops)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    stop = first_stop(text, stops)
    return text if stop is None else text.partition(stop)[0]


def first_stop(text: str, stops: Sequence[str]) -> str | None:
    """Return the stop string that occurs first in a text; None where there is none."""
    return min((stop for stop in stops if stop in text), key=text.find, default=None)
