"""The HTTP endpoint of a worker: programs of its episodes call the policy here.

One server per worker process, on loopback. Each episode has a session with a secret of its own, which is in
the path of its base URL and is its key. A call waits until the policy has answered it.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from empg_envs.base import whole_characters
from empg_envs.tool_calls import Message, check_tools, normalize_messages, parse_response

MAX_BODY = 8 << 20
MAX_DIGITS = 20  # of a number that is read
MODEL = "policy"

Body = dict[str, Any]


class Call:
    """One call of a program: what it asks, and later the policy's answer."""

    def __init__(self, session: Session, body: Body, has_left: Callable[[], bool]) -> None:
        """Read the body; ``has_left`` says whether the program still waits for the answer.

        Raises:
          ValueError: it is malformed, or asks for several choices.
        """
        if body.get("n") not in (None, 1):
            raise ValueError(f"n={body['n']!r}: a call in training has one choice")
        self.tools = [] if body.get("tool_choice") == "none" else check_tools(body.get("tools"))
        messages = body.get("messages")
        self.messages = session.restore(messages, normalize_messages(messages))
        self.is_streamed = bool(body.get("stream"))
        self._has_one_call = body.get("parallel_tool_calls") is False
        self.id, self.has_left = secrets.token_hex(8), has_left
        self._answered = threading.Event()
        self._answer: Message | None = None

    def repeats(self, call: Call) -> bool:
        """Say whether this is the same question again: clients send a call that took too long once more."""
        return (self.messages, self.tools) == (call.messages, call.tools)

    def read(self, text: str) -> Message:
        """Make the message that the program gets of the policy's response."""
        message = parse_response(text, self.tools, lambda i: f"call_{self.id}_{i}")
        if self._has_one_call and "tool_calls" in message:
            message["tool_calls"] = message["tool_calls"][:1]
        for call in message.get("tool_calls", ()):  # a program may say what it was called with
            call["function"]["arguments"] = whole_characters(call["function"]["arguments"])
        return message

    def answer(self, message: Message) -> None:
        """Give the program its answer."""
        self._answer = message
        self._answered.set()

    def drop(self) -> None:
        """Give the call up: its episode has ended, or nobody waits for it any more."""
        self._answered.set()

    def wait(self) -> Message | None:
        """Wait for the answer; None if the call was given up."""
        self._answered.wait()
        return self._answer


class Session:
    """The calls of one episode.

    Attributes:
      calls: calls that are not taken yet, oldest first.
    """

    def __init__(self) -> None:
        self.key = secrets.token_urlsafe(18)
        self.calls: queue.SimpleQueue[Call] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: set[Call] | None = set()
        self._said: dict[str, str] = {}  # messages with tool calls that the policy said, by their JSON

    def add(self, body: Body, has_left: Callable[[], bool] = lambda: False) -> Call | None:
        """Queue a call, see `Call`; None after the end of the episode."""
        call = Call(self, body, has_left)
        with self._lock:
            if self._open is None:
                return None
            self._open.add(call)
            self.calls.put(call)
        return call

    def take_repeat(self, call: Call) -> Call | None:
        """Take the oldest call that repeats this one and still waits, or None; the others stay in order."""
        with self._lock:  # no call is added meanwhile
            calls = [self.calls.get() for _ in range(self.calls.qsize())]
            again = next((other for other in calls if other.repeats(call) and not other.has_left()), None)
            for other in calls:
                if other is not again:
                    self.calls.put(other)
        return again

    def answer(self, call: Call, text: str) -> None:
        """Answer a call with the policy's response."""
        message = call.read(text)
        with self._lock:
            if self._open is not None:
                self._open.discard(call)
            if "tool_calls" in message:
                self._said[_key(message)] = text
        call.answer(message)  # last: the program's next call may come at once, and looks for the text

    def restore(self, raw: Any, messages: list[Message]) -> list[Message]:
        """Put the sampled text in the place of messages that the policy said, so that it stays as sampled."""
        with self._lock:
            return [
                {"role": "assistant", "content": self._said[_key(before)]}
                if before.get("tool_calls") and _key(before) in self._said
                else message
                for before, message in zip(raw, messages, strict=True)
            ]

    def close(self) -> None:
        """End the session: open calls are given up, later ones are refused."""
        with self._lock:
            calls, self._open = self._open or set(), None
        for call in calls:
            call.drop()


def _key(message: Message) -> str:
    """Return what makes two messages with tool calls the same; clients add and drop other keys."""
    calls = [
        (call.get("id"), call["function"].get("name"), call["function"].get("arguments"))
        for call in message["tool_calls"]
        if isinstance(call, dict) and isinstance(call.get("function"), dict)
    ]
    return json.dumps([message.get("content") or "", calls], sort_keys=True, default=str)


