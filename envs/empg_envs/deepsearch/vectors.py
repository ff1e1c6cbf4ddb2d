"""Search among the vectors of passages: what an index of any kind needs around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from empg_envs.deepsearch.encoders import Encode, find_encoder
from empg_envs.deepsearch.passages import Hit, Passage, RetrieverError
from empg_envs.rows import DataError


class VectorIndex(Protocol):
    """The vectors of a corpus; number i belongs to passage i."""

    count: int
    width: int

    def nearest(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores, larger is better, and numbers, each ``[Q topk]``; a number below 0 is no result."""
        ...


class VectorRetriever:
    """A `Retriever` that encodes queries and asks a `VectorIndex`."""

    def __init__(
        self,
        passages: Sequence[Passage],
        index: VectorIndex,
        path: str,
        encoder: str | Encode,
        encoder_options: Mapping[str, Any] | None = None,
        *,
        query_prefix: str = "",
    ) -> None:
        """Check that the index belongs to the passages.

        Args:
          passages: the corpus.
          index: the vectors of its passages, in its order.
          path: the index's file, for messages.
          encoder: the encoder of queries; see `find_encoder`.
          encoder_options: options of that encoder.
          query_prefix: text before each query (E5: ``query: ``).

        Raises:
          DataError: the index has another number of vectors than there are passages.
          ValueError: there is no such encoder.
        """
        if index.count != len(passages):
            raise DataError(f"{path}: {index.count} vectors, but the corpus has {len(passages)} passages")
        self._passages, self._index, self._prefix = passages, index, query_prefix
        self._encode = find_encoder(encoder, **(encoder_options or {}))

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the nearest passages for each query; see `Retriever`."""
        if not queries:
            return []
        vectors = self._encode_queries(queries)
        scores, numbers = self._index.nearest(vectors, min(topk, len(self._passages)))
        return [
            [Hit(self._passages[n], s) for s, n in zip(*row, strict=True) if n >= 0]
            for row in zip(scores.tolist(), numbers.tolist(), strict=True)
        ]

    def close(self) -> None:
        """Do nothing: the index is a mapped file."""

    def _encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        texts = [f"{self._prefix}{query}" for query in queries]
        try:
            vectors = np.ascontiguousarray(self._encode(texts), np.float32)
        except RetrieverError:
            raise
        except Exception as error:  # the user's function; the agent is not the cause
            raise RetrieverError(f"the encoder failed: {type(error).__name__}: {error}") from error
        if vectors.shape != (len(texts), self._index.width):
            raise RetrieverError(
                f"the encoder gave an array of shape {vectors.shape}; expected "
                f"{(len(texts), self._index.width)}, a row of the index's width for each query"
            )
        return vectors
