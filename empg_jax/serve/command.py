"""The command ``empg-jax serve``: load a policy, answer HTTP until a signal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import RunError
from empg_jax.serve.server import (
    Work,
    check_key,
    check_packages,
    check_ready_file,
    listen,
    make_server,
    run_server,
)

if TYPE_CHECKING:
    import uvicorn

    from empg_jax.serve.app import More
    from empg_jax.serve.driver import Driver
    from empg_jax.serve.policy import Policy
    from empg_jax.serve.service import Service
    from empg_jax.serve.tinker.worker import Worker


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
      api_key: bearer token that requests need, not empty and without blanks at its ends; None needs none, and
        is refused where other machines could train the policy.
      is_trained: whether clients may train the policy, by the Tinker API.
      say: receives messages for the user.
      announce: receives the one line that tells the address.

    Raises:
      ServeError: packages are missing, or the address cannot be bound.
      ConfigError: the policy, the key or an option cannot be used.
    """
    check_packages("starlette", "uvicorn", *(["google.protobuf"] if is_trained else []))
    check_ready_file(ready_file)
    check_key(host, api_key, opens="train the policy; set --api-key" if is_trained else None)
    with listen(host, port) as listener:
        from empg_jax.serve.app import make_app
        from empg_jax.serve.driver import Driver
        from empg_jax.serve.policy import open_policy
        from empg_jax.serve.reload import make_reload
        from empg_jax.serve.service import make_service

        policy = open_policy(source, overrides, say, is_trained=is_trained)
        settings = policy.config.serve
        if settings.warm_up:
            policy.engine.warm_up()
        server = make_server(policy.name, listener, ready_file, announce)
        driver = Driver(policy.engine, max_waiting=settings.max_waiting, on_failure=lambda: _end(server))
        service = make_service(policy, max_choices=driver.most_at_once)
        with contextlib.ExitStack() as stack:
            more: list[More]
            works: list[Work] = [stack.enter_context(driver)]
            if is_trained:
                more, worker = _make_training(policy, service, driver, say)
                works.append(stack.enter_context(worker))
            else:
                more = [make_reload(policy.engine, driver, has_key=api_key is not None)]
            server.config.app = make_app(
                service, driver, api_key=api_key, max_body_bytes=settings.max_body_mb << 20, more=more
            )
            run_server(server, listener, works)
        if driver.failure is not None:
            raise EngineError(f"the engine failed: {driver.failure}")


def _end(server: uvicorn.Server) -> None:
    server.should_exit = True


def _make_training(
    policy: Policy, service: Service, driver: Driver, say: Callable[[str], None]
) -> tuple[list[More], Worker]:
    """Make the routes of the training API and their thread."""
    from empg_jax.serve.tinker.build import make_routes
    from empg_jax.serve.tinker.worker import Worker

    worker = Worker()
    return make_routes(policy, service, driver, worker, say), worker
