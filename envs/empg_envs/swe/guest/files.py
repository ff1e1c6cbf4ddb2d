"""File operations inside a sandbox: unpack, read, write and collect."""

from __future__ import annotations

import io
import os
import stat

TYPE_CHECKING = False  # importing typing would take half of the start
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]  # limits and folders; see empg_envs.swe.caged

IGNORED = frozenset((b".git", b"__pycache__", b".pytest_cache", b".hypothesis", b".mypy_cache", b".tox"))
MAX_DEPTH = 64


def unpack(config: Config, files: list[tuple[str, int, bytes]]) -> list[bytes]:
    """Write files of a trusted tree: (relative path, mode, data); mode 0o120000 is a symbolic link."""
    root, made = config["root"], set()
    for path, mode, data in files:
        target = f"{root}/{path}"
        folder = os.path.dirname(target)
        if folder not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        if mode == 0o120000:
            os.symlink(data, target)
            continue
        number = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755 if mode & 0o100 else 0o644)
        with os.fdopen(number, "wb", buffering=0) as sink:
            _write_all(sink, data)
    return []


def _write_all(sink: io.RawIOBase, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[sink.write(view) :]


def snapshot(config: Config, most: int) -> list[bytes]:
    """Return all files below the root as path, mode, data, path, ….

    Links are not followed, and special files are left out.

    Raises:
      ValueError: the files have more than ``most`` bytes.
    """
    fields: list[bytes] = []
    _walk(os.fsencode(config["root"]), b"", 0, most, fields)
    return fields


def _walk(folder: bytes, prefix: bytes, depth: int, most: int, fields: list[bytes]) -> int:
    """Append the files of a folder to ``fields``; return how many bytes are left of ``most``."""
    os.chmod(folder, 0o700)  # a command may have removed its own permissions
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        name = prefix + entry.name
        mode = entry.stat(follow_symlinks=False).st_mode
        if entry.name in IGNORED or entry.name.endswith(b".pyc"):
            continue
        if stat.S_ISDIR(mode):
            if depth < MAX_DEPTH:
                most = _walk(entry.path, name + b"/", depth + 1, most, fields)
            continue
        if stat.S_ISLNK(mode):
            data, kind = os.readlink(entry.path), 0o120000
        elif stat.S_ISREG(mode):
            os.chmod(entry.path, stat.S_IMODE(mode) | 0o400)
            with open(entry.path, "rb") as source:
                data = source.read(most + 1)
            kind = 0o100755 if mode & 0o100 else 0o100644
        else:
            continue
        fields.extend((name, b"%o" % kind, data))
        most -= len(name) + len(data)
        if most < 0:
            raise ValueError("the files hold more bytes than the sandbox has room for")
    return most


def _inside(config: Config, path: str) -> str:
    """Return the real path, which must be in a folder with file access.

    Raises:
      ValueError: the path leads elsewhere, for example by a symbolic link or ``..``.
    """
    path = os.path.join(config["root"], path)
    real = os.path.realpath(path)
    if not any(real == folder or real.startswith(folder + "/") for folder in config["scratch"]):
        raise ValueError(f"{path} lies outside of {' and '.join(config['scratch'])}")
    return real


def read(config: Config, path: str, most: int) -> list[bytes]:
    """Return a regular file's bytes, at most ``most``."""
    real = _inside(config, path)
    number = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(number, "rb") as source:
        mode = os.fstat(number).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path} is not a regular file")
        data = source.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} holds more than {most} bytes")
    return [data]


def write(config: Config, path: str, data: bytes) -> list[bytes]:
    """Write a file atomically; missing folders are created."""
    real = _inside(config, path)
    if os.path.isdir(real):
        raise IsADirectoryError(f"{path} is a folder")
    os.makedirs(os.path.dirname(real), exist_ok=True)
    mode = stat.S_IMODE(os.stat(real).st_mode) if os.path.exists(real) else 0o644
    fresh = real + ".new"
    number = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(number, "wb", buffering=0) as sink:
            _write_all(sink, data)
        os.replace(fresh, real)
    except OSError:
        os.unlink(fresh)
        raise
    return []
