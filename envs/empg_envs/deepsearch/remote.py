"""A client of search servers with Search-R1's ``/retrieve`` protocol over HTTP.

It needs only the standard library. A server that is unreachable, too slow or sends an invalid answer raises a
`RetrieverError`. The episode is then sampled again and never scored.
"""

from __future__ import annotations

import base64
import http.client
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes, urlsplit

from empg_envs.deepsearch.passages import Hit, Passage, RetrieverError, check_topk, parse_contents

MAX_REPLY_BYTES = 64 << 20
PAGES_PATH = "/pages"  # an addition to Search-R1's protocol; `empg-jax retrieve` has it

_Reply = TypeVar("_Reply")


class Servers:
    """Equivalent servers, which are asked in turn, and the next one after a failure."""

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        usual_path: str = "/retrieve",
        timeout: float = 2.0,
        attempts: int = 3,
        wait: float = 0.2,
    ) -> None:
        """Store the addresses; connections are opened at the first request.

        Args:
          urls: addresses such as ``http://127.0.0.1:8000/retrieve``. A query (``?index=wiki``) goes with
            every request, a name and password (``http://name:password@…``) as basic authentication.
          usual_path: the path of an address that names none.
          timeout: seconds for a request. All attempts together should stay below
            ``workers.step_timeout``.
          attempts: number of requests before a failure is reported.
          wait: seconds before the second attempt; they double for each further attempt.

        Raises:
          ValueError: an address is not http(s), or a limit is not positive.
        """
        listed = [urls] if isinstance(urls, str) else list(urls)
        if not listed:
            raise ValueError("retriever 'remote' needs at least one url")
        self._servers = [_Server(url, usual_path, timeout) for url in listed]
        if timeout <= 0 or attempts < 1 or wait < 0:
            raise ValueError(
                f"{listed[0]}: timeout={timeout} and attempts={attempts} must be positive, "
                f"wait={wait} not negative"
            )
        self._attempts, self._wait = attempts, wait
        self._next = 0

    def ask(
        self, request: dict[str, Any], read: Callable[[bytes], _Reply], path: str | None = None
    ) -> _Reply:
        """Send a request as JSON, and return what ``read`` makes of the answer.

        Args:
          request: the request.
          read: parses the answer; it raises `RetrieverError` for an invalid one.
          path: another path of the servers than their addresses name.

        Raises:
          RetrieverError: all attempts failed.
        """
        body = json.dumps(request).encode()  # non-ASCII characters, even lone surrogates, are escaped
        problems = []
        for attempt in range(self._attempts):
            server = self._servers[self._next % len(self._servers)]
            self._next += 1
            try:
                return read(server.post(body, path))
            except (OSError, http.client.HTTPException, RetrieverError) as error:
                # The other connections are as old as the one that failed.
                server.close()
                problems.append(f"{server.url}: {type(error).__name__}: {error}")
            if attempt + 1 < self._attempts:
                time.sleep(self._wait * 2**attempt)
        raise RetrieverError(f"{self._attempts} requests failed; " + "; ".join(problems))

    def close(self) -> None:
        """Close the connections."""
        for server in self._servers:
            server.close()


class RemoteRetriever:
    """A retriever that asks search servers."""

    def __init__(
        self, urls: str | Sequence[str], *, timeout: float = 2.0, attempts: int = 3, wait: float = 0.2
    ) -> None:
        """Store the addresses; see `Servers` for them and the limits."""
        self._servers = Servers(urls, timeout=timeout, attempts=attempts, wait=wait)

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the best passages for each query; see `Retriever`."""
        request = {"queries": list(queries), "topk": check_topk(topk), "return_scores": True}
        return self._servers.ask(request, lambda text: read_reply(text, len(queries), topk))

    def read_page(self, title: str) -> Sequence[Passage]:
        """Return the passages of a title in the server's corpus; see `empg_envs.deepsearch.pages.Pages`."""
        request = {"titles": [title]}
        (hits,) = self._servers.ask(request, lambda text: read_reply(text, 1, None), PAGES_PATH)
        return [hit.passage for hit in hits]

    def close(self) -> None:
        """Close the connections."""
        self._servers.close()


