"""A Model Context Protocol server as a child process: JSON-RPC 2.0, one message per line."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from empg_envs.base import EnvFault
from empg_envs.orphans import PROGRAM, end_descendants

VERSION = "2025-06-18"  # of the protocol; a server may answer with an older one
TAIL = 1000  # last characters of a server's stderr in messages
PAGES = 100  # most pages of a list of tools


class StdioServer:
    """A running server.

    Args:
      command: the program and its arguments.
      start_timeout: seconds until it has introduced itself.
      timeout: seconds for an answer.

    Raises:
      EnvFault: it cannot be started, or does not speak the protocol.
    """

    def __init__(self, command: Sequence[str], start_timeout: float, timeout: float) -> None:
        self._command, self._timeout, self._last = list(command), timeout, 0
        self._mark = uuid.uuid4().hex
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the program)
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        program = [sys.executable if command[0] in ("python", "python3") else command[0], *command[1:]]
        try:
            self._process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, PROGRAM: self._mark},
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise EnvFault("mcp_crashed", f"{command[0]} cannot be started: {error}") from None
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            about = {"name": "empg-jax", "version": "1"}
            hello = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": about}
            self.ask("initialize", hello, start_timeout)
            self._write({"method": "notifications/initialized"})
        except EnvFault:
            self.close()
            raise

    def ask(self, method: str, params: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """Return the result of a request; an error for a call of a tool is a result with ``isError``.

        Raises:
          EnvFault: the server answers another request with an error, or any not in time, or not at all
            (``mcp_error``, ``mcp_timeout``, ``mcp_crashed``).
        """
        self._last += 1
        self._write({"id": self._last, "method": method, "params": params})
        end = time.monotonic() + (timeout or self._timeout)
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                seconds = timeout or self._timeout
                self._write({"method": "notifications/cancelled", "params": {"requestId": self._last}})
                raise EnvFault(
                    "mcp_timeout", f"no answer to {method} in {round(seconds, 2):g} s{self._tell()}"
                ) from None
            if answer is None:
                self._answers.put(None)  # for later requests, too
                raise EnvFault("mcp_crashed", f"the server ended at {method}{self._tell()}")
            if answer.get("id") != self._last:
                continue  # of a request that was given up
            error = answer.get("error")
            if error is None and "result" in answer:
                return answer["result"]
            if method != "tools/call":
                raise EnvFault("mcp_error", f"{method}: {json.dumps(error)}{self._tell()}")
            text = str(error.get("message")) if isinstance(error, dict) else json.dumps(error)
            return {"content": [{"type": "text", "text": text}], "isError": True}

    def list_tools(self) -> list[dict[str, Any]]:
        """Return the server's tools."""
        tools: list[dict[str, Any]] = []
        params: dict[str, Any] = {}
        for _ in range(PAGES):
            page = self.ask("tools/list", params)
            tools += page.get("tools", [])
            if not page.get("nextCursor"):
                break
            params = {"cursor": page["nextCursor"]}
        return tools

    def call(self, name: str, arguments: dict[str, Any], timeout: float | None = None) -> tuple[str, bool]:
        """Return the text that a tool gives, and whether that is an error; see `ask`."""
        result = self.ask("tools/call", {"name": name, "arguments": arguments}, timeout)
        parts = result.get("content") or []
        texts = [part["text"] if part.get("type") == "text" else f"({part.get('type')})" for part in parts]
        if not texts and "structuredContent" in result:
            texts = [json.dumps(result["structuredContent"], ensure_ascii=False)]
        return "\n".join(texts), bool(result.get("isError", False))

    def close(self) -> None:
        """End the server with all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        end_descendants(None, self._mark, PROGRAM)
        for stream in (self._process.stdin, self._errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def _listen(self) -> None:
        """Read the server's lines until its end; requests of its own are declined, notes are dropped."""
        assert self._process.stdout is not None
        # Closed by who reads it: another thread would wait as long as a process holds the other end.
        with self._process.stdout, contextlib.suppress(OSError):
            for line in self._process.stdout:
                message = None
                with contextlib.suppress(ValueError, RecursionError):
                    message = json.loads(line)
                if not isinstance(message, dict):
                    continue  # a print of the program's
                if "method" not in message:
                    self._answers.put(message)
                elif message["method"] == "ping":
                    self._write({"id": message.get("id"), "result": {}})
                elif "id" in message:
                    error = {"code": -32601, "message": "this client has no such method"}
                    self._write({"id": message["id"], "error": error})
        self._answers.put(None)

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended, which the next answer tells
            self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
            self._process.stdin.flush()

    def _tell(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        said = os.pread(self._errors.fileno(), TAIL, max(0, size - TAIL)).decode(errors="replace").strip()
        return f"; {shlex.join(self._command)} said: {said}" if said else f" ({shlex.join(self._command)})"
