"""Scores of answers: exact match, sub-match and token F1 after normalization.

The normalization is SQuAD's (lower case, no ASCII punctuation, no articles, single spaces). The F1 of a wrong
yes or no is 0, as in HotpotQA's scorer. An empty answer always scores 0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """Convert to lower case, drop punctuation, then articles, and collapse blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden: Sequence[str]) -> float:
    """Return 1.0 if the normalized answer equals any normalized golden answer, else 0.0."""
    return _best(answer, golden, lambda given, gold: float(given == gold))


def sub_match(answer: str, golden: Sequence[str]) -> float:
    """Return 1.0 if any normalized golden answer occurs inside the normalized answer, else 0.0."""
    return _best(answer, golden, lambda given, gold: float(bool(gold) and gold in given))


def token_f1(answer: str, golden: Sequence[str]) -> float:
    """Return the largest F1 of shared words with any golden answer."""
    return _best(answer, golden, _f1)


def _best(answer: str, golden: Sequence[str], score: Callable[[str, str], float]) -> float:
    if not answer.strip():
        return 0.0
    given = normalize_answer(answer)
    if not given:  # an article or a mark, as "A": nothing is left to compare but the text as it stands
        return float(answer.strip().lower() in (gold.strip().lower() for gold in golden))
    return max((score(given, normalize_answer(gold)) for gold in golden), default=0.0)


def _f1(given: str, gold: str) -> float:
    if given != gold and (given in _CLOSED or gold in _CLOSED):
        return 0.0
    given_words, gold_words = given.split(), gold.split()
    shared = (Counter(given_words) & Counter(gold_words)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(given_words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)
