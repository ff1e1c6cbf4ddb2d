"""The bubblewrap command line of a sandbox, which shows a read-only base and nothing else of the machine."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from empg_envs.swe.sandbox import INSTALL, SandboxError

ROOT, SCRATCH = "/testbed", "/tmp"
HERE = Path(__file__).resolve().parent
GUEST = HERE / "guest"  # the program inside the sandbox
GUEST_HOME = "/run"  # the root of the guest's package inside the sandbox
ETC = HERE / "etc"  # accounts and hosts of the sandbox, instead of the machine's own
NAMES = "/run/bin"  # provides `python` if the interpreter's own folder has only `python3`
SHM_BYTES = 16 << 20
# The only files of the machine's /etc: programs need them to find their libraries and alternatives.
ETC_OF_HOST = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python interpreter for tasks, with the folders that it needs.

    Attributes:
      executable: path of ``python`` inside the sandbox.
      base: the interpreter without its virtual environment; it runs the guest.
      prefixes: folders outside of /usr that are mounted read-only.
    """

    executable: str
    base: str
    prefixes: tuple[str, ...]

    def environment(self, root: str, scratch: str) -> dict[str, str]:
        """Return the environment variables of every command."""
        folders = [os.path.dirname(self.executable), os.path.dirname(self.base)]
        return {
            "PATH": ":".join([*folders, "/usr/local/bin", "/usr/bin", "/bin", NAMES]),
            "HOME": scratch,
            "TMPDIR": scratch,
            "LANG": "C.UTF-8",
            "PYTHONPATH": f"{root}/src:{root}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "PAGER": "cat",
            "TERM": "dumb",
        }


@functools.cache
def find_interpreter(python: str | None = None) -> Interpreter:
    """Inspect an interpreter; None is the current one.

    Raises:
      SandboxError: the interpreter does not run, or its folder is too general to be shown (such as ``/``).
    """
    if python is None:
        executable, base = sys.executable, getattr(sys, "_base_executable", sys.executable)
        prefixes = [sys.prefix, sys.base_prefix]
    else:
        executable = os.path.abspath(python)
        script = "import sys; print(sys._base_executable, sys.prefix, sys.base_prefix, sep='\\n')"
        try:
            found = subprocess.run(
                [executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise SandboxError(f"the tasks' interpreter {python!r} does not run: {error}") from error
        base, *prefixes = found.stdout.splitlines()
    shown = []
    for prefix in dict.fromkeys(map(os.path.realpath, prefixes)):
        if prefix == "/usr" or prefix.startswith("/usr/"):
            continue
        if prefix == "/" or Path.home().is_relative_to(prefix):
            raise SandboxError(f"the interpreter's folder {prefix!r} is too much to show to an agent")
        shown.append(prefix)
    # The executable of a virtual environment is a link to the base interpreter's file.
    return Interpreter(_under(executable, prefixes), os.path.realpath(base), tuple(shown))


def command_line(
    interpreter: Interpreter, size: int, *, seccomp: int, shown: Path | None = None
) -> list[str]:
    """Return the bubblewrap command line without the program to run.

    Args:
      interpreter: the Python to show.
      size: bytes of the task's folder, and also of /tmp.
      seccomp: descriptor from which bubblewrap reads the system-call filter.
      shown: folder of the machine that the task's folder shows read-only; None: an empty one in memory.
    """
    argv = [
        *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent"),
        *("--new-session", "--as-pid-1", "--clearenv", "--cap-drop", "ALL"),
        *("--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--seccomp", str(seccomp)),
        *("--ro-bind", "/usr", "/usr"),
    ]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            argv += ["--symlink", f"usr/{name}", f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            argv += ["--ro-bind", f"/{name}", f"/{name}"]
    for path in ETC_OF_HOST:
        argv += ["--ro-bind-try", path, path]
    for file in sorted(ETC.iterdir()):
        argv += ["--ro-bind", str(file), f"/etc/{file.name}"]
    argv += ["--proc", "/proc", "--dev", "/dev", "--size", str(SHM_BYTES), "--tmpfs", "/dev/shm"]
    # Mount /tmp before the binds below it, because the interpreter may be in the machine's /tmp.
    argv += ["--size", str(size), "--tmpfs", SCRATCH]
    argv += ["--size", str(size), "--tmpfs", ROOT] if shown is None else ["--ro-bind", str(shown), ROOT]
    for prefix in interpreter.prefixes:
        argv += ["--ro-bind", prefix, prefix]
        if HERE.is_relative_to(
            prefix
        ):  # hide this package, because it contains the solutions of the embedded tasks
            argv += ["--size", "4096", "--tmpfs", str(HERE), "--remount-ro", str(HERE)]
    argv += ["--ro-bind", str(GUEST), f"{GUEST_HOME}/empg_envs/swe/guest"]
    argv += ["--symlink", interpreter.executable, f"{NAMES}/python"]
    # Read-only /proc: if root starts the sandbox, the kernel would accept writes of its commands to the
    # machine's settings there. Read-only /dev and /: they are in memory without a size limit.
    for path in ("/proc", "/dev", "/"):
        argv += ["--remount-ro", path]
    return [*argv, "--chdir", ROOT, "--"]


@functools.cache
def probe() -> None:
    """Run one empty sandbox as a test.

    Raises:
      SandboxError: bubblewrap is missing or cannot create namespaces here. The message tells how to install
        it.
    """
    if shutil.which("bwrap") is None:
        raise SandboxError(INSTALL)
    trial = ["bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--ro-bind", "/", "/", "true"]
    found = subprocess.run(trial, capture_output=True, text=True, timeout=60)
    if found.returncode:
        raise SandboxError(f"bubblewrap cannot run here ({found.stderr.strip()[:300]}); {INSTALL}")


def _under(executable: str, prefixes: list[str]) -> str:
    """Return the executable's path inside the sandbox."""
    real = os.path.realpath(prefixes[0])
    candidate = os.path.join(real, "bin", os.path.basename(executable))
    return candidate if os.path.exists(candidate) else executable
