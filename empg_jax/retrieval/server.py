"""A search server with Search-R1's ``/retrieve`` protocol.

``POST /retrieve`` with ``{"queries": [text], "topk": number, "return_scores": bool}`` answers
``{"result": [[{"document": {"id", "contents", "title", "text"}, "score": number}]]}``; without
``return_scores`` the results are bare documents. ``POST /pages`` with ``{"titles": [text]}``, an addition for
agents that browse, answers in the same form with all passages of each title. ``GET /health`` returns the
number of passages. An invalid request gets a status of 4xx and ``{"detail": message}``; a failed search 500.

The server needs only the standard library. Each connection has a thread and stays open between requests.
"""

from __future__ import annotations

import json
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from empg_envs.base import whole_characters
from empg_envs.deepsearch.pages import Pages
from empg_envs.deepsearch.passages import MAX_TOPK, Hit
from empg_jax.retrieval.batcher import Batcher

MAX_BODY_BYTES = 4 << 20
MAX_QUERIES = 1024  # largest number of queries in a request
IDLE_SECONDS = 60.0  # an idle connection is closed after this time


class RequestError(Exception):
    """An invalid request, with its HTTP status and the reason."""

    def __init__(self, status: int, detail: str) -> None:
        """Store the answer's HTTP ``status``; ``detail`` gives the error and a valid alternative."""
        super().__init__(detail)
        self.status = status


class RetrievalServer(ThreadingHTTPServer):
    """An HTTP server in front of a `Batcher`."""

    daemon_threads = True
    request_queue_size = 1024  # clients that connect at the same moment

    def __init__(
        self,
        batcher: Batcher,
        num_passages: int,
        *,
        pages: Pages | None = None,
        host: str = "127.0.0.1",
        port: int = 8000,
        topk: int = 3,
    ) -> None:
        """Bind the address.

        Args:
          batcher: the search engine.
          num_passages: size of the corpus, for ``/health``.
          pages: the corpus by title, for ``/pages``; without them there is no such path.
          host: address to listen on; the default accepts connections from this machine only.
          port: port to listen on; 0 takes a free one.
          topk: number of results for requests without ``topk``.

        Raises:
          OSError: the address cannot be bound.
        """
        self.batcher, self.num_passages, self.pages, self.topk = batcher, num_passages, pages, topk
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        """Address of ``/retrieve``."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/retrieve"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect; report all other errors to stderr."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            socketserver.BaseServer.handle_error(self, request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: RetrievalServer
    protocol_version = "HTTP/1.1"  # keeps connections open
    timeout = IDLE_SECONDS
    wbufsize = -1  # buffered, so that head and body are sent in one packet
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        try:
            path = self.path.rstrip("/")
            if path == "/pages" and self.server.pages is not None:
                answer = self._read_pages(self.server.pages)
            elif path == "/retrieve":
                answer = self._retrieve()
            else:
                self.close_connection = True  # the unread body would be taken for the next request
                raise RequestError(404, f"no {self.path}; POST /retrieve, POST /pages, GET /health")
            status = 200
        except RequestError as error:
            answer, status = {"detail": str(error)}, error.status
        except (ConnectionError, TimeoutError):  # the client is gone, so nobody can receive an answer
            raise
        except Exception as error:  # an error of the engine fails this request; the server continues
            answer, status = {"detail": f"{type(error).__name__}: {error}"}, 500
        self._send(status, answer)

    def do_GET(self) -> None:
        if self.path == "/health":
            batcher = self.server.batcher
            counts = {"passages": self.server.num_passages, "hits": batcher.hits, "misses": batcher.misses}
            self._send(200, {"status": "ok", **counts})
        else:
            self._send(404, {"detail": f"no {self.path}; POST /retrieve, POST /pages, GET /health"})

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing: a log line for each of thousands of requests would be noise."""

    def _retrieve(self) -> dict[str, Any]:
        queries, topk, with_scores = parse_request(self._read_body(), self.server.topk)
        results = self.server.batcher.search(queries, topk)
        return {"result": [[write_hit(hit, with_scores) for hit in hits] for hits in results]}

    def _read_pages(self, pages: Pages) -> dict[str, Any]:
        titles = parse_texts(parse_object(self._read_body()), "titles")
        found = [pages.read_page(title) for title in titles]
        return {"result": [[write_hit(Hit(each, 0.0), False) for each in page] for page in found]}

    def _read_body(self) -> bytes:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            self.close_connection = True  # the end of the body is unknown
            raise RequestError(411, "the request says no Content-Length") from None
        if not 0 <= length <= MAX_BODY_BYTES:
            self.close_connection = True  # the unread body would be taken for the next request
            raise RequestError(413, f"the request has {length} bytes; at most {MAX_BODY_BYTES} are read")
        return self.rfile.read(length)

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


def parse_request(body: bytes, usual_topk: int) -> tuple[list[str], int, bool]:
    """Parse a request's body; return the queries, ``topk`` and ``return_scores``.

    Raises:
      RequestError: with status 400 if the body is not JSON, with 422 if a field is invalid.
    """
    request = parse_object(body)
    # Half of a surrogate pair becomes a question mark: tokenizers refuse it, and with it the whole batch.
    queries = [whole_characters(text) for text in parse_texts(request, "queries")]
    topk = request.get("topk")
    topk = usual_topk if topk is None else topk
    if not isinstance(topk, int) or isinstance(topk, bool) or not 1 <= topk <= MAX_TOPK:
        raise RequestError(422, f"'topk' is {topk!r}; expected an integer from 1 to {MAX_TOPK}")
    with_scores = request.get("return_scores", False)
    if not isinstance(with_scores, bool):
        raise RequestError(422, f"'return_scores' is {with_scores!r}; expected true or false")
    return queries, topk, with_scores


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a request's body, which must be a JSON object.

    Raises:
      RequestError: with status 400 if it is not JSON, with 422 if it is no object.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(422, f"the request is {type(request).__name__}; expected an object")
    return request


def parse_texts(request: dict[str, Any], key: str) -> list[str]:
    """Return a field that must be a list of texts, of at most `MAX_QUERIES`.

    Raises:
      RequestError: with status 422 if it is not.
    """
    texts = request.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RequestError(422, f"{key!r} is not a list of texts")
    if len(texts) > MAX_QUERIES:
        raise RequestError(422, f"{key!r} has {len(texts)} entries; at most {MAX_QUERIES} are allowed")
    return texts


def write_hit(hit: Hit, with_scores: bool) -> dict[str, Any]:
    """Return a search result in the protocol's JSON form."""
    passage = hit.passage
    document = {**passage.to_row(), "title": passage.title, "text": passage.text}
    return {"document": document, "score": hit.score} if with_scores else document
