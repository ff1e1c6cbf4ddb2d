"""The command ``empg-jax serve-env``: an environment as an OpenEnv server, until a signal. Starts no JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from empg_envs import resolve_spec
from empg_jax.config.yaml import apply_override, check_option
from empg_jax.run.terminal import build_env
from empg_jax.serve.server import (
    check_key,
    check_packages,
    check_ready_file,
    listen,
    make_server,
    run_server,
)

MAX_MESSAGE = 1 << 20  # bytes of a client's message


def serve_environment(
    target: str,
    options: Sequence[str],
    *,
    host: str,
    port: int,
    ready_file: Path | None,
    api_key: str | None,
    is_open: bool,
    sessions: int,
    idle_timeout: float,
    announce: Callable[[str], None],
) -> None:
    """Serve an environment until SIGINT or SIGTERM, which is then raised again.

    Args:
      target: name or entry point of the environment.
      options: its options as ``key=value``, also spelled ``env.options.key=value``.
      host: address to listen on.
      port: port to listen on; 0 takes a free one.
      ready_file: file to write ``{"url", "model"}`` to when the server answers.
      api_key: bearer token that sessions need, see `empg_jax.serve.server.check_key`; None needs none.
      is_open: whether other machines may reach the server without a key.
      sessions: largest number of sessions at a time.
      idle_timeout: seconds without a message after which a session ends.
      announce: receives the one line that tells the address.

    Raises:
      ServeError: packages are missing, or the address cannot be bound.
      ConfigError: the environment cannot be built, or a key is missing.
    """
    check_packages("starlette", "uvicorn", "websockets")
    check_ready_file(ready_file)
    opens = "play the environment; set --api-key, or --no-key where its clients send none"
    check_key(host, api_key, opens=None if is_open else opens)
    values: dict[str, Any] = {}
    for option in options:
        check_option(option)
        apply_override(values, option.removeprefix("env.options."))
    with listen(host, port) as listener:
        from empg_jax.serve.openenv import Sessions, make_app

        env = build_env(target, values)  # what is wrong is told before anyone connects
        has_threads = getattr(env, "threads", True)
        env.close()
        spec = resolve_spec(target)
        server = make_server(spec.name, listener, ready_file, announce, ws_max_size=MAX_MESSAGE)
        shared = Sessions(
            lambda: spec.make(**values), has_threads=has_threads, limit=sessions, idle=idle_timeout
        )
        server.config.app = make_app(spec.name, shared, api_key=api_key)
        run_server(server, listener, [shared])
