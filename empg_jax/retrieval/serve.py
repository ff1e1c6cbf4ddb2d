"""The command ``empg-jax retrieve``: build a search engine over a corpus and serve it until a signal."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from empg_envs.deepsearch.ondisk import open_index
from empg_envs.deepsearch.pages import Pages, open_pages
from empg_envs.deepsearch.passages import RETRIEVERS, VECTORS, Passage, Retriever, make_retriever, read_corpus
from empg_jax.errors import UserError
from empg_jax.retrieval.batcher import Batcher
from empg_jax.retrieval.server import RetrievalServer

AUTO, DENSE = "auto", "dense"


class ServeError(UserError):
    """A server that cannot start. The message gives the reason."""


def choose_retriever(name: str, has_encoder: bool, say: Callable[[str], None]) -> str:
    """The name itself; for ``auto`` the best engine that this installation can run, told in one line."""
    if name != AUTO:
        return name
    if has_encoder:
        found, why = DENSE, "an encoder is named"
    elif importlib.util.find_spec("bm25s") is not None:
        found, why = "bm25s", "it is installed"
    else:
        found, why = "builtin", "bm25s, which is faster, is not installed (pip install -e '.[deepsearch]')"
    say(f"retriever {found}: {why}")
    return found


def check_options(retriever: str, encoder: Mapping[str, Any] | None) -> None:
    """Refuse options of an index of vectors where the retriever reads none; see `make_engine`."""
    if retriever not in VECTORS and (encoder or {}).keys() & {"index", "encoder"}:
        raise ServeError(f"--index and --encoder go with --retriever {' or '.join(VECTORS)}, not {retriever}")


def make_engine(
    retriever: str,
    passages: Sequence[Passage],
    encoder: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Retriever:
    """Build the search engine.

    Args:
      retriever: ``auto``, ``dense``, or one of `empg_envs.deepsearch.passages.RETRIEVERS` that searches a
        corpus.
      passages: the corpus.
      encoder: options of ``dense``: ``model`` (a folder), ``query_prefix``, ``passage_prefix``, ``cache``.
        Of those that read an index of vectors: ``index`` (a file), ``query_prefix``, and ``model`` or
        ``encoder`` (see `empg_envs.deepsearch.encoders`).
      say: called with progress messages.

    Raises:
      ServeError: the name is unknown, ``dense`` has no model, or another retriever has one.
      ValueError: a package is not installed, or the folder contains no encoder.
    """
    check_options(retriever, encoder)
    options = dict(encoder or {})
    model = options.pop("model", None)
    retriever = choose_retriever(retriever, model is not None, say)
    if retriever in VECTORS:
        return make_retriever(retriever, passages, **find_index(model, options))
    if (retriever == DENSE) != (model is not None):
        raise ServeError("a dense retriever needs the folder of an encoder (--model), and no other takes one")
    known = (*(name for name in RETRIEVERS if name != "remote"), DENSE, AUTO)
    if retriever not in known:
        raise ServeError(f"unknown retriever {retriever!r}; a server has {', '.join(known)}")
    if retriever != DENSE:
        return make_retriever(retriever, passages)
    # Imported late, because a lexical server needs no JAX and starts faster without it.
    from empg_jax.retrieval.dense import DenseRetriever
    from empg_jax.retrieval.encoder import TextEncoder

    return DenseRetriever(
        passages,
        TextEncoder(model),
        advance=lambda done: say(f"encoded {done} of {len(passages)} passages"),
        **options,
    )


def find_index(model: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a retriever that reads an index of vectors.

    Args:
      model: the folder of the encoder of queries, or None where ``encoder`` is among the options.
      options: ``index``, ``encoder`` and ``query_prefix``; others have no effect and must not be given.

    Raises:
      ServeError: the index or the encoder is missing, or there are two encoders.
      ValueError: the folder contains no encoder.
    """
    chosen = {key: value for key, value in options.items() if value}
    if "index" not in chosen or (model is None) == ("encoder" not in chosen):
        raise ServeError(
            "a retriever over vectors needs their file (--index) and one encoder of queries: a folder "
            "(--model), or a function or an address (--encoder)"
        )
    for name in sorted(chosen.keys() - {"index", "encoder", "query_prefix"}):
        raise ServeError(f"{name} has no effect: the vectors of the passages are in {chosen['index']}")
    if model is not None:
        from empg_jax.retrieval.encoder import TextEncoder

        chosen["encoder"] = TextEncoder(model).encode
    return chosen


@contextlib.contextmanager
def open_server(
    engine: Retriever,
    num_passages: int,
    *,
    pages: Pages | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    topk: int = 3,
    cache_size: int = 65536,
) -> Iterator[RetrievalServer]:
    """Yield a bound server (call its ``serve_forever``); close server and engine at the end.

    Raises:
      ServeError: the address cannot be bound.
    """
    batcher = Batcher(engine, cache_size=cache_size)
    try:
        try:
            server = RetrievalServer(batcher, num_passages, pages=pages, host=host, port=port, topk=topk)
        except OSError as error:
            raise ServeError(f"cannot listen on {host}:{port}: {error}") from error
        with server:
            yield server
    finally:
        batcher.close()
        engine.close()


def serve_corpus(
    corpus: str,
    *,
    retriever: str,
    encoder: Mapping[str, Any] | None,
    say: Callable[[str], None],
    index_dir: str | None = None,
    **options: Any,
) -> None:
    """Read a corpus, index it, and serve until an exception, such as a signal's, ends the server.

    Args:
      corpus: a file in the format of wiki-18.
      retriever: see `make_engine`.
      encoder: see `make_engine`.
      say: called with progress messages.
      index_dir: folder where the index is kept, in place of memory; see `empg_envs.deepsearch.ondisk`.
      **options: options of `open_server`.

    Raises:
      DataError: the corpus is malformed.
      ServeError, ValueError: see `make_engine` and `open_server`.
    """
    began = time.monotonic()
    check_options(retriever, encoder)
    options_of_vectors: dict[str, Any] = {}
    if index_dir is not None and retriever in VECTORS:
        given = dict(encoder or {})
        options_of_vectors = find_index(given.pop("model", None), given)
    elif index_dir is not None and encoder is not None:
        raise ServeError(f"--index-dir {index_dir} keeps no vectors of an encoder (--model): use --vectors")
    passages: Sequence[Passage] = read_corpus(corpus) if index_dir is None else ()
    retriever = choose_retriever(retriever, encoder is not None, say)
    if index_dir is None:
        engine = make_engine(retriever, passages, encoder, say)
    else:
        engine, passages = open_index(retriever, corpus, index_dir, **options_of_vectors)
    with open_server(engine, len(passages), pages=open_pages(passages), **options) as server:
        seconds = time.monotonic() - began
        say(f"{len(passages)} passages, {retriever}, ready after {seconds:.1f} s: {server.url}")
        server.serve_forever(poll_interval=0.1)
