"""The installation after a patch, as the official harness does it, for what a test run needs of it.

An editable installation reads Python sources where they are. So only a patch that changes what is compiled,
or what says how, has to be installed. That runs the patch's code, which must not come near the tests before
they are read-only: it happens in a container of its own, of which nothing but compiled modules is taken.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterable
from pathlib import PurePosixPath

from empg_envs.swe.containers import FILE_SECONDS, DockerSandbox
from empg_envs.swe.grading import protected
from empg_envs.swe.sandbox import FileError
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import LINK, Tree

# Without a network there is nothing to isolate the build with: the image has what it needs.
COMMAND = "python -m pip install --no-deps --no-build-isolation -e ."
# Names of files that a build reads.
SOURCES = frozenset(
    (
        *(
            ".c",
            ".cc",
            ".cpp",
            ".cxx",
            ".h",
            ".hh",
            ".hpp",
            ".pyx",
            ".pxd",
            ".pxi",
            ".f",
            ".f90",
            ".f77",
            ".pyf",
        ),
        *(".in", ".tp", ".src", ".build", ".rs"),
    )
)
SCRIPTS = frozenset(("setup.py", "setup.cfg", "pyproject.toml", "CMakeLists.txt", "Cargo.toml"))
COMPILED = (".so", ".pyd")
MOST_BYTES = 256 << 20
MARK = "/tmp/empg-jax-before"


def is_needed(changed: Iterable[str]) -> bool:
    """Whether a build reads one of the changed files."""
    return any(path.suffix in SOURCES or path.name in SCRIPTS for path in map(PurePosixPath, changed))


def build(task: Task, sandbox: DockerSandbox, seconds: float) -> tuple[Tree, str]:
    """Install a patched task in a copy of its container.

    A command that fails leaves the modules as they were, as in the official harness: the tests will tell.

    Args:
      task: the task; its row may name another command (``install_cmd``).
      sandbox: the container with the patch.
      seconds: time limit.

    Returns:
      The compiled modules that are new, and the end of the command's output.
    """
    command = str(task.row.get("install_cmd") or COMMAND)
    names = " -o ".join(f"-name {shlex.quote('*' + suffix)}" for suffix in COMPILED)
    find = f"find . -path ./.git -prune -o -type f -newer {MARK} \\( {names} \\) -print"
    # Everything in /testbed can be written, but nothing else: not the interpreter and its packages.
    with contextlib.closing(sandbox.frozen((".",))) as copy:
        copy.reset({})
        said = copy.exec(f"touch -d '1 second ago' {MARK}; {command}", seconds)
        found = copy.exec(find, min(seconds, FILE_SECONDS))
        paths = [path for path in found.output.splitlines() if path.endswith(COMPILED)]
        if said.reason != "exit" or found.returncode or not paths:
            return {}, said.output
        try:
            tree = copy.take(("--", *paths), MOST_BYTES)
        except FileError as error:
            return {}, f"{said.output}\n{error}"
    # What ran there may have put anything into the archive.
    kept = {
        path: file
        for path, file in tree.items()
        if path.endswith(COMPILED) and file.mode != LINK and not protected(path, task)
    }
    return kept, said.output
