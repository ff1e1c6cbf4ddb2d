"""What our HTTP servers share: a bound address, uvicorn until a signal, an end that waits for nobody."""

from __future__ import annotations

import contextlib
import functools
import hmac
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from empg_jax.errors import ConfigError, UserError, writing
from empg_jax.files import try_folder, write_json_atomic

if TYPE_CHECKING:
    import uvicorn

GRACE = 1  # seconds that requests in progress get after a signal
BACKLOG = 2048


class ServeError(UserError):
    """A server that cannot start. The message gives the reason."""


class Work(Protocol):
    """Threads of a server that end before it does."""

    @property
    def is_busy(self) -> bool:
        """Whether a thread still runs."""
        ...

    def close(self) -> None:
        """Stop; what takes long is left alone."""
        ...


def check_packages(*names: str) -> None:
    """Look for the packages that a server needs.

    Raises:
      ServeError: one is not installed; the message says how to install it.
    """
    missing = [name.rpartition(".")[2] for name in names if _is_missing(name)]
    if missing:
        raise ServeError(f"{' and '.join(missing)} not installed; they come with: pip install -e '.[serve]'")


def _is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # the package above it is missing
        return True


def check_ready_file(path: Path | None) -> None:
    """Look whether the file for the address can be written.

    Raises:
      ConfigError: its folder does not exist or takes no file, or it is a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir() or path.is_dir():
        raise ConfigError(f"--ready-file {path}: expected a file in a folder that exists")
    with writing(f"--ready-file {path}", ConfigError):
        try_folder(path.parent)


def check_key(host: str, api_key: str | None, *, opens: str | None) -> None:
    """Check a key, and that there is one where other machines could do what needs it.

    Args:
      host: the address to listen on.
      api_key: the key, or None.
      opens: what everyone who reaches the address could do without a key; None: nothing that needs one.

    Raises:
      ConfigError: the key is empty or has blanks at its ends, or a key is missing.
    """
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise ConfigError("--api-key is empty or has blanks at its ends; leave it out to let everyone in")
    if api_key is None and opens is not None and not _is_loopback(host):
        raise ConfigError(f"--host {host} without a key: everyone who reaches it could {opens}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def has_key(authorization: str, api_key: str | None) -> bool:
    """Return whether a request's header carries the bearer token; without a key every one does."""
    kind, _, given = authorization.partition(" ")
    is_right = hmac.compare_digest(given.strip().encode(), (api_key or "").encode())
    return api_key is None or (kind.lower() == "bearer" and is_right)


def listen(host: str, port: int) -> socket.socket:
    """Bind an address; whoever starts several servers learns at once that a port is taken.

    Raises:
      ServeError: it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {host}:{port}: {error}") from None
    return listener


def make_server(
    name: str,
    listener: socket.socket,
    ready_file: Path | None,
    announce: Callable[[str], None],
    **options: Any,
) -> uvicorn.Server:
    """Make the HTTP server, which tells its address when it answers; it has no application yet.

    Args:
      name: what is served.
      listener: the bound address.
      ready_file: file to write ``{"url", "model"}`` to.
      announce: receives the one line that tells the address.
      **options: further options of ``uvicorn.Config``.
    """
    import uvicorn

    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    tell = functools.partial(_tell, name, url, ready_file, announce)

    class Server(uvicorn.Server):
        """uvicorn, which tells when it answers."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                tell()

    config = uvicorn.Config(
        _no_app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE,
        backlog=BACKLOG,
        **options,
    )
    return Server(config)


def _tell(name: str, url: str, ready_file: Path | None, announce: Callable[[str], None]) -> None:
    announce(f"serving {name} at {url}")
    if ready_file is not None:
        with writing(f"--ready-file {ready_file}", ConfigError):
            write_json_atomic(ready_file, {"url": url, "model": name})


async def _no_app(*_: object) -> None:
    raise AssertionError("the application is set before the server runs")


def run_server(server: uvicorn.Server, listener: socket.socket, works: Sequence[Work]) -> None:
    """Answer until a signal, which is raised again when `works` are closed."""
    with ending(works):
        server.run(sockets=[listener])  # uvicorn raises the signal again, which ends this process


@contextlib.contextmanager
def ending(works: Sequence[Work]) -> Iterator[None]:
    """Close `works` at a signal; the process does not wait for a thread that is busy (it may compile)."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        for work in works:
            work.close()
        if any(work.is_busy for work in works):
            sys.stdout.flush()
            sys.stderr.flush()
            code = error.code if isinstance(error, SystemExit) else 128 + signal.SIGINT
            os._exit(code if isinstance(code, int) else 1)
        raise
