"""Vector search in an index file of FAISS, mapped into memory where FAISS can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import faiss
import numpy as np

from empg_envs.cache import allow_mapping
from empg_envs.deepsearch.encoders import Encode
from empg_envs.deepsearch.passages import Passage
from empg_envs.deepsearch.vectors import VectorRetriever
from empg_envs.rows import DataError, find_file


class FaissFile:
    """An index file; see `empg_envs.deepsearch.vectors.VectorIndex`."""

    def __init__(self, path: str, nprobe: int | None = None) -> None:
        """Open the file.

        Args:
          path: the file.
          nprobe: number of lists that are searched of an index with inverted lists; None is the file's.

        Raises:
          DataError: there is no such file, or FAISS cannot read it.
          ValueError: the index has no inverted lists that ``nprobe`` could choose of.
        """
        file = find_file(path)
        allow_mapping(file)
        try:
            self._index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise DataError(f"{path}: FAISS cannot read this index: {str(error)[:300]}") from error
        self.count, self.width = int(self._index.ntotal), int(self._index.d)
        # Of a distance less is better.
        self._sign = 1.0 if self._index.metric_type == faiss.METRIC_INNER_PRODUCT else -1.0
        if nprobe is not None:
            try:
                faiss.ParameterSpace().set_index_parameter(self._index, "nprobe", nprobe)
            except RuntimeError as error:
                raise ValueError(f"nprobe={nprobe}: {path} has no inverted lists to choose of") from error

    def nearest(self, queries: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and numbers of the nearest vectors."""
        scores, numbers = self._index.search(queries, topk)
        return self._sign * scores, numbers


class FaissRetriever(VectorRetriever):
    """A retriever over an index file of FAISS."""

    def __init__(
        self,
        passages: Sequence[Passage],
        *,
        index: str,
        encoder: str | Encode,
        encoder_options: Mapping[str, Any] | None = None,
        query_prefix: str = "",
        nprobe: int | None = None,
        threads: int = 1,
    ) -> None:
        """Open the index; ``threads`` is what FAISS may use for a search in this process.

        See `FaissFile` for ``index`` and ``nprobe``, `VectorRetriever` for the rest.
        """
        if threads < 1:
            raise ValueError(f"retriever 'faiss': threads={threads} must be at least 1")
        faiss.omp_set_num_threads(threads)
        file = FaissFile(index, nprobe)
        super().__init__(passages, file, index, encoder, encoder_options, query_prefix=query_prefix)