class Endpoint:
    """The server and its sessions."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        endpoint = self

        class Handler(_Handler):
            find = staticmethod(lambda key: endpoint._sessions.get(key))

        self._server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True, name="calls").start()

    def open(self) -> Session:
        """Open a session."""
        session = Session()
        self._sessions[session.key] = session
        return session

    def url_of(self, session: Session) -> str:
        """Return the value of ``OPENAI_BASE_URL``."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/{session.key}/v1"

    def close(self, session: Session) -> None:
        """End a session."""
        self._sessions.pop(session.key, None)
        session.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        session, route = self._route()
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "empg-jax"}
        name = route.removeprefix("/v1/models/")
        if session is not None and route == "/v1/models":
            self._send(200, {"object": "list", "data": [model]})
        elif session is not None and name == MODEL:
            self._send(200, model)
        elif session is not None and name != route:
            self._refuse(404, f"model {name!r} does not exist; there is {MODEL!r}", "model_not_found")
        else:
            self._refuse(*_missing(session, route))

    def do_POST(self) -> None:
        session, route = self._route()
        if "Transfer-Encoding" in self.headers:  # its chunks would be read as the next request
            self.close_connection = True
            self._refuse(411, "send the body whole, with its Content-Length; Transfer-Encoding is not read")
            return
        given = (self.headers.get("Content-Length") or "0").strip()
        length = int(given) if given.isdecimal() and len(given) < MAX_DIGITS else -1
        if not 0 <= length <= MAX_BODY:
            self.close_connection = True
            most = f"Content-Length must be a number of bytes up to {MAX_BODY} ({MAX_BODY >> 20} MiB)"
            self._refuse(400 if length < 0 else 413, most)
            return
        body = self.rfile.read(length)
        if session is None or route != "/v1/chat/completions":
            self._refuse(*_missing(session, route))
            return
        try:
            found = json.loads(body)
            if not isinstance(found, dict):
                raise ValueError("the body must be a JSON object")
            call = session.add(found, self._has_left)
        except (ValueError, RecursionError) as error:
            self._refuse(400, str(error))
            return
        message = None if call is None else call.wait()
        if call is None or message is None:
            self._refuse(410, "this episode has ended")
        elif call.is_streamed:
            self._stream(call, message)
        else:
            choice = {"index": 0, "message": message, "finish_reason": _reason(message), "logprobs": None}
            self._send(200, _head(call, "chat.completion") | {"choices": [choice]})

    def log_message(self, *_: Any) -> None:
        pass

    def _route(self) -> tuple[Session | None, str]:
        key, _, route = self.path.partition("?")[0].removeprefix("/").partition("/")
        session = self.find(key)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if session is not None and not hmac.compare_digest(given.encode(), session.key.encode()):
            session = None
        return session, f"/{route}"

    find: Any

    def _has_left(self) -> bool:
        """Say whether the client has closed its connection; asked while its call waits."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:  # nothing came, so it waits
            return False
        except OSError:
            return True

    def _stream(self, call: Call, message: Message) -> None:
        delta = dict(message)
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": i, **c} for i, c in enumerate(delta["tool_calls"])]
        head = _head(call, "chat.completion.chunk")
        choices: Iterator[Body] = iter(
            [
                {"index": 0, "delta": delta, "finish_reason": None},
                {"index": 0, "delta": {}, "finish_reason": _reason(message)},
            ]
        )
        events = [f"data: {json.dumps(head | {'choices': [choice]})}\n\n" for choice in choices]
        self._write(200, "".join([*events, "data: [DONE]\n\n"]).encode(), "text/event-stream")

    def _send(self, status: int, body: Body) -> None:
        self._write(status, json.dumps(body).encode(), "application/json")

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": code}})

    def _write(self, status: int, body: bytes, kind: str) -> None:
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body)}", *(["Connection: close"] if self.close_connection else [])]
        head = "\r\n".join([*lines, "", ""]).encode()
        # One packet. The program may have gone away meanwhile, which is its own affair.
        with contextlib.suppress(OSError):
            self.wfile.write(head + body)


def _missing(session: Session | None, route: str) -> tuple[int, str]:
    if session is None:
        return 401, "no episode has this key: it is wrong, or the episode has ended"
    return 404, f"{route} does not exist; there are /v1/chat/completions and /v1/models"


def _head(call: Call, kind: str) -> Body:
    return {"id": f"chatcmpl-{call.id}", "object": kind, "created": int(time.time()), "model": MODEL}


def _reason(message: Message) -> str:
    return "tool_calls" if "tool_calls" in message else "stop"
