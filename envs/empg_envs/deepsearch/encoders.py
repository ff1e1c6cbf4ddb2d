"""Encoders of queries for vector indexes: a function of the user's, or a server with the embeddings endpoint.

The server speaks the language of OpenAI's ``/v1/embeddings``, as vLLM and Text Embeddings Inference do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from empg_envs.deepsearch.passages import RetrieverError
from empg_envs.deepsearch.remote import Servers
from empg_envs.names import import_function

EMBEDDINGS_PATH = "/v1/embeddings"

# From texts to vectors: anything that NumPy takes for an array of one row per text.
Encode = Callable[[Sequence[str]], Any]


def find_encoder(encoder: str | Encode, **options: Any) -> Encode:
    """Return an encoder of queries.

    Args:
      encoder: ``package.module:function``, an address such as ``http://127.0.0.1:8080/v1/embeddings``, or a
        function.
      **options: for an address: those of `EmbeddingServer`.

    Raises:
      ValueError: there is no such function, or an option has no effect.
    """
    if isinstance(encoder, str) and encoder.startswith(("http://", "https://")):
        try:
            return EmbeddingServer(encoder, **options)
        except TypeError as error:
            raise ValueError(f"encoder_options: {error}") from None
    if options:
        raise ValueError(f"encoder_options {sorted(options)} have an effect where encoder is an address only")
    return import_function("encoder", encoder) if isinstance(encoder, str) else encoder


class EmbeddingServer:
    """An encoder behind HTTP."""

    def __init__(
        self, url: str, *, model: str = "", timeout: float = 2.0, attempts: int = 3, wait: float = 0.2
    ) -> None:
        """Store the address.

        Args:
          url: the address.
          model: the name that the server knows the encoder by, where it needs one.
          timeout: see `Servers`.
          attempts: see `Servers`.
          wait: see `Servers`.
        """
        self._servers = Servers(
            url, usual_path=EMBEDDINGS_PATH, timeout=timeout, attempts=attempts, wait=wait
        )
        self._model = {"model": model} if model else {}

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        """Return a vector for each text.

        Raises:
          RetrieverError: the server is down, too slow, or sends an invalid answer.
        """
        request = {"input": list(texts), **self._model}
        return self._servers.ask(request, lambda text: _read_vectors(text, len(texts)))


def _read_vectors(text: bytes, count: int) -> list[list[float]]:
    try:
        rows = sorted(json.loads(text)["data"], key=lambda row: row["index"])
        vectors = [[float(number) for number in row["embedding"]] for row in rows]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RetrieverError(f"the answer has no 'data' with embeddings: {text[:200]!r}") from error
    if len(vectors) != count:
        raise RetrieverError(f"the answer has {len(vectors)} embeddings; expected {count}")
    return vectors
