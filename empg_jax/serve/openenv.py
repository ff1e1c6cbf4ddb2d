"""Environments behind OpenEnv's messages: one WebSocket is one session with an environment of its own.

A client sends ``{"type": "reset" | "step" | "state" | "close", "data": {...}}`` to ``/ws``. Answers are
observations (``text``, ``info``, ``truncated``, beside ``reward`` and ``done``), states, or errors with a
code and a message, after which the session goes on. An action is ``{"message": TEXT}``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from empg_envs.answers import Reply, check_answer, plain_number
from empg_envs.base import EnvFault, TextEnv
from empg_jax.serve.server import has_key
from empg_jax.serve.tinker.worker import Worker

BLOCK = 1 << 28  # numbers between the seeds of two splits, as clients of this project count them
LONGEST_ID = 255
MOST_EARLY = 64  # messages that may wait while an earlier one is answered

Body = dict[str, Any]


class Refusal(Exception):
    """A message that cannot be answered with an observation.

    Args:
      code: OpenEnv's name for what went wrong.
      message: what it was, and what would be right.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def body(self) -> Body:
        """Return it as a message."""
        return {"type": "error", "data": {"message": str(self), "code": self.code}}


class Session:
    """One client's environment. Its methods run on one thread at a time.

    Args:
      env: an environment of its own.
    """

    def __init__(self, env: TextEnv) -> None:
        self._env = env
        self._state: Body = {"episode_id": None, "step_count": 0}
        self._is_over = "has not begun"

    def answer(self, line: str) -> str:
        """Answer a message; whatever happens is an answer."""
        try:
            # In ASCII: a text may hold half a surrogate pair, which no UTF-8 can hold.
            return json.dumps(self._handle(line), allow_nan=False, default=plain_number)
        except Refusal as error:
            found = error
        except EnvFault as error:
            found = Refusal("EXECUTION_ERROR", f"{error.reason}: {error}")
        except (Exception, SystemExit) as error:  # whatever the code of the environment raises
            found = Refusal("EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        return json.dumps(found.body())

    def close(self) -> None:
        """Release the environment."""
        with contextlib.suppress(Exception):  # nobody is left to be told
            self._env.close()

    def _handle(self, line: str) -> Body:
        message = _read_message(line)
        kind, data = message["type"], message.get("data", {})
        if not isinstance(data, dict):
            raise Refusal("VALIDATION_ERROR", f"data must be an object, not {data!r:.80}")
        if kind == "state":
            return {"type": "state", "data": self._state}
        observed = self._reset(data) if kind == "reset" else self._step(data)
        return {"type": "observation", "data": observed}

    def _reset(self, data: Body) -> Body:
        _check_fields("reset", data, ("seed", "episode_id", "split", "index"))
        name = data.get("episode_id")
        if not (name is None or (isinstance(name, str) and len(name) <= LONGEST_ID)):
            raise Refusal("VALIDATION_ERROR", f"episode_id must be a text of up to {LONGEST_ID} characters")
        seed, split, index = self._choose_task(data)
        self._is_over = "has not begun"
        text, info = self._env.reset(seed, split=split, index=index)
        reply = check_answer(text, 0.0, False, False, info)
        self._is_over = ""
        self._state = {"episode_id": name, "step_count": 0, "split": split, "index": index}
        return {**_observe(reply), "reward": None}

    def _choose_task(self, data: Body) -> tuple[int, str, int]:
        """Return seed, split and index: as given, else from the seed, which counts tasks, split by split."""
        seed = data.get("seed")
        if seed is None:
            seed = secrets.randbelow(BLOCK)
        if type(seed) is not int or seed < 0:
            raise Refusal("VALIDATION_ERROR", f"seed must be an integer from 0, not {seed!r:.80}")
        splits = self._env.list_splits()
        split = data.get("split")
        if split is None:
            split = splits[min(seed // BLOCK, len(splits) - 1)]
        elif split not in splits:
            raise Refusal("VALIDATION_ERROR", f"unknown split {split!r:.80}; there are {', '.join(splits)}")
        count = self._env.num_tasks(split)
        index = data.get("index")
        if index is None:
            index = seed % BLOCK % count
        elif type(index) is not int or not 0 <= index < count:
            raise Refusal("VALIDATION_ERROR", f"index must lie in 0 to {count - 1}, not {index!r:.80}")
        return seed, split, index

    def _step(self, data: Body) -> Body:
        _check_fields("an action", data, ("message", "metadata"))
        if not isinstance(data.get("message"), str):
            raise Refusal("VALIDATION_ERROR", 'an action is {"message": TEXT}')
        if self._is_over:
            raise Refusal("EXECUTION_ERROR", f"the episode {self._is_over}: send reset first")
        text, reward, terminated, truncated, info = self._env.step(data["message"])
        reply = check_answer(text, reward, terminated, truncated, info)
        self._state = {**self._state, "step_count": self._state["step_count"] + 1}
        observed = _observe(reply)
        if observed["done"]:
            self._is_over = "has ended"
        return observed


def _read_message(line: str) -> Body:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Refusal("INVALID_JSON", f"the message is not JSON: {error}") from None
    kind = message.get("type") if isinstance(message, dict) else None
    if kind not in ("reset", "step", "state"):
        raise Refusal("UNKNOWN_TYPE", f"unknown type {kind!r:.80}; there are reset, step, state, close")
    return message


def _check_fields(what: str, data: Body, known: tuple[str, ...]) -> None:
    unknown = next((name for name in data if name not in known), None)
    if unknown is not None:
        raise Refusal("VALIDATION_ERROR", f"{what} has no field {unknown!r:.80}; it has {', '.join(known)}")


def _observe(reply: Reply) -> Body:
    # What is for a trainer alone stays here.
    told = {name: value for name, value in reply["info"].items() if name != "known_answer"}
    observation = {"text": reply["observation"], "info": told, "truncated": reply["truncated"]}
    done = reply["terminated"] or reply["truncated"]
    return {"observation": observation, "reward": reply["reward"], "done": done}


class Sessions:
    """The sessions of a server, with a limit.

    Args:
      make: builds an environment.
      has_threads: whether environments in several threads do not disturb each other; where they do, all
        sessions share one thread.
      limit: largest number of sessions at a time.
      idle: seconds without a message after which a session ends.
    """

    def __init__(self, make: Callable[[], TextEnv], *, has_threads: bool, limit: int, idle: float) -> None:
        self._make, self._limit, self._idle = make, limit, idle
        self._building = threading.Lock()  # environments are built one at a time
        self._shared = None if has_threads else Worker().__enter__()
        self._workers: set[Worker] = set()
        self.active = 0

    @property
    def is_busy(self) -> bool:
        """Whether an environment still computes."""
        workers = [*self._workers, *([self._shared] if self._shared is not None else [])]
        return any(worker.is_busy for worker in workers)

    def close(self) -> None:
        """Stop all threads; an environment that takes long is left alone."""
        for worker in (*self._workers, *([self._shared] if self._shared is not None else [])):
            worker.close()

    async def serve(self, socket: WebSocket) -> None:
        """Serve one client to its end."""
        await socket.accept()
        if self.active >= self._limit:
            full = Refusal("CAPACITY_REACHED", f"{self._limit} sessions are open (--sessions): close one")
            await _end(socket, full)
            return
        self.active += 1
        worker = self._shared or Worker().__enter__()
        if worker is not self._shared:
            self._workers.add(worker)
        try:
            await self._talk(socket, worker)
        except WebSocketDisconnect:
            pass
        finally:
            self.active -= 1
            if worker is not self._shared:
                self._workers.discard(worker)
                worker.finish()

    async def _talk(self, socket: WebSocket, worker: Worker) -> None:
        session = await worker.run(self._open)
        if isinstance(session, Refusal):
            await _end(socket, session)
            return
        lines: asyncio.Queue[str] = asyncio.Queue(MOST_EARLY)
        listening = asyncio.ensure_future(_listen(socket, lines))
        # A client may leave when nobody looks any more, which is no error to tell.
        listening.add_done_callback(lambda future: future.cancelled() or future.exception())
        try:
            while not _is_close(line := await _while_there(listening, lines.get(), self._idle)):
                answer = worker.run(functools.partial(session.answer, line))
                await socket.send_text(await _while_there(listening, answer))
            await socket.close()
        except TimeoutError:
            silent = f"no message for {self._idle:g} s (--idle-timeout)"
            await _end(socket, Refusal("SESSION_ERROR", silent))
        except asyncio.QueueFull:
            many = f"more than {MOST_EARLY} messages wait for an answer: send the next after the answer"
            await _end(socket, Refusal("SESSION_ERROR", many))
        finally:
            listening.cancel()
            worker.submit(session.close, lambda *_: None)

    def _open(self) -> Session | Refusal:
        try:
            with self._building:
                return Session(self._make())
        except (Exception, SystemExit) as error:  # the environment's own code
            return Refusal("FACTORY_ERROR", f"the environment cannot be built: {error}")


async def _listen(socket: WebSocket, lines: asyncio.Queue[str]) -> NoReturn:
    """Put the client's messages into a queue, until it leaves or the queue is full."""
    while True:
        lines.put_nowait(await _receive(socket))


async def _while_there(
    listening: asyncio.Future[NoReturn], work: Coroutine[Any, Any, str], seconds: float | None = None
) -> str:
    """Return the result of some work, which may take for ever but must not outlive the client.

    Raises:
      TimeoutError: it took too long.
      WebSocketDisconnect: the client is gone.
      QueueFull: the client sent more than it may.
    """
    working = asyncio.ensure_future(work)
    both: set[asyncio.Future[Any]] = {working, listening}
    try:
        await asyncio.wait(both, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if listening.done():
            listening.result()
        if not working.done():
            raise TimeoutError
        return working.result()
    finally:
        working.cancel()


async def _receive(socket: WebSocket) -> str:
    """Return the next message; bytes that are no text are told like any other nonsense."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1000))
    text = message.get("text")
    return text if text is not None else (message.get("bytes") or b"").decode(errors="replace")


def _is_close(line: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        message = json.loads(line)
        return isinstance(message, dict) and message.get("type") == "close"
    return False


async def _end(socket: WebSocket, error: Refusal) -> None:
    await socket.send_text(json.dumps(error.body()))
    await socket.close()


def make_app(name: str, sessions: Sessions, *, api_key: str | None) -> Starlette:
    """Build the application.

    Args:
      name: the environment's name on the wire.
      sessions: its sessions.
      api_key: the bearer token that a session needs; None needs none.
    """

    def tell(body: Body, status: int = 200) -> Callable[[Request], Response]:
        return lambda request: JSONResponse(body, status_code=status)

    async def play(socket: WebSocket) -> None:
        # A page of another site in a browser on this machine is not a client.
        origin = socket.headers.get("origin")
        is_foreign = origin is not None and urlsplit(origin).netloc != socket.headers.get("host")
        if is_foreign or not has_key(socket.headers.get("authorization", ""), api_key):
            await socket.close(code=1008)
            return
        await sessions.serve(socket)

    alone = {"detail": "episodes are played over the WebSocket /ws: a request of HTTP has no session"}
    return Starlette(
        routes=[
            Route(
                "/health", lambda request: JSONResponse({"status": "healthy", "sessions": sessions.active})
            ),
            Route("/metadata", tell({"name": name, "description": f"{name} of empg-jax, in texts"})),
            Route("/schema", tell(_SCHEMA)),
            *(Route(path, tell(alone, 409), methods=["POST"]) for path in ("/reset", "/step")),
            Route("/state", tell(alone, 409)),
            WebSocketRoute("/ws", play),
        ]
    )


_TEXT, _OBJECT, _FLAG = {"type": "string"}, {"type": "object"}, {"type": "boolean"}
_SCHEMA = {
    "action": {
        "title": "Action",
        "type": "object",
        "properties": {"message": _TEXT, "metadata": _OBJECT},
        "required": ["message"],
        "additionalProperties": False,
    },
    "observation": {
        "title": "Observation",
        "type": "object",
        "properties": {"text": _TEXT, "info": _OBJECT, "truncated": _FLAG},
        "required": ["text", "info", "truncated"],
    },
    "state": {
        "title": "State",
        "type": "object",
        "properties": {
            "episode_id": {"type": ["string", "null"]},
            "step_count": {"type": "integer"},
            "split": _TEXT,
            "index": {"type": "integer"},
        },
    },
}
