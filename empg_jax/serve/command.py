"""The command ``empg-jax serve``: load a policy, answer HTTP until a signal."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from empg_jax.errors import ConfigError, RunError, UserError
from empg_jax.files import write_json_atomic

if TYPE_CHECKING:
    import uvicorn

    from empg_jax.serve.app import More
    from empg_jax.serve.driver import Driver
    from empg_jax.serve.policy import Policy
    from empg_jax.serve.service import Service
    from empg_jax.serve.tinker.worker import Worker

GRACE = 1  # seconds that requests in progress get after a signal
BACKLOG = 2048


class ServeError(UserError):
    """A server that cannot start. The message gives the reason."""


class EngineError(RunError):
    """A server whose engine failed."""


def serve_policy(
    source: str,
    overrides: Sequence[str],
    *,
    host: str,
    port: int,
    ready_file: Path | None,
    api_key: str | None,
    is_trained: bool = False,
    say: Callable[[str], None],
    announce: Callable[[str], None],
) -> None:
    """Serve a policy until SIGINT or SIGTERM, which is then raised again.

    Args:
      source: see `empg_jax.serve.policy.open_policy`.
      overrides: dotted overrides of the configuration.
      host: address to listen on.
      port: port to listen on; 0 takes a free one.
      ready_file: file to write ``{"url", "model"}`` to when the server answers.
      api_key: bearer token that requests need; None needs none.
      is_trained: whether clients may train the policy, by the Tinker API.
      say: receives messages for the user.
      announce: receives the one line that tells the address.

    Raises:
      ServeError: packages are missing, or the address cannot be bound.
      ConfigError: the policy or an option cannot be used.
    """
    _check_packages("starlette", "uvicorn", *(["google.protobuf"] if is_trained else []))
    if ready_file is not None and not ready_file.parent.is_dir():
        raise ConfigError(f"--ready-file {ready_file}: expected a file in a folder that exists")
    # First of all: whoever starts several servers learns at once that a port is taken.
    with _listen(host, port) as listener:
        from empg_jax.serve.app import make_app
        from empg_jax.serve.driver import Driver
        from empg_jax.serve.policy import open_policy
        from empg_jax.serve.reload import make_reload
        from empg_jax.serve.service import Service

        policy = open_policy(source, overrides, say, is_trained=is_trained)
        settings, longest = policy.config.serve, policy.engine.config.max_tokens
        if settings.warm_up:
            policy.engine.warm_up()
        service = Service(policy.name, policy.tokenizer, policy.renderer, max_tokens=longest)
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        server = _make_server(functools.partial(_tell, policy.name, url, ready_file, announce))
        driver = Driver(policy.engine, max_waiting=settings.max_waiting, on_failure=lambda: _end(server))
        with contextlib.ExitStack() as stack:
            more: list[More]
            threads: list[Driver | Worker] = [stack.enter_context(driver)]
            if is_trained:
                more, worker = _make_training(policy, service, driver, say)
                threads.append(stack.enter_context(worker))
            else:
                more = [make_reload(policy.engine, driver, has_key=api_key is not None)]
            server.config.app = make_app(
                service, driver, api_key=api_key, max_body_bytes=settings.max_body_mb << 20, more=more
            )
            _run(server, listener, threads)
        if driver.failure is not None:
            raise EngineError(f"the engine failed: {driver.failure}")


def _tell(name: str, url: str, ready_file: Path | None, announce: Callable[[str], None]) -> None:
    """Tell that the server answers."""
    announce(f"serving {name} at {url}")
    if ready_file is not None:
        write_json_atomic(ready_file, {"url": url, "model": name})


def _run(server: uvicorn.Server, listener: socket.socket, threads: Sequence[Driver | Worker]) -> None:
    """Answer until a signal."""
    try:
        server.run(sockets=[listener])
    except SystemExit as error:
        # uvicorn raises the signal again, which ends this process; see `_leave`.
        for thread in threads:
            thread.close()
        _leave(any(thread.is_busy for thread in threads), error)


def _end(server: uvicorn.Server) -> None:
    server.should_exit = True


def _check_packages(*names: str) -> None:
    missing = [name.rpartition(".")[2] for name in names if _is_missing(name)]
    if missing:
        raise ServeError(f"{' and '.join(missing)} not installed; they come with: pip install -e '.[serve]'")


def _is_missing(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is None
    except ModuleNotFoundError:  # the package above it is missing
        return True


def _make_training(
    policy: Policy, service: Service, driver: Driver, say: Callable[[str], None]
) -> tuple[list[More], Worker]:
    """Make the routes of the training API and their thread."""
    from empg_jax.serve.tinker.build import make_routes
    from empg_jax.serve.tinker.worker import Worker

    worker = Worker()
    return make_routes(policy, service, driver, worker, say), worker


def _leave(is_busy: bool, error: SystemExit) -> NoReturn:
    """End the process; where a thread is busy (it may compile), without waiting for it."""
    if is_busy:
        sys.stderr.flush()
        os._exit(error.code if isinstance(error.code, int) else 1)
    raise error


def _make_server(tell: Callable[[], None]) -> uvicorn.Server:
    """Make the HTTP server; it has no application yet."""
    import uvicorn

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
    )
    return Server(config)


async def _no_app(*_: object) -> None:
    raise AssertionError("the application is set before the server runs")


def _listen(host: str, port: int) -> socket.socket:
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
