"""Conversion of text to search terms, equal to Lucene's English analyzer.

The steps are Unicode word breaks (UAX #29 with emoji as words), removal of the possessive ``'s``, lower case,
removal of English stop words, and Porter stems. Every character is first mapped to a one-letter class. One
small regular expression over the string of classes then finds the words. All of its quantifiers are
possessive, so that its time is linear in every text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

from empg_envs.webshop.porter import stem

STOP_WORDS = frozenset(
    (
        *(
            "a",
            "an",
            "and",
            "are",
            "as",
            "at",
            "be",
            "but",
            "by",
            "for",
            "if",
            "in",
            "into",
            "is",
            "it",
            "no",
        ),
        *("not", "of", "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this"),
        *("to", "was", "will", "with"),
    )
)
MAX_TOKEN = 255  # Lucene's tokenizer cuts longer words into pieces of this length

# Classes: A letter, N digit, K Katakana, S a syllabic script without spaces, I one-letter words, X connector,
# L joins letters, M joins digits, B joins both, E attaches to what precedes, Z zero-width joiner,
# P pictograph, R regional indicator, O other.
_JOINERS = {
    **dict.fromkeys("\u00b7\u0387\u055f\u05f4\u2027\ufe13\ufe55\uff1a:", "L"),
    **dict.fromkeys("\u2018\u2019\u2024\ufe52\uff07\uff0e.'", "B"),
    **dict.fromkeys(
        "\u037e\u0589\u060c\u060d\u066c\u07f8\u2044\ufe10\ufe14\ufe50\ufe54\uff0c\uff1b,;",
        "M",
    ),
    "\u200d": "Z",
    "\u200b": "O",
    "\u202f": "X",
}
_RANGES = (
    ("K", ((0x3031, 0x3035), (0x309B, 0x309C), (0x30A0, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF))),
    ("K", ((0x32D0, 0x32FE), (0x3300, 0x3357), (0xFF66, 0xFF9D), (0x1B000, 0x1B000))),
    ("I", ((0x3041, 0x3096), (0x309D, 0x309F), (0x1B001, 0x1B11E), (0x1F200, 0x1F200))),
    ("I", ((0x2E80, 0x2FD5), (0x3005, 0x3005), (0x3007, 0x3007), (0x3021, 0x3029), (0x3038, 0x303B))),
    ("I", ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAD9), (0x20000, 0x3134A))),
    ("S", ((0x0E01, 0x0E3A), (0x0E40, 0x0E4E), (0x0E81, 0x0ECE), (0x0EDC, 0x0EDF))),
    ("S", ((0x1000, 0x103F), (0x1050, 0x108F), (0x109A, 0x109F), (0x1780, 0x17D3), (0x1950, 0x19DF))),
    ("E", ((0x1F3FB, 0x1F3FF), (0xFF9E, 0xFF9F), (0xE0020, 0xE007F))),
    ("R", ((0x1F1E6, 0x1F1FF),)),
    ("P", ((0xA9, 0xA9), (0xAE, 0xAE), (0x3030, 0x3030), (0x303D, 0x303D))),
    ("P", ((0x2122, 0x2122), (0x203C, 0x203C), (0x2049, 0x2049), (0x2139, 0x2139), (0x2194, 0x2199))),
    ("P", ((0x21A9, 0x21AA), (0x231A, 0x231B), (0x2328, 0x2328), (0x2388, 0x2388), (0x23CF, 0x23CF))),
    ("P", ((0x23E9, 0x23F3), (0x23F8, 0x23FA), (0x24C2, 0x24C2), (0x25AA, 0x25AB), (0x25B6, 0x25B6))),
    ("P", ((0x25C0, 0x25C0), (0x25FB, 0x25FE), (0x2600, 0x2605), (0x2607, 0x2612), (0x2614, 0x2685))),
    ("P", ((0x2690, 0x2705), (0x2708, 0x2712), (0x2714, 0x2714), (0x2716, 0x2716), (0x271D, 0x271D))),
    ("P", ((0x2721, 0x2721), (0x2728, 0x2728), (0x2733, 0x2734), (0x2744, 0x2744), (0x2747, 0x2747))),
    ("P", ((0x274C, 0x274C), (0x274E, 0x274E), (0x2753, 0x2755), (0x2757, 0x2757), (0x2763, 0x2767))),
    ("P", ((0x2795, 0x2797), (0x27A1, 0x27A1), (0x27B0, 0x27B0), (0x27BF, 0x27BF), (0x2934, 0x2935))),
    ("P", ((0x2B05, 0x2B07), (0x2B1B, 0x2B1C), (0x2B50, 0x2B50), (0x2B55, 0x2B55), (0x3297, 0x3297))),
    ("P", ((0x3299, 0x3299), (0x1F000, 0x1F0FF), (0x1F10D, 0x1F10F), (0x1F12F, 0x1F12F))),
    ("P", ((0x1F16C, 0x1F171), (0x1F17E, 0x1F17F), (0x1F18E, 0x1F18E), (0x1F191, 0x1F19A))),
    ("P", ((0x1F1AD, 0x1F1E5), (0x1F201, 0x1F20F), (0x1F21A, 0x1F21A), (0x1F22F, 0x1F22F))),
    ("P", ((0x1F232, 0x1F23A), (0x1F23C, 0x1F23F), (0x1F249, 0x1F3FA), (0x1F400, 0x1F53D))),
    ("P", ((0x1F546, 0x1F64F), (0x1F680, 0x1F6FF), (0x1F774, 0x1F77F), (0x1F7D5, 0x1F7FF))),
    ("P", ((0x1F80C, 0x1F80F), (0x1F848, 0x1F84F), (0x1F85A, 0x1F85F), (0x1F888, 0x1F88F))),
    ("P", ((0x1F8AE, 0x1F8FF), (0x1F90C, 0x1F93A), (0x1F93C, 0x1F945), (0x1F947, 0x1FAFF))),
    ("P", ((0x1FC00, 0x1FFFD),)),
    ("A", ((0x02C2, 0x02C5), (0x02D2, 0x02D7), (0x02DE, 0x02DF), (0x02E5, 0x02EB), (0x02ED, 0x02ED))),
    ("A", ((0x02EF, 0x02FF), (0x055A, 0x055C), (0x055E, 0x055E), (0x058A, 0x058A), (0x05F3, 0x05F3))),
    ("A", ((0x24B6, 0x24E9), (0x10FC, 0x10FC))),
)
_CATEGORIES = {
    **dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo", "Nl"), "A"),
    **dict.fromkeys(("Mn", "Mc", "Me", "Cf"), "E"),
    "Nd": "N",
    "Pc": "X",
}


class _Classes(dict[int, str]):
    """A cache from code points to classes."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        found = _JOINERS.get(character) or next(
            (name for name, ranges in _RANGES if any(low <= code <= high for low, high in ranges)),
            _CATEGORIES.get(unicodedata.category(character), "O"),
        )
        self[code] = found
        return found


