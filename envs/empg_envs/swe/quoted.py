"""Names in git's patches, in quotes or without."""

from __future__ import annotations

import re

from empg_envs.swe.tree import check_path

_QUOTED = re.compile(r'"((?:[^"\\]|\\(?:[abtnvfr"\\]|[0-3][0-7]{2}))*)"')
_ESCAPE = re.compile(rb'\\([abtnvfr"\\]|[0-7]{3})')
_PLAIN = dict(zip(b'abtnvfr"\\', b'\a\b\t\n\v\f\r"\\', strict=True))


def read_name(text: str, *, has_prefix: bool = True) -> str | None:
    """Return the path that a line of a patch names, or None for ``/dev/null``.

    Raises:
      ValueError: the path is not accepted.
    """
    text = unquote(text.partition("\t")[0].rstrip("\r"))
    if text == "/dev/null":
        return None
    _, slash, path = text.partition("/")
    path = path if slash and has_prefix else text
    if '"' in path or path != path.strip():  # programs do not agree about where such a name ends
        raise ValueError(f"path {path!r} is not accepted")
    return check_path(path)


def can_be_named(path: str) -> bool:
    """Return whether a patch can name a path so that `read_name` reads it."""
    try:
        return read_name(f"a/{path}") == path
    except ValueError:
        return False


def unquote(text: str) -> str:
    """Return the name that git writes in quotes, with escapes for what is not ASCII; other texts stay.

    Raises:
      ValueError: what stands in the quotes cannot be decoded.
    """
    if not text.startswith('"'):
        return text
    match = _QUOTED.fullmatch(text)
    try:
        if match is not None:
            return _ESCAPE.sub(_plain, match[1].encode()).decode()
    except UnicodeError:
        pass
    raise ValueError(f"the quoted name {text[:100]!r} cannot be decoded")


def _plain(match: re.Match[bytes]) -> bytes:
    code = match[1]
    return bytes([_PLAIN[code[0]] if len(code) == 1 else int(code, 8)])
