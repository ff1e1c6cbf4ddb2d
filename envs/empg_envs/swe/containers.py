"""Sandboxes in container images, by the command line of docker or podman."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence

from empg_envs.swe.guest.commands import Capture
from empg_envs.swe.owners import FROZEN, LABEL, owner, remove_frozen, remove_orphans
from empg_envs.swe.sandbox import ExecResult, FileError, Limits, LostSandboxError, SandboxError
from empg_envs.swe.tree import ArchiveError, Tree, read_archive

ROOT = "/testbed"
KEEP_BYTES = 8 << 20
READ_BYTES = 1 << 20
FILE_SECONDS = 60.0
MAX_COMMAND_BYTES = 120_000  # Linux takes 128 KiB in one argument
MAX_PATH_BYTES = 4096
MARGIN_SECONDS = 10.0  # added to a command's own deadline, which the container enforces
START_SECONDS = 600.0  # long enough to pull an image
# Where programs may write although the container's files cannot be changed. Programs keep files in HOME, too.
SCRATCH = ("/tmp", "/var/tmp", "/run")
# Process 1 of a container: it reaps orphaned children, and `kill -9 -1` from inside does not kill it.
INIT = "while :; do sleep 3600 & wait $!; done"
# The Python environments in the images of SWE-bench and of R2E-Gym.
PRELUDE = (
    "if [ -f /opt/miniconda3/bin/activate ]; then . /opt/miniconda3/bin/activate testbed; fi; "
    "if [ -d /testbed/.venv/bin ]; then PATH=/testbed/.venv/bin:$PATH; fi; "
)
_RESOLVE = (
    'p=$(realpath -m -- "$1"); case "$p" in /testbed|/testbed/*|/tmp|/tmp/*) ;; *) exit 93;; esac; '
    '[ -d "$p" ] && exit 95; '
)
READ = _RESOLVE + '[ -e "$p" ] || exit 94; [ -f "$p" ] || exit 96; head -c "$2" -- "$p"'
WRITE = _RESOLVE + 'mkdir -p -- "$(dirname -- "$p")" && cat > "$p"'
APPEND = _RESOLVE + 'cat >> "$p"'
REFUSED = {
    93: "ValueError: {path} lies outside of /testbed and /tmp",
    94: "FileNotFoundError: no such file: {path}",
    95: "IsADirectoryError: {path} is a folder",
    96: "ValueError: {path} is not a regular file",
}


class LateError(SandboxError):
    """A timeout of the docker program: of itself it says nothing about whose fault that is."""


class DockerSandbox:
    """A container of one image, without network and capabilities and with limits; `close` removes it.

    A label of the container names its owner process. The containers of ended processes of this machine are
    removed when the next container is started.
    """

    root = ROOT

    def __init__(
        self,
        image: str,
        limits: Limits,
        docker: str = "docker",
        *,
        network: str = "none",
        is_swept: bool = True,
    ) -> None:
        """Store the settings; `reset` starts the container.

        Args:
          image: name of the image.
          limits: limits of the container.
          docker: the docker program; podman has the same command line.
          network: name of the engine's network.
          is_swept: whether each command is followed by the end of all that it left running. A judge's
            containers, which run trusted commands or a single other one, can do without.
        """
        self._is_swept = is_swept
        self._image, self._limits, self._docker, self._network = image, limits, docker, network
        self._name: str | None = None
        self._writable: Sequence[str] | None = None  # None: everything

    def frozen(self, writable: Sequence[str] = ()) -> DockerSandbox:
        """Return a sandbox with the files of this one as they are now, which no command can change.

        It is not started yet. Its `close` removes the image that is made for it.

        Args:
          writable: folders below /testbed that commands may change nevertheless.

        Raises:
          SandboxError: the image cannot be made.
        """
        remove_frozen(self._docker)
        image = f"{FROZEN}:{owner()}-{uuid.uuid4().hex[:12]}"
        code, capture = self._call(["commit", self._running(), image], START_SECONDS)
        if code:
            said = capture.parts()[0].decode("utf-8", "replace").strip()
            raise SandboxError(f"{self._docker} cannot make an image of a container: {said[-500:]}")
        found = DockerSandbox(
            image, self._limits, self._docker, network=self._network, is_swept=self._is_swept
        )
        found._writable = writable
        return found

    def exec(
        self,
        command: str,
        timeout: float,
        *,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> ExecResult:
        """Run a command in the image's environment; see `empg_envs.swe.sandbox.Sandbox`."""
        given = {**({} if self._writable is None else {"HOME": SCRATCH[0]}), **(env or {})}
        variables = [part for key, value in given.items() for part in ("--env", f"{key}={value}")]
        argv = ["exec", "--interactive", "--workdir", ROOT, *variables, self._running()]
        seconds = ["timeout", "--signal=KILL", f"{timeout:g}"]
        started = time.monotonic()
        script = PRELUDE + command.replace("\0", "")
        if len(script.encode("utf-8", "surrogateescape")) > MAX_COMMAND_BYTES:
            return ExecResult(f"a command has at most {MAX_COMMAND_BYTES} bytes", 126)
        try:
            code, capture = self._call(
                [*argv, *seconds, "bash", "-c", script], timeout + MARGIN_SECONDS, stdin
            )
            late = code == 137 and time.monotonic() - started >= timeout
        except LateError:  # a process outside of the command's process group keeps its output open
            code, capture, late = -9, Capture(0), True
        if code:
            self.check()
        if self._is_swept:  # process 1 survives
            self._call_inside(["exec", self._running(), "bash", "-c", "kill -9 -1"])
        head, tail, omitted = capture.parts()
        middle = f"\n[{omitted} bytes left out]\n".encode() if omitted else b""
        output = (head + middle + tail).decode("utf-8", "replace")
        return ExecResult(output, -9 if late else code, "timeout" if late else "exit", omitted)

    def check(self) -> None:
        """Check that the container runs. Else a failed command says nothing about what it was to do.

        Raises:
          LostSandboxError: the container is gone or stuck, which a command in it may have brought about.
          SandboxError: the engine does not answer.
        """
        running = ["inspect", "--type", "container", "--format", "{{.State.Running}}", self._running()]
        code, capture = self._call_inside(running)
        if code == 0 and b"true" in capture.parts()[0].split():  # beside what the engine warns of
            return
        self._check_engine()
        raise LostSandboxError(f"the container {self._name} is gone")

    def _check_engine(self) -> None:
        try:
            code, capture = self._call(["version"], FILE_SECONDS)
            said = capture.parts()[0].decode("utf-8", "replace").strip()
        except LateError as error:
            code, said = 1, str(error)
        if code:
            raise SandboxError(f"{self._docker} does not answer: {said[-500:]}")

    def read(self, path: str) -> bytes:
        """Return a file's bytes; see `empg_envs.swe.sandbox.Sandbox`."""
        code, capture = self._script(READ, path, str(READ_BYTES + 1))
        self._check(code, path)
        data = capture.parts()[0]
        if len(data) > READ_BYTES:
            raise FileError(f"ValueError: {path} holds more than {READ_BYTES} bytes")
        return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file; see `empg_envs.swe.sandbox.Sandbox`."""
        self._check(self._script(WRITE, path, stdin=data)[0], path)

    def snapshot(self) -> Tree:
        """Return the files of the task's folder, without version control."""
        return self.take(("--exclude=.git", "."), KEEP_BYTES)

    def take(self, arguments: Sequence[str], most: int) -> Tree:
        """Return files of the task's folder.

        Args:
          arguments: arguments of ``tar``, relative to /testbed.
          most: kept bytes of its output.

        Raises:
          FileError: the files are too many, or are no files of the folder.
        """
        argv = ["exec", self._running(), "tar", "-C", ROOT, "-cf", "-", *arguments]
        code, capture = self._call_inside(argv, most=most)
        head, tail, omitted = capture.parts()
        if code:
            self.check()
        if code or omitted:
            raise FileError(f"the files of {ROOT} are too many")
        try:
            return read_archive(head + tail, ROOT, has_top=False)
        except ArchiveError as error:
            raise FileError(str(error)) from None

    def reset(self, tree: Tree) -> None:
        """Start a new container of the image, with these files added to its own."""
        if self._name is not None:
            self.close()
        remove_orphans(self._docker)
        limits, name = self._limits, f"empg-jax-{uuid.uuid4().hex[:12]}"
        argv = ["run", "--detach", "--rm", "--name", name, "--label", f"{LABEL}={owner()}"]
        self._name = name  # `close` removes what a start leaves that fails half way
        argv += ["--network", self._network, "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        argv += ["--stop-signal", "KILL"]  # podman's `rm --force` waits for process 1, which ignores TERM
        argv += ["--memory", f"{limits.memory_mb}m", "--memory-swap", f"{limits.memory_mb}m"]
        argv += ["--pids-limit", str(limits.processes), "--cpus", f"{limits.cpus:g}", "--workdir", ROOT]
        if self._writable is not None:
            argv += ["--read-only"]
            for folder in SCRATCH:
                argv += ["--tmpfs", f"{folder}:rw,exec,mode=1777,size={limits.memory_mb}m"]
            for folder in self._writable:  # a volume without a name begins with what the image has there
                argv += ["--volume", f"{ROOT}/{folder}"]
        code, capture = self._call(
            [*argv, "--entrypoint", "bash", self._image, "-c", INIT], START_SECONDS, name=name
        )
        if code:
            said = capture.parts()[0].decode("utf-8", "replace").strip()
            raise SandboxError(f"{self._docker} cannot start a container of {self._image}: {said[:500]}")
        for path, (data, _) in tree.items():
            self.write(path, data)

    def close(self) -> None:
        """Remove the container, and its image if it was made for it alone."""
        name, self._name = self._name, None
        if name is not None:
            self._call(["rm", "--force", "--volumes", name], FILE_SECONDS)
        if self._writable is not None:
            self._call(["rmi", "--force", self._image], FILE_SECONDS)

    def _running(self) -> str:
        if self._name is None:
            raise SandboxError("the container is closed: reset it first")
        return self._name

    def _script(self, script: str, path: str, *more: str, stdin: bytes = b"") -> tuple[int, Capture]:
        check_name(path)
        argv = ["exec", "--interactive", "--workdir", ROOT, self._running()]
        return self._call_inside([*argv, "bash", "-c", script, "bash", path, *more], stdin)

    def _check(self, code: int, path: str) -> None:
        if code and code not in REFUSED:
            self.check()
        if code:
            raise FileError(REFUSED.get(code, f"OSError: {path}: exit code {code}").format(path=path))

    def _call_inside(
        self, arguments: list[str], stdin: bytes = b"", *, most: int = KEEP_BYTES
    ) -> tuple[int, Capture]:
        """Run the docker program for something short that concerns the running container.

        Raises:
          LostSandboxError: this takes too long although the engine answers: a command may have brought
            the container to that.
          SandboxError: the engine does not answer.
        """
        try:
            return self._call(arguments, FILE_SECONDS, stdin, most=most)
        except LateError as error:
            self._check_engine()
            raise LostSandboxError(str(error)) from error

    def _call(
        self,
        arguments: list[str],
        seconds: float,
        stdin: bytes = b"",
        *,
        name: str = "",
        most: int = KEEP_BYTES,
    ) -> tuple[int, Capture]:
        """Run the docker program.

        Raises:
          SandboxError: the program is not installed.
          LateError: it does not end in time.
        """
        capture = Capture(most)
        with tempfile.TemporaryFile() as given:
            given.write(stdin)
            given.seek(0)
            try:
                process = subprocess.Popen(
                    [self._docker, *arguments],
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise SandboxError(
                    f"cannot run {self._docker!r}: {error.strerror}; install Docker or Podman"
                ) from error
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        with process, contextlib.closing(process.stdout) as stream:
            while True:
                ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
                data = os.read(stream.fileno(), 1 << 16) if ready else None
                if data is None:
                    process.kill()
                    raise LateError(
                        f"'{self._docker} {arguments[0]}' took longer than {seconds:g} seconds {name}"
                    )
                if not data:
                    return process.wait(), capture
                capture.add(data)


def check_name(path: str) -> None:
    """Raise FileError for a path that no program can be given."""
    if "\0" in path or len(path.encode("utf-8", "surrogatepass")) >= MAX_PATH_BYTES:
        raise FileError(f"ValueError: {path[:100]!r} is no path: it is too long, or holds a zero byte")


def pull(image: str, docker: str = "docker") -> bool:
    """Pull an image unless it is here; return whether that was necessary.

    Raises:
      SandboxError: the engine cannot get the image.
    """
    try:
        if subprocess.run([docker, "image", "inspect", image], capture_output=True).returncode == 0:
            return False
        found = subprocess.run([docker, "pull", "--quiet", image], capture_output=True, text=True)
    except OSError as error:
        raise SandboxError(f"cannot run {docker!r}: {error.strerror}; install Docker or Podman") from error
    if found.returncode:
        raise SandboxError(f"{docker} cannot pull {image}: {found.stderr.strip()[-500:]}")
    return True


def discard(image: str, docker: str = "docker") -> bool:
    """Remove an image; return whether it was here and unused."""
    return subprocess.run([docker, "rmi", image], capture_output=True).returncode == 0
