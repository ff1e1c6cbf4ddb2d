"""Folders of the machine whose files a cage shows read-only, and that do not outlive their owner for long."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path, PurePosixPath

from empg_envs.swe.sandbox import FileError, SandboxError
from empg_envs.swe.tree import LINK, Tree

# What goes wrong by the names of files.
UNFIT = (
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ELOOP,
)


def make_home(name: str) -> Path:
    """Return the folder of this user for a purpose, without the remains of ended processes.

    Raises:
      SandboxError: it is another user's.
    """
    home = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    home.mkdir(mode=0o700, exist_ok=True)
    if home.is_symlink() or home.stat().st_uid != os.getuid():
        raise SandboxError(f"{home} belongs to somebody else: remove it, or set TMPDIR")
    remove_orphans(home)
    return home


def make_folder(home: Path) -> Path:
    """Make a folder of this process in a home."""
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{numbering()}-", dir=home))


def remove_orphans(home: Path) -> None:
    """Remove the folders of processes that no longer exist.

    The processes of another container that shares the home have numbers of their own; they are let alone.
    """
    for folder in home.iterdir():
        owner, _, rest = folder.name.partition("-")
        is_ours = owner.isdigit() and rest.startswith(f"{numbering()}-")
        if is_ours and not Path(f"/proc/{owner}").exists():
            remove(folder)


def numbering() -> str:
    """Return a name of the namespace of process numbers."""
    return "".join(filter(str.isdigit, os.readlink("/proc/self/ns/pid")))


def remove(folder: Path) -> None:
    """Remove a folder, also one that cannot be listed."""
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def write_tree(folder: Path, tree: Tree) -> None:
    """Write files below a folder; equal contents share one file. Its names cannot be listed afterwards.

    Raises:
      FileError: a file would be written through a link, or a folder has a file's name.
      SandboxError: the machine does not take the files.
    """
    links = {path for path, file in tree.items() if file.mode == LINK}
    made: set[str] = set()
    written: dict[tuple[bytes, bool], str] = {}
    try:
        for path, (data, mode) in tree.items():
            if any(str(parent) in links for parent in PurePosixPath(path).parents):
                raise FileError(f"{path!r} would be written through a link")
            target = f"{folder}/{path}"
            parent = os.path.dirname(target)
            if parent not in made:
                os.makedirs(parent, exist_ok=True)
                made.add(parent)
            if path in links:
                continue
            kind = data, bool(mode & stat.S_IXUSR)
            if kind in written:
                os.link(written[kind], target)
                continue
            number = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o555 if kind[1] else 0o444)
            with os.fdopen(number, "wb") as sink:
                sink.write(data)
            written[kind] = target
        for path in links:  # last, so that nothing is written through them
            os.symlink(tree[path].data, f"{folder}/{path}")
    except OSError as error:
        if error.errno in UNFIT:
            raise FileError(f"the files do not fit together: {error}") from error
        raise SandboxError(f"the files cannot be written: {error}") from error
    folder.chmod(0o111)
