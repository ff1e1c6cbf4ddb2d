"""The file editor tool: view, create, replace, insert, undo."""

from __future__ import annotations

import json
import re
import shlex

from empg_envs.swe.sandbox import FileError, Sandbox

COMMANDS = ("view", "create", "str_replace", "insert", "undo_edit")
SNIPPET = 4  # number of lines shown on either side of a change
MAX_UNDO = 20


class EditorError(ValueError):
    """A call that the editor refuses. The agent reads the message."""


class FileEditor:
    """An editor of one sandbox's files, with a history for ``undo_edit``.

    A file whose lines end with CRLF is shown and edited as if they ended with LF, and keeps its CRLF.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        """Start with an empty history."""
        self._sandbox = sandbox
        self._past: dict[str, list[str]] = {}

    def run(self, arguments: dict[str, str]) -> str:
        """Carry out one call.

        Raises:
          EditorError: the arguments are wrong, or a file cannot be read or written.
        """
        command, path = arguments.get("command", ""), arguments.get("path", "").strip()
        if command not in COMMANDS:
            raise EditorError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        if not path:
            raise EditorError("the parameter 'path' is missing")
        try:
            match command:
                case "view":
                    return self._view(path, arguments.get("view_range"))
                case "create":
                    return self._create(path, _needed(arguments, "file_text"))
                case "str_replace":
                    return self._replace(path, _needed(arguments, "old_str"), arguments.get("new_str", ""))
                case "insert":
                    return self._insert(
                        path, _needed(arguments, "insert_line"), _needed(arguments, "new_str")
                    )
            return self._undo(path)
        except FileError as error:
            raise EditorError(str(error)) from None

    def _view(self, path: str, view_range: str | None) -> str:
        try:
            text = self._show(path)
        except FileError as error:
            if not str(error).startswith("IsADirectoryError"):
                raise
            place = shlex.quote(path)
            found = self._sandbox.exec(f"find {place} -maxdepth 2 -not -path '*/.*' | sort", 30.0)
            return f"Files up to two levels below {path}:\n{found.output}"
        lines = text.split("\n")
        first, last = 1, len(lines)
        if view_range is not None:
            first, last = _range(view_range, len(lines))
        return f"{path}, lines {first} to {last} of {len(lines)}:\n{_numbered(lines, first, last)}"

    def _create(self, path: str, text: str) -> str:
        try:
            self._sandbox.read(path)
        except FileError as error:
            if not str(error).startswith("FileNotFoundError"):
                raise
        else:
            raise EditorError(f"{path} already exists; use str_replace or insert to change it")
        self._write(path, text)
        return f"{path} was created."

    def _replace(self, path: str, old: str, new: str) -> str:
        before = self._read(path)
        text, old, new = (_with_lf(each, before) for each in (before, old, new))
        count = text.count(old) if old else 0
        if count != 1:
            lines = [str(number) for number, line in enumerate(text.split("\n"), 1) if old and old in line]
            where = f" (lines {', '.join(lines[:20])})" if lines else ""
            raise EditorError(f"old_str must occur exactly once in {path}; it occurs {count} times{where}")
        self._edit(path, before, text.replace(old, new))
        first = text[: text.index(old)].count("\n") + 1
        return self._changed(path, first, first + new.count("\n"))

    def _insert(self, path: str, line: str, new: str) -> str:
        before = self._read(path)
        lines = _with_lf(before, before).split("\n")
        if not re.fullmatch("[0-9]{1,9}", line.strip()) or int(line) > len(lines):
            raise EditorError(
                f"insert_line must be a number from 0 to {len(lines)}, not {line.strip()[:100]!r}"
            )
        place, added = int(line), _with_lf(new, before).split("\n")
        self._edit(path, before, "\n".join([*lines[:place], *added, *lines[place:]]))
        return self._changed(path, place + 1, place + len(added))

    def _undo(self, path: str) -> str:
        if not self._past.get(path):
            raise EditorError(f"there is no edit of {path} to undo")
        self._write(path, self._past[path].pop())
        return f"The last edit of {path} was undone."

    def _changed(self, path: str, first: int, last: int) -> str:
        lines = self._show(path).split("\n")
        first, last = max(1, first - SNIPPET), min(len(lines), last + SNIPPET)
        return f"{path} was changed; lines {first} to {last} are now:\n{_numbered(lines, first, last)}"

    def _show(self, path: str) -> str:
        text = self._read(path)
        return _with_lf(text, text)

    def _read(self, path: str) -> str:
        return self._sandbox.read(path).decode("utf-8", "surrogateescape")

    def _write(self, path: str, text: str) -> None:
        self._sandbox.write(path, text.encode("utf-8", "surrogateescape"))

    def _edit(self, path: str, before: str, text: str) -> None:
        self._past.setdefault(path, []).append(before)
        del self._past[path][:-MAX_UNDO]
        if _has_crlf(before):
            text = text.replace("\n", "\r\n")
        self._write(path, text)


def _has_crlf(text: str) -> bool:
    """Return whether every line ends with CRLF."""
    return text.count("\n") == text.count("\r\n") > 0


def _with_lf(text: str, file: str) -> str:
    """Return a text with LF in place of CRLF, if it is of or for a file whose lines end with CRLF."""
    return text.replace("\r\n", "\n") if _has_crlf(file) else text


def _needed(arguments: dict[str, str], name: str) -> str:
    if name not in arguments:
        raise EditorError(f"the parameter {name!r} is missing")
    return arguments[name]


def _range(text: str, count: int) -> tuple[int, int]:
    try:
        first, last = json.loads(text)
        first, last = int(first), count if last == -1 else int(last)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise EditorError(f"view_range must be like [10, 20], not {text[:100]!r}") from None
    if not 1 <= first <= last:
        raise EditorError(f"view_range {text} is empty or begins before line 1")
    return min(first, count), min(last, count)


def _numbered(lines: list[str], first: int, last: int) -> str:
    return "\n".join(f"{number:6}\t{lines[number - 1]}" for number in range(first, last + 1))
