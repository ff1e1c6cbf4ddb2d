"""The text that each token adds, in time that grows with the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

INCOMPLETE = "\ufffd"  # what a character decodes to of which bytes are missing


def split_text(tokens: Sequence[int], decode: Decode) -> list[str]:
    """Split the decoded text into the parts that the tokens add.

    A character whose bytes are spread over several tokens is shown at the token that completes it. Each token
    is decoded behind the few before it, since many tokenizers let neighbors decide about spaces.
    """
    pieces: list[str] = []
    before, start = 0, 0  # tokens [before, start) are shown, and decoded again as the context of the next
    for end in range(1, len(tokens) + 1):
        context, text = decode(tokens[before:start]), decode(tokens[before:end])
        is_last = end == len(tokens)
        # Bytes that never become a character must not be held back forever.
        if text.endswith(INCOMPLETE) and not is_last and end - start < 8:
            pieces.append("")
            continue
        is_longer = text.startswith(context)
        pieces.append(text[len(context) :] if is_longer else decode(tokens[start:end]))
        before, start = start, end
    return pieces
