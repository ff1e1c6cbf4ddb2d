"""Workers on the nodes of a Ray cluster: each is an actor that runs one worker process beside itself.

The actor only relays bytes (`empg_jax.workers.relay`). When its node is gone, or when Ray ends it or it does
not answer, nothing is known of the commands that its process had taken. So none is blamed, and the pool
starts another actor on a node that is left. Ray is imported by `RayCluster` only.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import importlib.util
import logging
import os
import re
import selectors
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from empg_jax import __version__
from empg_jax.errors import ConfigError
from empg_jax.workers.faults import RefusedPool
from empg_jax.workers.lines import LineReader, encode
from empg_jax.workers.relay import Relay
from empg_jax.workers.variables import make_environment

CONNECT_SECONDS = 10.0  # that the head of a cluster may take to answer
ANSWER_SECONDS = 5.0  # that an actor may take to end its process, beyond the grace
LOSS_CHARS = 2000  # of Ray's description of a dead actor
# Calls of one kind are made one after another, beside those of the other kinds.
GROUPS = {"input": 1, "output": 1, "end": 1}


def check_ray(address: str | None) -> None:
    """Check whether Ray can be used, without importing it.

    Raises:
      ConfigError: it is not installed, or nobody answers at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("workers.backend=ray needs ray; in the clone: pip install -e '.[ray]'")
    key, where = "workers.ray_address", address
    if where is None:
        key, where = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS")
    if where in (None, "", "auto"):
        return
    host, _, port = where.rpartition(":")
    if not host or "://" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"{key}={where} must be HOST:PORT, for example node0:6379, of a cluster that this machine is a "
            "node of (ray:// addresses are not)"
        )
    try:  # ray.init would wait for many minutes
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: what cannot be a host's name
        raise ConfigError(f"{key}={where}: no Ray cluster answers there: {error}") from None


class RayCluster:
    """A connection to a Ray cluster, which starts workers there."""

    def __init__(self, address: str | None, resources: Mapping[str, float]):
        """Connect.

        Args:
          address: HOST:PORT of the cluster; None finds the one named by ``RAY_ADDRESS`` or running on this
            machine. None is started here: Ray would fork this process, in which JAX runs.
          resources: what a worker takes of its node, by Ray's names (``CPU``, ``memory``, or one's own).

        Raises:
          ConfigError: Ray is not installed, or nobody answers at the address.
          RefusedPool: the cluster cannot be joined.
        """
        check_ray(address)
        # What nodes report of themselves would be printed into the progress; the events of a run tell it.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
        self._ray = ray = importlib.import_module("ray")
        if not ray.is_initialized():
            _connect(ray, address)
        self._resources = dict(resources)
        options = dict(resources)
        self._options = {
            "num_cpus": options.pop("CPU", 0),
            "num_gpus": options.pop("GPU", 0),
            "memory": options.pop("memory", None),
            "resources": options,
            "scheduling_strategy": "SPREAD",  # the loss of a node costs as few workers as possible
            "max_restarts": 0,  # the supervisor replaces lost workers
            # Else Ray kills the worker process, which then cannot end what its environments started.
            "runtime_env": {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}},
        }
        self._actor_class = ray.remote(concurrency_groups=GROUPS)(Relay)

    def start(self, pass_env: Sequence[str], selector: selectors.BaseSelector, owner: Any) -> RayProcess:
        """Start a worker; see `empg_jax.workers.backend.Start`."""
        actor = self._actor_class.options(**self._options).remote(
            __version__, list(pass_env), make_environment(pass_env), os.getcwd()
        )
        return RayProcess(self._ray, actor, selector, owner, f"no node had {self._resources} free")


