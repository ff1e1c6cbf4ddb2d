"""The page while a run trains: served to this machine alone, from the files of the run."""

from __future__ import annotations

import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from empg_jax.report.view.packing import compress
from empg_jax.report.view.page import Book, render

LOOPBACK = "127.0.0.1"
OWN_NAMES = ("127.0.0.1", "localhost", "[::1]")


class LiveServer(ThreadingHTTPServer):
    """An HTTP server on the loopback address; every answer is made from the files as they are.

    Args:
      book: the run's episodes.
      port: the port; 0 takes a free one.

    Raises:
      OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, book: Book, port: int) -> None:
        super().__init__((LOOPBACK, port), _Handler)
        self.book = book
        self.lock = threading.Lock()  # a book is packed by one thread at a time

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_address[1]}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        # A page of another site could reach this server under a name of its own; it gets nothing.
        if self.headers.get("Host", "").rpartition(":")[0] not in OWN_NAMES:
            self._answer(403, "text/plain", b"only requests to this machine by its own name are answered")
            return
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        book = self.server.book
        if path == "/":
            page = "".join(render(book.run_dir.resolve().name, {}))
            self._answer(200, "text/html; charset=utf-8", page.encode())
        elif path == "/state":
            self._answer(200, "text/plain", book.state().encode())
        elif path.startswith("/data/"):
            self._data(path.removeprefix("/data/"))
        else:
            self._answer(404, "text/plain", b"no such page")

    def _data(self, name: str) -> None:
        book = self.server.book
        with self.server.lock:
            made = {"head": book.head, "search": book.search}.get(name)
            content = compress(made()) if made is not None else book.chunks().get(name)
        if content is None:
            self._answer(404, "text/plain", f"{name} is not there; the run may have gone back".encode())
        else:
            self._answer(200, "application/gzip", content)

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Stay silent: each look at the run would be a line."""
