"""The messages between a pool and its workers: lines of JSON."""

from __future__ import annotations

import json
from typing import Any


class ProtocolError(Exception):
    """A worker wrote something that is not a line of the protocol."""


def encode(message: Any) -> bytes:
    """Encode a message as one line of compact JSON."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class LineReader:
    """The lines in a stream of bytes."""

    def __init__(self) -> None:
        """Start at the beginning of a line."""
        self._rest = b""

    def feed(self, chunk: bytes) -> list[dict[str, Any]]:
        """Take the next bytes; return the messages that they complete.

        Raises:
          ProtocolError: a line is not a JSON object.
        """
        self._rest += chunk
        if b"\n" not in chunk:
            return []
        *lines, self._rest = self._rest.split(b"\n")
        return [_decode(line) for line in lines]


def _decode(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError as error:
        raise ProtocolError(f"not JSON: {bytes(line[:80])!r}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"not an object: {bytes(line[:80])!r}")
    return message