class _Server:
    """A server whose connections are kept open between requests; several threads may ask it at once."""

    def __init__(self, url: str, usual_path: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"retriever url {url!r} is no address; expected for example http://127.0.0.1:8000/retrieve"
            )
        credentials, _, place = parts.netloc.rpartition("@")
        self.url = parts._replace(netloc=place).geturl()  # as errors name it
        self._path, self._query = parts.path or usual_path, f"?{parts.query}" * bool(parts.query)
        self._headers = {"Content-Type": "application/json"}
        if credentials:
            token = base64.b64encode(unquote_to_bytes(credentials)).decode()
            self._headers["Authorization"] = f"Basic {token}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        host, port = parts.hostname, parts.port
        self._connect = lambda: kind(host, port, timeout=timeout)
        self._idle: list[http.client.HTTPConnection] = []

    def post(self, body: bytes, path: str | None = None) -> bytes:
        """Send a request, to another path of the server than its address names if one is given."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._connect()
        try:
            text = self._ask(connection, body, (path or self._path) + self._query)
        except BaseException:
            # A late answer would be taken for that of the next request.
            connection.close()
            raise
        self._idle.append(connection)
        return text

    def _ask(self, connection: http.client.HTTPConnection, body: bytes, path: str) -> bytes:
        if connection.sock is None:
            connection.connect()
        connection.request("POST", path, body, self._headers)
        response = connection.getresponse()
        # Read one byte more than allowed to detect a longer answer without reading all of it.
        text = response.read(MAX_REPLY_BYTES + 1)
        if response.status != 200:
            raise RetrieverError(f"status {response.status}: {text[:200].decode(errors='replace')}")
        if len(text) > MAX_REPLY_BYTES:
            raise RetrieverError(f"the answer is longer than {MAX_REPLY_BYTES} bytes")
        return text

    def close(self) -> None:
        """Close the connections that are not in use."""
        while self._idle:
            self._idle.pop().close()


def read_reply(text: bytes, num_queries: int, topk: int | None) -> list[list[Hit]]:
    """Parse an answer: for each query a list of ``{"document", "score"}`` or of bare documents.

    At most ``topk`` of them are kept; None keeps all.

    A document has ``contents``, or ``title`` and ``text``. Without an id, its contents serve as the id.

    Raises:
      RetrieverError: the answer has another form.
    """
    try:
        result = json.loads(text)["result"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RetrieverError(f"the answer is no JSON object with 'result': {text[:200]!r}") from error
    if not isinstance(result, list) or len(result) != num_queries:
        raise RetrieverError(f"'result' is not a list of {num_queries} lists: {text[:200]!r}")
    found = []
    for rows in result:
        if not isinstance(rows, list):
            raise RetrieverError(f"the result of a query is {type(rows).__name__}; expected a list")
        found.append([_read_hit(row) for row in rows[:topk]])
    return found


def _read_hit(row: Any) -> Hit:
    score = 0.0
    if isinstance(row, dict) and isinstance(row.get("document"), dict):
        given = row.get("score", 0.0)
        if not isinstance(given, int | float) or isinstance(given, bool):
            raise RetrieverError(f"a score is {given!r}; expected a number")
        score, row = float(given), row["document"]
    if not isinstance(row, dict):
        raise RetrieverError(f"a document is {type(row).__name__}; expected an object")
    contents, title, text = row.get("contents"), row.get("title"), row.get("text")
    if isinstance(contents, str):
        passage = parse_contents(str(row.get("id", contents)), contents)
    elif isinstance(title, str) and isinstance(text, str):
        passage = Passage(str(row.get("id", f"{title}\n{text}")), title, text, is_quoted=False)
    else:
        raise RetrieverError(f"a document has neither 'contents' nor 'title' and 'text': {sorted(row)}")
    return Hit(passage, score)
