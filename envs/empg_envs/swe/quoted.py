"""The quotes around names in git's patches."""

from __future__ import annotations

import re

_QUOTED = re.compile(r'"((?:[^"\\]|\\(?:[abtnvfr"\\]|[0-3][0-7]{2}))*)"')
_ESCAPE = re.compile(rb'\\([abtnvfr"\\]|[0-7]{3})')
_PLAIN = dict(zip(b'abtnvfr"\\', b'\a\b\t\n\v\f\r"\\', strict=True))


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
