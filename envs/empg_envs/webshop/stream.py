"""A reader of large JSON files, one element at a time."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20
_LONGEST_ELEMENT = 64 << 20
_AFTER_VALUE = tuple(",:]} \t\r\n")


def stream_json(path: Path, kind: type) -> Iterator[tuple[Any, Any]]:
    """Yield the elements of a JSON array or object one after the other, with little memory.

    Args:
      path: a JSON file; a name that ends in ``.gz`` marks a gzipped one.
      kind: ``list`` (yields index and element) or ``dict`` (yields key and value).

    Raises:
      ValueError: the file is no JSON array or object.
    """
    opening, closing = "[]" if kind is list else "{}"
    decoder = json.JSONDecoder()
    with _open_text(path) as file:
        reader = _Reader(file, path)
        if reader.next_mark() != opening:
            raise ValueError(f"{path} must hold a JSON {'array' if kind is list else 'object'}")
        number = 0
        while (mark := reader.next_mark()) != closing:
            if mark != "," and number:
                raise ValueError(f"{path}: expected ',' or {closing!r} after element {number}, not {mark!r}")
            if number == 0:
                reader.push_back()
            key = number if kind is list else reader.decode(decoder)
            if kind is dict and reader.next_mark() != ":":
                raise ValueError(f"{path}: expected ':' after the key {key!r}")
            yield key, reader.decode(decoder)
            number += 1


class _Reader:
    """A window on a text file, moved forward one element at a time."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._is_end = "", 0, False

    def _more(self) -> bool:
        if self._is_end:
            return False
        chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._text, self._at = self._text[self._at :] + chunk, 0
        self._is_end = not chunk
        return True

    def _skip_blanks(self) -> None:
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return

    def next_mark(self) -> str:
        """Return the next non-blank character, or the empty string at the end."""
        self._skip_blanks()
        mark = self._text[self._at : self._at + 1]
        if not mark:
            raise ValueError(f"{self._path} ends in the middle: is it a whole JSON file?")
        self._at += 1
        return mark

    def push_back(self) -> None:
        """Undo the last `next_mark`."""
        self._at -= 1

    def decode(self, decoder: json.JSONDecoder) -> Any:
        """Return the next JSON value."""
        self._skip_blanks()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                # A number may continue after the end of the window, so a value must be followed by a mark.
                if self._text[end : end + 1] in _AFTER_VALUE or not self._more():
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _LONGEST_ELEMENT or not self._more():
                    raise ValueError(f"{self._path} is not valid JSON: {error.msg}") from None


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8")
