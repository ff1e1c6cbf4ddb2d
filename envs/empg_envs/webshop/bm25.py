"""BM25 exactly as in Lucene: lengths in one byte, float32 arithmetic, ties in the order of ids.

score(q, d) = sum over terms t of  c_t * w_t * (1 - 1 / (1 + f_td * r_d)),
w_t = ln(1 + (N - n_t + 1/2) / (n_t + 1/2)),
r_d = 1 / (k1 * (1 - b + b * l_d / l)),

with c_t the count of t in the query, f_td its count in d, n_t the number of documents that contain it, l_d
the length of d after rounding to Lucene's byte, and l the exact mean length. The formula is that of Robertson
and Zaragoza 2009 without the constant factor k1 + 1, as in Lucene since version 8.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from empg_envs.webshop.analyzer import analyze, iter_terms

K1, B = 0.9, 0.4
MAX_QUERY_TERMS = 1024  # Lucene refuses queries with more clauses; here further terms are ignored
_CACHED_TERMS = 2048
_CACHED_POSTINGS = 4096  # longer lists stay in the store that all workers share
_EXACT = 24  # lengths below this plus 16 are kept exactly


def _byte_to_length(code: int) -> int:
    if code < _EXACT:
        return code
    code -= _EXACT
    bits, shift = code & 7, (code >> 3) - 1
    return _EXACT + (bits if shift < 0 else (bits | 8) << shift)


_LENGTHS = tuple(_byte_to_length(code) for code in range(256))


def length_to_byte(length: int) -> int:
    """Return Lucene's one-byte code of a length: a float with 3 bits of mantissa, rounded down."""
    if length < _EXACT:
        return length
    rest = length - _EXACT
    shift = max(rest.bit_length() - 4, 0)
    return _EXACT + (rest if rest < 8 else ((rest >> shift) & 7 | (shift + 1) << 3))


class Postings(NamedTuple):
    """The documents of a term.

    Attributes:
      documents: ``int32[n]``, ascending.
      factors: ``float32[n]``, f_td * r_d.
      gains: ``float32[n]``, scores for a query that contains the term once.
      weight: w_t.
    """

    documents: np.ndarray
    factors: np.ndarray
    gains: np.ndarray
    weight: np.float32


class IndexBuilder:
    """A builder of an index: it takes documents in the order of their ids and returns all postings."""

    def __init__(self) -> None:
        """Start without documents."""
        self._terms: dict[str, array[int]] = {}
        self._norms = bytearray()
        self._total = 0

    def add(self, text: str) -> None:
        """Add the next document."""
        terms = analyze(text)
        document = len(self._norms)
        self._norms.append(length_to_byte(len(terms)))
        self._total += len(terms)
        for term, count in Counter(terms).items():
            self._terms.setdefault(term, array("I")).extend((document, count))

    def finish(self) -> Iterator[tuple[str, bytes]]:
        """Yield the sorted terms with their postings as bytes for `Index`; this empties the builder."""
        mean = np.float32(self._total / max(len(self._norms), 1))
        lengths = np.array(_LENGTHS, np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = np.float32(1) / (
                np.float32(K1) * ((np.float32(1) - np.float32(B)) + np.float32(B) * lengths / mean)
            )
        norms = np.frombuffer(bytes(self._norms), np.uint8)
        for term in sorted(self._terms):
            pairs = np.frombuffer(self._terms.pop(term), np.uint32).reshape(-1, 2)
            factors = pairs[:, 1].astype(np.float32) * inverse[norms[pairs[:, 0]]]
            yield term, pairs[:, 0].astype(np.int32).tobytes() + factors.tobytes()


class Index:
    """A search index that ranks documents by BM25."""

    def __init__(self, num_documents: int, lookup: Callable[[str], bytes | None]) -> None:
        """Set up the index.

        Args:
          num_documents: number of documents.
          lookup: function from a term to its bytes from `IndexBuilder.finish`, or None.
        """
        self._count = num_documents
        self._lookup = lookup
        self._short = functools.lru_cache(maxsize=_CACHED_TERMS)(self._read_short)

    def search(self, query: str, limit: int) -> list[tuple[int, float]]:
        """Return the best documents for a query.

        Args:
          query: any text.
          limit: largest number of results.

        Returns:
          Pairs (document, score), best first; ties are sorted by document.
        """
        wanted: Counter[str] = Counter()
        for term in iter_terms(query):
            wanted[term] += 1
            if len(wanted) == MAX_QUERY_TERMS:
                break
        scores = np.zeros(self._count, np.float64)
        for term, count in wanted.items():
            postings = self._postings(term)
            if postings is None:
                continue
            gains = postings.gains
            if count > 1:
                gains = _gains(postings.factors, postings.weight * np.float32(count))
            scores[postings.documents] += gains
        return _best(scores.astype(np.float32), limit)

    def _postings(self, term: str) -> Postings | None:
        found = self._short(term)
        if found is not None and not found.documents.size:
            return self._read(term)
        return found

    def _read_short(self, term: str) -> Postings | None:
        """Read postings for the cache; a long list is replaced by an empty one, so that it is not cached."""
        found = self._read(term)
        if found is not None and found.documents.size > _CACHED_POSTINGS:
            return Postings(found.documents[:0], found.factors[:0], found.gains[:0], found.weight)
        return found

    def _read(self, term: str) -> Postings | None:
        data = self._lookup(term)
        if data is None:
            return None
        size = len(data) // 8
        documents = np.frombuffer(data, np.int32, size)
        factors = np.frombuffer(data, np.float32, size, 4 * size)
        weight = np.float32(math.log(1 + (self._count - size + 0.5) / (size + 0.5)))
        return Postings(documents, factors, _gains(factors, weight), weight)


def _gains(factors: np.ndarray, weight: np.float32) -> np.ndarray:
    return weight - weight / (np.float32(1) + factors)


def _best(scores: np.ndarray, limit: int) -> list[tuple[int, float]]:
    found = np.flatnonzero(scores)
    if found.size > limit:
        worst = np.partition(scores[found], found.size - limit)[found.size - limit]
        found = found[scores[found] >= worst]
    order = found[np.argsort(-scores[found], kind="stable")[:limit]]
    return list(zip(order.tolist(), scores[order].tolist(), strict=True))
