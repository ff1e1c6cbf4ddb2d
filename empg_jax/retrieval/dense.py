"""Dense retrieval: passages and queries as vectors, the largest inner products win."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from empg_envs.deepsearch.passages import Hit, Passage
from empg_jax.retrieval.encoder import TextEncoder

CHUNK = 1024  # passages between two calls of the progress display
QUERY_BATCHES = (1, 8, 64)  # queries are padded to one of these


@functools.partial(jax.jit, static_argnames="topk")
def find_nearest(queries: jax.Array, passages: jax.Array, *, topk: int) -> tuple[jax.Array, jax.Array]:
    """Return inner products and numbers of the ``topk`` nearest passages.

    Args:
      queries: float32[Q D].
      passages: float32[P D].
      topk: at most P.

    Returns:
      float32[Q topk] descending, int32[Q topk].
    """
    return jax.lax.top_k(queries @ passages.T, topk)


class DenseRetriever:
    """A `Retriever` over vectors that an encoder makes."""

    def __init__(
        self,
        passages: Sequence[Passage],
        encoder: TextEncoder,
        *,
        query_prefix: str = "",
        passage_prefix: str = "",
        cache: str | Path | None = None,
        advance: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Encode the corpus, or reads its vectors from a file that an earlier run wrote.

        Args:
          passages: the corpus.
          encoder: for passages and queries alike.
          query_prefix: put before queries (E5: ``query: ``).
          passage_prefix: put before passages (E5: ``passage: ``).
          cache: an ``.npz`` file for the vectors; written when missing or made for another corpus, encoder
            width or prefix.
          advance: told how many passages are encoded.
        """
        self._passages, self._encoder, self._query_prefix = passages, encoder, query_prefix
        texts = [f"{passage_prefix}{passage.title}\n{passage.text}" for passage in passages]
        identity = _identify(texts, encoder)
        vectors = _read(cache, identity)
        if vectors is None:
            parts = []
            for start in range(0, len(texts), CHUNK):
                parts.append(encoder.encode(texts[start : start + CHUNK]))
                advance(min(start + CHUNK, len(texts)))
            vectors = np.concatenate(parts)
            if cache is not None:
                _write(Path(cache), vectors, identity)
        self._vectors = jax.device_put(vectors)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the nearest passages for each query; see `empg_envs.deepsearch.passages.Retriever`."""
        found: list[list[Hit]] = []
        for start in range(0, len(queries), QUERY_BATCHES[-1]):
            found += self._search(queries[start : start + QUERY_BATCHES[-1]], topk)
        return found

    def close(self) -> None:
        """Nothing is held but memory."""

    def _search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        vectors = self._encoder.encode([self._query_prefix + query for query in queries])
        size = next(size for size in QUERY_BATCHES if size >= len(queries))
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[: len(queries)] = vectors
        scores, numbers = find_nearest(padded, self._vectors, topk=min(topk, len(self._passages)))
        rows = zip(np.asarray(scores), np.asarray(numbers), range(len(queries)), strict=False)
        return [
            [Hit(self._passages[number], float(score)) for score, number in zip(*row, strict=True)]
            for *row, _ in rows
        ]


def _identify(texts: Sequence[str], encoder: TextEncoder) -> str:
    """Return a hash of what vectors depend on: the texts, and the encoder as seen in the vector of one of
    them.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    digest.update(np.round(encoder.encode(texts[:1]), 3).tobytes())
    return digest.hexdigest()


def _read(cache: str | Path | None, identity: str) -> np.ndarray | None:
    if cache is None or not Path(cache).is_file():
        return None
    try:
        with open(cache, "rb") as file, np.load(file) as stored:
            return np.asarray(stored["vectors"]) if str(stored["identity"]) == identity else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # not ours, or cut short: made anew


def _write(path: Path, vectors: np.ndarray, identity: str) -> None:
    """Write beside the file first: a killed process leaves no half one."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, vectors=vectors, identity=np.asarray(identity))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
