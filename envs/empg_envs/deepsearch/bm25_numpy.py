"""BM25 by the ``bm25s`` package: the default for a corpus from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_envs.cache import allow_mapping
from empg_envs.deepsearch.bm25 import K1, B
from empg_envs.deepsearch.passages import Hit, Passage, index_words, words_of


def _import_bm25s() -> Any:
    """Import the package while JAX is hidden from it.

    It would import an installed JAX for a top-k function that is not used here. A worker process should start
    in a fraction of a second and stay small.
    """
    loaded = {name: sys.modules.get(name) for name in ("jax", "jax.lax")}
    sys.modules.update(dict.fromkeys(loaded))  # type: ignore[arg-type]  # None makes an import fail
    try:
        import bm25s
    finally:
        for name, module in loaded.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return bm25s


bm25s = _import_bm25s()


def _index(passages: Iterable[Passage], k1: float, b: float) -> Any:
    """Index passages; their words become numbers one passage at a time: texts take much more memory."""
    numbers: dict[str, int] = {}
    found = [[numbers.setdefault(word, len(numbers)) for word in index_words(each)] for each in passages]
    engine = bm25s.BM25(method="lucene", k1=k1, b=b)
    engine.index((found, numbers), show_progress=False)
    return engine


class NumpyBm25:
    """BM25 (Lucene's variant) with the whole index in NumPy arrays.

    Only passages that share a term with the query are found. Passages of equal score keep the corpus order.
    """

    def __init__(
        self, passages: Sequence[Passage], *, k1: float = K1, b: float = B, folder: Path | None = None
    ) -> None:
        """Build the index, or open the one in a folder (`build`); ``k1`` and ``b`` are BM25's parameters."""
        self._passages = passages
        if folder is not None:
            allow_mapping(folder)
        self._engine = _index(passages, k1, b) if folder is None else bm25s.BM25.load(folder, mmap=True)
        self._ids: dict[str, int] = self._engine.vocab_dict

    @staticmethod
    def build(passages: Iterable[Passage], folder: Path, *, k1: float = K1, b: float = B) -> None:
        """Write the index of these passages to a new folder."""
        _index(passages, k1, b).save(folder, show_progress=False)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the best passages for each query; see `Retriever`."""
        return [self._search(query, topk) for query in queries]

    def close(self) -> None:
        """Do nothing: the index is only memory."""

    def _search(self, query: str, topk: int) -> list[Hit]:
        terms = [self._ids[word] for word in words_of(query) if word in self._ids]
        if not terms:
            return []
        scores = self._engine.get_scores_from_ids(np.asarray(terms, np.int32))
        k = min(topk, len(scores))
        # Keep all passages at least as good as the k-th, so that the corpus order decides between ties.
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= max(least, np.finfo(scores.dtype).tiny))
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
        return [Hit(self._passages[number], float(scores[number])) for number in best]