class RayProcess:
    """A worker process beside a Ray actor; see `empg_jax.workers.backend.Process`."""

    was_blocked = False  # what the worker writes is taken at once, also while the pool is busy elsewhere

    def __init__(self, ray: Any, actor: Any, selector: selectors.BaseSelector, owner: Any, waiting: str):
        """Watch an actor; ``waiting`` describes one that has not begun."""
        self._ray, self._actor, self._selector = ray, actor, selector
        self._loss = waiting  # what is known when the actor is asked no more
        self._pid: int | None = None
        self._is_lost = self._has_closed = False
        self._lines = LineReader()
        self._arrived: collections.deque[tuple[bytes, bool]] = collections.deque()
        self.queued_bytes = self.consumed_bytes = 0
        # The selector watches a bell, which is rung when something has arrived.
        self._bell, rope = socket.socketpair()
        self._bell.setblocking(False)
        rope.setblocking(False)
        selector.register(self._bell, selectors.EVENT_READ, owner)
        threading.Thread(target=self._listen, args=(rope,), daemon=True, name="ray worker").start()

    @property
    def pid(self) -> int | None:
        """Process id on its node; None until that is known."""
        return self._pid

    def send(self, message: Any) -> None:
        """Queue one message."""
        line = encode(message)
        self._call("send", "input", self.queued_bytes, line)
        self.queued_bytes += len(line)

    def write(self) -> bool:
        """Do nothing: Ray moves what was sent."""
        return False

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Take the messages that have arrived."""
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass
        messages, closed = [], False
        while self._arrived:
            chunk, closed = self._arrived.popleft()
            messages += self._lines.feed(chunk)
        return messages, closed

    def is_alive(self) -> bool:
        """Return False once the process, its actor or its node has ended."""
        return not self._has_closed

    def hang_up(self) -> None:
        """Close the worker's input."""
        self._call("hang_up", "input")

    def stop(self, grace: float, first_signal: int | None = None, thread: int | None = None) -> str:
        """End the process and its actor; blocks for `ANSWER_SECONDS` beyond the grace at most."""
        self._selector.unregister(self._bell)
        how = self._loss
        if self._pid is not None and not self._is_lost:
            answer = self._call("stop", "end", grace, first_signal, thread)
            try:
                how, self.consumed_bytes = self._ray.get(answer, timeout=grace + ANSWER_SECONDS)
            except self._ray.exceptions.RayError as error:
                how = f"its Ray actor does not answer: {_describe(error)}"
        self._ray.kill(self._actor)
        self._bell.close()
        return how

    def _call(self, method: str, group: str, *args: Any) -> Any:
        return getattr(self._actor, method).options(concurrency_group=group).remote(*args)

    def _listen(self, rope: socket.socket) -> None:
        """Take what the worker writes as soon as it does, in a thread of its own."""
        closed = False
        try:
            self._pid = self._ray.get(self._call("find_pid", "output"))
            while not closed:
                chunk, closed = self._ray.get(self._call("receive", "output"))
                self._has_closed |= closed
                self._arrived.append((chunk, closed))
                _ring(rope)
        # Whatever it is, there is nothing to listen to any more, and the pool must hear of it.
        except Exception as error:
            self._loss, self._is_lost = f"its Ray actor is gone: {_describe(error)}", True
            self._has_closed = True
            self._arrived.append((b"", True))
        _ring(rope)
        rope.close()


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster, quietly, and leave this process' own signal handler in its place."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level=logging.CRITICAL)
    except (ConnectionError, RuntimeError) as error:
        where = "null" if address is None else address
        raise RefusedPool(
            f"workers.ray_address={where}: no Ray cluster can be joined; start one with `ray start --head`: "
            f"{error}"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _ring(rope: socket.socket) -> None:
    """Wake the pool; a full rope has rung already, and a pool that has hung up needs none."""
    with contextlib.suppress(OSError):
        rope.send(b"!")


def _describe(error: Exception) -> str:
    """Return Ray's sentences, without its indented tables and tracebacks."""
    lines = [line for line in str(error).splitlines() if not line[:1].isspace()]
    return re.sub(r"\x1b\[\d+m", "", " ".join(lines))[-LOSS_CHARS:] or type(error).__name__
