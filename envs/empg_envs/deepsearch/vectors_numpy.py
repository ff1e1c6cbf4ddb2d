"""Vector search in an ``.npy`` file that is mapped into memory and searched piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from empg_envs.cache import allow_mapping
from empg_envs.deepsearch.encoders import Encode
from empg_envs.deepsearch.passages import Passage
from empg_envs.deepsearch.vectors import VectorRetriever
from empg_envs.rows import DataError, find_file

PIECE = 1 << 16  # vectors that are in memory at a time, as float32


class VectorFile:
    """An array of vectors in a file, float16 or float32; see `empg_envs.deepsearch.vectors.VectorIndex`."""

    def __init__(self, path: str, piece: int = PIECE) -> None:
        """Map the file; ``piece`` is the number of vectors that a search looks at together.

        Raises:
          DataError: there is no such file, or it is no such array.
          ValueError: the piece is empty.
        """
        if piece < 1:
            raise ValueError(f"retriever 'vectors': piece={piece} must be at least 1")
        source = find_file(path)
        allow_mapping(source)
        try:
            vectors = np.load(source, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise DataError(f"{path}: no array in NumPy's format (.npy): {error}") from error
        if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise DataError(f"{path}: expected one array of floats, a row for each passage (.npy)")
        self._vectors, self._piece = vectors, piece
        self.count, self.width = vectors.shape

    def nearest(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the largest inner products and their numbers; of equal ones the first vectors count."""
        scores = np.empty((len(queries), 0), np.float32)
        numbers = np.empty((len(queries), 0), np.int64)
        for start in range(0, self.count, self._piece):
            vectors = np.asarray(self._vectors[start : start + self._piece], np.float32)
            here = np.broadcast_to(np.arange(start, start + len(vectors)), (len(queries), len(vectors)))
            scores, numbers = _best(
                np.concatenate([scores, queries @ vectors.T], axis=1),
                np.concatenate([numbers, here], axis=1),
                topk,
            )
        return scores, numbers


def _best(scores: np.ndarray, numbers: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Keep the best of each row, best first; earlier columns win a tie."""
    k = min(topk, scores.shape[1])
    least = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k]
    kept = []
    for row, limit in zip(scores, least, strict=True):
        found = np.flatnonzero(row >= limit)
        kept.append(found[np.argsort(-row[found], kind="stable")[:k]])
    order = np.stack(kept)
    return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)


class VectorFileRetriever(VectorRetriever):
    """A retriever over a file of vectors."""

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        index: str,
        encoder: str | Encode,
        encoder_options: Mapping[str, Any] | None = None,
        query_prefix: str = "",
        piece: int = PIECE,
    ) -> None:
        """Open the file; see `VectorFile` for ``index`` and ``piece``, `VectorRetriever` for the rest."""
        file = VectorFile(index, piece)
        super().__init__(passages, file, index, encoder, encoder_options, query_prefix=query_prefix)
