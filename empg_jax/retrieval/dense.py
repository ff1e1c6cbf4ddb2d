"""Dense retrieval: the results of a query are the passages whose vectors have the largest inner products."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from empg_envs.deepsearch.passages import Hit, Passage
from empg_jax.errors import UserError
from empg_jax.files import replacing
from empg_jax.retrieval.encoder import TextEncoder

CHUNK = 1024  # number of passages between two progress messages
QUERY_BATCHES = (1, 8, 64)  # queries are padded to one of these sizes, so that few programs are compiled


@functools.partial(jax.jit, static_argnames="topk")
def find_nearest(queries: jax.Array, passages: jax.Array, *, topk: int) -> tuple[jax.Array, jax.Array]:
    """Find the ``topk`` passages with the largest inner products; return products and passage indices.

    Args:
      queries: float32[Q D].
      passages: float32[P D].
      topk: number of results; at most P.

    Returns:
      float32[Q topk] descending, int32[Q topk].
    """
    return jax.lax.top_k(queries @ passages.T, topk)


class VectorsError(UserError, ValueError):
    """A file of vectors that cannot be written. The message gives the reason."""


class DenseRetriever:
    """A `Retriever` over vectors of a text encoder, which are divided among the devices of this process."""

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
        """Encode the corpus, or read its vectors from the cache file of an earlier run.

        Args:
          passages: the corpus.
          encoder: the encoder of passages and queries.
          query_prefix: text before each query (E5: ``query: ``).
          passage_prefix: text before each passage (E5: ``passage: ``).
          cache: an ``.npz`` file for the vectors. It is written if it does not exist or belongs to another
            corpus, encoder or prefix.
          advance: called with the number of encoded passages.

        Raises:
          VectorsError: the cache must be written and cannot be; told before anything is encoded.
        """
        self._passages, self._encoder, self._query_prefix = passages, encoder, query_prefix
        texts = [f"{passage_prefix}{passage.title}\n{passage.text}" for passage in passages]
        identity = "" if cache is None else _identify(texts, encoder)
        vectors = _read(cache, identity)
        if vectors is None:
            _check_writable(cache)
            # Filled in place: a second copy of the vectors may not fit into memory.
            vectors = np.empty((len(texts), encoder.width), np.float32)
            for start in range(0, len(texts), CHUNK):
                vectors[start : start + CHUNK] = encoder.encode(texts[start : start + CHUNK])
                advance(min(start + CHUNK, len(texts)))
            if cache is not None:
                with replacing(Path(cache)) as file:
                    np.savez(file, vectors=vectors, identity=np.asarray(identity))
        devices = jax.local_devices()
        pieces = np.array_split(vectors, len(devices))
        self._pieces = [
            jax.device_put(piece, device) for piece, device in zip(pieces, devices, strict=True) if len(piece)
        ]

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the nearest passages for each query; see `empg_envs.deepsearch.passages.Retriever`."""
        found: list[list[Hit]] = []
        for start in range(0, len(queries), QUERY_BATCHES[-1]):
            found += self._search(queries[start : start + QUERY_BATCHES[-1]], topk)
        return found

    def close(self) -> None:
        """Do nothing: the retriever holds no resources except memory."""

    def _search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        vectors = self._encoder.encode([self._query_prefix + query for query in queries])
        size = next(size for size in QUERY_BATCHES if size >= len(queries))
        padded = np.zeros((size, vectors.shape[1]), np.float32)
        padded[: len(queries)] = vectors
        # All devices are asked before the first answer is waited for.
        found = [find_nearest(padded, piece, topk=min(topk, len(piece))) for piece in self._pieces]
        starts = np.cumsum([0, *(len(piece) for piece in self._pieces)])
        scores = np.concatenate([np.asarray(each) for each, _ in found], axis=1)[: len(queries)]
        numbers = np.concatenate(
            [np.asarray(each) + start for (_, each), start in zip(found, starts, strict=False)], axis=1
        )
        order = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
        return [
            [Hit(self._passages[numbers[row, column]], float(scores[row, column])) for column in columns]
            for row, columns in enumerate(order)
        ]


def _identify(texts: Sequence[str], encoder: TextEncoder) -> str:
    """Return a hash of the texts and of the encoder."""
    digest = hashlib.sha256(encoder.identity.encode())
    for text in texts:
        digest.update(text.encode(errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def _check_writable(cache: str | Path | None) -> None:
    """Refuse a cache that cannot be written."""
    if cache is None:
        return
    try:
        if Path(cache).is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=Path(cache).parent):
            pass
    except OSError as error:
        raise VectorsError(f"the vectors cannot be written to {cache}: {error.strerror or error}") from error


def _read(cache: str | Path | None, identity: str) -> np.ndarray | None:
    if cache is None or not Path(cache).is_file():
        return None
    try:
        with open(cache, "rb") as file, np.load(file) as stored:
            return np.asarray(stored["vectors"]) if str(stored["identity"]) == identity else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # another format, or cut short: encode again
