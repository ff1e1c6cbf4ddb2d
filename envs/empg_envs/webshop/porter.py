"""Porter's stemmer as in Lucene.

Source: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with the two changes of the
author's own later code (``bli`` -> ``ble``, ``logi`` -> ``log``). Words of up to two letters are unchanged.
The caller converts words to lower case.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

_DOUBLE_SUFFIXES = {
    "ational": "ate",
    "tional": "tion",
    "enci": "ence",
    "anci": "ance",
    "izer": "ize",
    "bli": "ble",
    "alli": "al",
    "entli": "ent",
    "eli": "e",
    "ousli": "ous",
    "ization": "ize",
    "ation": "ate",
    "ator": "ate",
    "alism": "al",
    "iveness": "ive",
    "fulness": "ful",
    "ousness": "ous",
    "aliti": "al",
    "iviti": "ive",
    "biliti": "ble",
    "logi": "log",
}
_FULL_SUFFIXES = {
    "icate": "ic",
    "ative": "",
    "alize": "al",
    "iciti": "ic",
    "ical": "ic",
    "ful": "",
    "ness": "",
}
_RESIDUES = (
    *("al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent"),
    *("sion", "tion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"),
)


def _longest_first(suffixes: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(suffixes, key=len, reverse=True))


_STEP_2, _STEP_3, _STEP_4 = map(_longest_first, (_DOUBLE_SUFFIXES, _FULL_SUFFIXES, _RESIDUES))


def _is_consonant(word: str, at: int) -> bool:
    letter = word[at]
    if letter != "y":
        return letter not in "aeiou"
    # A y is a consonant at the start and after a vowel. Counting a run of y avoids deep recursion.
    start = at
    while start > 0 and word[start - 1] == "y":
        start -= 1
    first_is_consonant = start == 0 or word[start - 1] in "aeiou"
    return first_is_consonant == ((at - start) % 2 == 0)


def _measure(stem: str) -> int:
    """Return the number of vowel-consonant sequences."""
    count, was_vowel = 0, False
    previous_is_consonant = False
    for at, letter in enumerate(stem):
        is_consonant = letter not in "aeiou" if letter != "y" else at == 0 or not previous_is_consonant
        count += is_consonant and was_vowel
        was_vowel = not is_consonant
        previous_is_consonant = is_consonant
    return count


def _has_vowel(stem: str) -> bool:
    return any(not _is_consonant(stem, at) for at in range(len(stem)))


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and _is_consonant(word, len(word) - 1)


def _ends_short(word: str) -> bool:
    """Return whether a word ends with consonant, vowel, consonant, and the last one is not w, x or y."""
    return (
        len(word) > 2
        and _is_consonant(word, len(word) - 3)
        and not _is_consonant(word, len(word) - 2)
        and _is_consonant(word, len(word) - 1)
        and word[-1] not in "wxy"
    )


def _plurals(word: str) -> str:
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith("ies"):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


def _participles(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            return _repair(stem) if _has_vowel(stem) else word
    return word


def _repair(stem: str) -> str:
    """Restore the end of a word after removal of ``ed`` or ``ing``: "hopp" to "hop", "siz" to "size"."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if _ends_double(stem):
        return stem if stem[-1] in "lsz" else stem[:-1]
    return stem + "e" if _measure(stem) == 1 and _ends_short(stem) else stem


def _replace(word: str, suffixes: tuple[str, ...], endings: dict[str, str]) -> str:
    for suffix in suffixes:
        if word.endswith(suffix):
            stem = word[: -len(suffix)]
            return stem + endings[suffix] if _measure(stem) > 0 else word
    return word


def _residues(word: str) -> str:
    for suffix in _STEP_4:
        if word.endswith(suffix):
            # Only the "ion" of "sion" and "tion" is removed.
            stem = word[:-3] if suffix in ("sion", "tion") else word[: -len(suffix)]
            return stem if _measure(stem) > 1 else word
    return word


def _final(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        measure = _measure(stem)
        if measure > 1 or (measure == 1 and not _ends_short(stem)):
            word = stem
    if word.endswith("ll") and _measure(word) > 1:
        word = word[:-1]
    return word


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Return the stem of a lower-case word."""
    if len(word) <= 2:
        return word
    word = _participles(_plurals(word))
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replace(word, _STEP_2, _DOUBLE_SUFFIXES)
    word = _replace(word, _STEP_3, _FULL_SUFFIXES)
    return _final(_residues(word))
