"""Stop strings: the search for the end of a response in its text, while its tokens arrive.

Rollouts and the server share it. It looks at text, because a tokenizer may split a string in many ways, and a
token may hold its end together with something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

Decode = Callable[[Iterable[int]], str]
# Characters at the start of a part's text that may differ from the whole text's: the rest of a character
# whose first bytes are in earlier tokens, or a space that a decoder strips.
_UNSURE = 4


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
        if self._stops:
            if has_stop(self._text(tokens[:limit]), self._stops):
                # Few tokens are new, so each length is tried: the result must not depend on the burst's size.
                for count in range(seen + 1, len(tokens) + 1):
                    if has_stop(self._text(tokens[:count]), self._stops):
                        return count
            self._advance(tokens)
        return limit

    def _text(self, tokens: np.ndarray) -> str:
        return self._decode(tokens[self._start :].tolist())

    def _advance(self, tokens: np.ndarray) -> None:
        """Leave the text behind that no stop string can begin in: a long response costs no more per token."""
        needed, start, step = self._longest + _UNSURE, len(tokens), 1
        while start > self._start:
            start, step = max(self._start, start - max(needed, step)), 2 * step
            if len(self._decode(tokens[start:].tolist())) >= needed:
                break
        self._start = start


def has_stop(text: str, stops: Sequence[str]) -> bool:
    """Return whether a stop string occurs."""
    return any(stop in text for stop in stops)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
