"""Paths and addresses as a person writes them."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from empg_jax.errors import ConfigError


def expand(path: str | Path, key: str | None = None) -> Path:
    """Replace a leading ``~`` or ``~user`` by the home folder.

    Args:
      path: the path.
      key: the configuration's key that holds it, for the message.

    Raises:
      ConfigError: this machine knows no such home folder.
    """
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        place = path if key is None else f"{key}={path}"
        raise ConfigError(
            f"{place}: no home folder is known for {path.parts[0]}: write the whole path"
        ) from None


def split_address(url: str) -> urllib.parse.SplitResult:
    """Split ``http://HOST:PORT/PATH``.

    Raises:
      ValueError: it is no address of a server; the message begins with it.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https"):
            raise ValueError("it begins with neither http:// nor https://")
        if not parts.hostname or " " in url or not url.isprintable():
            raise ValueError("its host is missing or malformed")
        if parts.port == 0:  # larger ones than 65535 are refused when the port is read
            raise ValueError("no port is 0")
        parts.hostname.encode("idna")  # as every connection does; a part that is empty or too long is refused
    except ValueError as error:
        raise ValueError(
            f"{url} is no address ({error}): expected something like http://127.0.0.1:8000"
        ) from None
    return parts
