"""A repository's files as a value, with readers for untrusted folders and archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

LINK, PLAIN, EXECUTABLE = 0o120000, 0o100644, 0o100755
IGNORED = frozenset(
    (".git", "__pycache__", ".pytest_cache", ".hypothesis", ".mypy_cache", ".tox", ".ruff_cache")
)
TEST_FOLDERS = frozenset(("test", "tests"))
MAX_BYTES = 48 << 20
MAX_FILES = 10_000


class File(NamedTuple):
    """One file; the data of a symbolic link (mode `LINK`) is its target."""

    data: bytes
    mode: int = PLAIN


Tree = dict[str, File]  # relative POSIX path → file, sorted by path


class ArchiveError(ValueError):
    """An archive or folder with contents that must not be unpacked."""


def content_hash(tree: Tree) -> str:
    """Return the SHA-256 over paths, modes and contents."""
    digest = hashlib.sha256()
    for path in sorted(tree):
        data, mode = tree[path]
        digest.update(f"{path}\0{mode:o}\0{len(data)}\0".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def read_folder(folder: str | Path) -> Tree:
    """Read the files below a folder, without version control and caches.

    Raises:
      FileNotFoundError: the folder does not exist.
      ArchiveError: a link leaves the folder, or the folder is too large.
    """
    base = Path(folder)
    if not base.is_dir():
        raise FileNotFoundError(f"no folder {str(base)!r}")
    return _collect(_folder_members(base), str(base))


def read_archive(source: str | Path | bytes, name: str = "", *, has_top: bool = True) -> Tree:
    """Read the files of a ``.tar.*`` or ``.zip`` archive; ``has_top`` removes their common top folder.

    Every path must be inside of the archive: absolute paths, ``..``, devices and links that leave the tree
    are refused. An archive with more than `MAX_BYTES` bytes or `MAX_FILES` files is refused, too.

    Raises:
      ArchiveError: the archive is refused; the message names the archive and the member.
    """
    label = name or (str(source) if not isinstance(source, bytes) else "archive")
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    stream = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(stream):
            with zipfile.ZipFile(stream) as archive:
                tree = _collect(_zip_members(archive), label)
        else:
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:*") as archive:
                tree = _collect(_tar_members(archive), label)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ArchiveError(f"{label}: not a readable tar or zip archive ({error})") from error
    return _without_top(tree) if has_top else tree


def pack(tree: Tree) -> bytes:
    """Pack a tree as ``.tar.gz``; equal trees give equal bytes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, (data, mode) in sorted(tree.items()):
            member = tarfile.TarInfo(f"tree/{path}")
            if mode == LINK:
                member.type, member.linkname = tarfile.SYMTYPE, data.decode("utf-8", "surrogateescape")
                archive.addfile(member)
            else:
                member.size, member.mode = len(data), mode & 0o777
                archive.addfile(member, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), mtime=0)


def check_path(path: str) -> str:
    """Check and return a plain relative path.

    Raises:
      ArchiveError: the path is absolute, contains ``..`` or a control character, or is not text.
    """
    parts = PurePosixPath(path).parts
    bad = path.startswith("/") or "\\" in path or ".." in parts or not parts
    if bad or any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in path):
        raise ArchiveError(f"path {path!r} is not a plain relative path")
    return str(PurePosixPath(path))


def is_test(path: str) -> bool:
    """Return whether a file belongs to the tests by its name or folder."""
    *folders, name = PurePosixPath(path).parts
    if not TEST_FOLDERS.isdisjoint(map(str.lower, folders)) or name in ("test.py", "tests.py"):
        return True
    return name.endswith(".py") and (name.startswith("test_") or name.endswith("_test.py"))


def _collect(members: Iterable[tuple[str, File]], label: str) -> Tree:
    tree: Tree = {}
    total = 0
    for path, file in members:
        try:
            path = check_path(path)
        except ArchiveError as error:
            raise ArchiveError(f"{label}: {error}") from None
        total += len(file.data)
        if total > MAX_BYTES or len(tree) >= MAX_FILES:
            raise ArchiveError(f"{label}: more than {MAX_BYTES >> 20} MiB or {MAX_FILES} files")
        if file.mode == LINK:
            _check_link(path, file.data, label)
        tree[path] = file
    links = {path for path, file in tree.items() if file.mode == LINK}
    for path in tree:
        through = next((str(parent) for parent in PurePosixPath(path).parents if str(parent) in links), None)
        if through is not None:
            raise ArchiveError(f"{label}: {path!r} would be written through the link {through!r}")
    return dict(sorted(tree.items()))


def _check_link(path: str, target: bytes, label: str) -> None:
    depth = len(PurePosixPath(path).parts) - 1
    text = target.decode("utf-8", "surrogateescape")
    lowest = depth
    for part in PurePosixPath(text).parts:
        depth += -1 if part == ".." else 1
        lowest = min(lowest, depth)
    if text.startswith("/") or lowest < 0:
        raise ArchiveError(f"{label}: link {path!r} leaves the tree")


def _folder_members(base: Path) -> Iterator[tuple[str, File]]:
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if IGNORED & set(relative.parts) or path.suffix == ".pyc":
            continue
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            yield relative.as_posix(), File(str(path.readlink()).encode(), LINK)
        elif stat.S_ISREG(mode):
            yield relative.as_posix(), File(path.read_bytes(), EXECUTABLE if mode & 0o100 else PLAIN)


def _tar_members(archive: tarfile.TarFile) -> Iterator[tuple[str, File]]:
    total = 0
    for member in archive:
        if member.isdir():
            continue
        if member.issym():
            yield member.name, File(member.linkname.encode("utf-8", "surrogateescape"), LINK)
            continue
        if not member.isreg():
            raise ArchiveError(f"{member.name!r} is a device or hard link")
        total += member.size
        if total > MAX_BYTES:  # checked before unpacking
            raise ArchiveError(f"archive holds more than {MAX_BYTES >> 20} MiB")
        stream = archive.extractfile(member)
        assert stream is not None
        yield member.name, File(stream.read(), EXECUTABLE if member.mode & 0o100 else PLAIN)


def _zip_members(archive: zipfile.ZipFile) -> Iterator[tuple[str, File]]:
    if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
        raise ArchiveError(f"archive holds more than {MAX_BYTES >> 20} MiB")
    for info in archive.infolist():
        if info.is_dir():
            continue
        mode = info.external_attr >> 16
        with archive.open(info) as stream:
            data = stream.read(MAX_BYTES + 1)  # the size in the header may be wrong
        if stat.S_ISLNK(mode):
            yield info.filename, File(data, LINK)
        else:
            yield info.filename, File(data, EXECUTABLE if mode & 0o100 else PLAIN)


def _without_top(tree: Tree) -> Tree:
    tops = {path.partition("/")[0] for path in tree}
    if len(tops) != 1 or any("/" not in path for path in tree):
        return tree
    return {path.partition("/")[2]: file for path, file in tree.items()}