_CLASSES = _Classes()
_ATTACHED = "[EZ]*+"
_LETTERS = f"A{_ATTACHED}(?:(?:[LB]{_ATTACHED})?A{_ATTACHED})*+"
_DIGITS = f"N{_ATTACHED}(?:(?:[MB]{_ATTACHED})?N{_ATTACHED})*+"
_RUN = f"(?:(?:{_LETTERS}|{_DIGITS})++|(?:K{_ATTACHED})++)"
_WORD = f"(?:X{_ATTACHED})*+{_RUN}(?:(?:X{_ATTACHED})++{_RUN})*+(?:X{_ATTACHED})*+"
_EMOJI = "PE*+(?:Z++PE*+)*+|RRE*+"
# Connectors alone are no word; the last alternative skips a run of them in one match.
_TOKENS = re.compile(f"(?P<token>{_EMOJI}|{_WORD}|I{_ATTACHED}|(?:S{_ATTACHED})++)|[XEZ]++")


def tokenize(text: str) -> Iterator[str]:
    """Yield the words of a text in their original spelling."""
    classes = text.translate(_CLASSES)
    for match in _TOKENS.finditer(classes):
        if match["token"] is None:
            continue
        start, end = match.span()
        for cut in range(start, end, MAX_TOKEN):
            yield text[cut : min(cut + MAX_TOKEN, end)]


@functools.lru_cache(maxsize=1 << 16)
def _term(token: str) -> str:
    """Return the search term of one word, or the empty string for a stop word."""
    if len(token) > 2 and token[-1] in "sS" and token[-2] in "'\u2019\uff07":
        token = token[:-2]
    lowered = token.lower()
    return "" if lowered in STOP_WORDS else stem(lowered)


def iter_terms(text: str) -> Iterator[str]:
    """Yield the search terms of a text in order, with repetitions."""
    return filter(None, map(_term, tokenize(text)))


def analyze(text: str) -> list[str]:
    """Return the terms of `iter_terms` as a list."""
    return list(iter_terms(text))
