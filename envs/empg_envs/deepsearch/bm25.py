"""BM25 in plain Python: for small corpora, such as those of the embedded worlds, and for a bare install."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Collection, Sequence

from empg_envs.deepsearch.passages import Hit, Passage, index_words, words_of

K1, B = 0.9, 0.4  # Anserini's defaults, which work well for short passages


class BuiltinBm25:
    """BM25 (Lucene's variant) over an inverted index of precomputed scores.

    Only passages that share a term with the query are found. Passages of equal score keep the corpus order.
    """

    def __init__(
        self, passages: Sequence[Passage], *, k1: float = K1, b: float = B, ignore: Collection[str] = ()
    ) -> None:
        """Build the index.

        Args:
          passages: the corpus.
          k1: saturation of repeated terms; with 0 repetitions do not count.
          b: penalty of long passages, from 0 (none) to 1.
          ignore: terms that are not indexed.
        """
        self._passages = passages
        counts = [
            Counter(word for word in index_words(passage) if word not in ignore) for passage in passages
        ]
        lengths = [count.total() for count in counts]
        mean = sum(lengths) / len(lengths) if any(lengths) else 1.0
        frequency: Counter[str] = Counter()
        for count in counts:
            frequency.update(count.keys())
        self._postings: dict[str, list[tuple[int, float]]] = {word: [] for word in frequency}
        for number, count in enumerate(counts):
            scale = k1 * (1 - b + b * lengths[number] / mean)
            for word, times in count.items():
                rarity = math.log(1 + (len(passages) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                self._postings[word].append((number, rarity * times / (times + scale)))

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the best passages for each query; see `Retriever`."""
        return [self._search(query, topk) for query in queries]

    def close(self) -> None:
        """Do nothing: the index is only memory."""

    def _search(self, query: str, topk: int) -> list[Hit]:
        scores: dict[int, float] = {}
        for word, times in Counter(words_of(query)).items():
            for number, score in self._postings.get(word, ()):
                scores[number] = scores.get(number, 0.0) + times * score
        best = heapq.nsmallest(topk, scores.items(), key=lambda item: (-item[1], item[0]))
        return [Hit(self._passages[number], score) for number, score in best]
