"""Sandboxes in container images, by the docker command line or by swe-rex."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import select
import shlex
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from empg_envs.swe.guest.commands import Capture
from empg_envs.swe.sandbox import ExecResult, FileError, Limits, LostSandboxError, SandboxError
from empg_envs.swe.tree import ArchiveError, Tree, read_archive

ROOT = "/testbed"
KEEP_BYTES = 8 << 20
READ_BYTES = 1 << 20
FILE_SECONDS = 60.0
MARGIN_SECONDS = 10.0  # added to a command's own deadline, which the container enforces
START_SECONDS = 600.0  # long enough to pull an image
OWNER = "empg-jax.owner"
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
_READ = _RESOLVE + '[ -e "$p" ] || exit 94; [ -f "$p" ] || exit 96; head -c "$2" -- "$p"'
_WRITE = _RESOLVE + 'mkdir -p -- "$(dirname -- "$p")" && cat > "$p"'
_REFUSED = {
    93: "ValueError: {path} lies outside of /testbed and /tmp",
    94: "FileNotFoundError: no such file: {path}",
    95: "IsADirectoryError: {path} is a folder",
    96: "ValueError: {path} is not a regular file",
}


class LateError(LostSandboxError):
    """A timeout of the docker program."""


class DockerSandbox:
    """A container of one image, without network and capabilities and with limits; `close` removes it.

    A label of the container names its owner process. The containers of ended processes are removed when the
    next container is started.
    """

    root = ROOT

    def __init__(self, image: str, limits: Limits, docker: str = "docker") -> None:
        """Store image, limits and the docker program; podman has the same command line."""
        self._image, self._limits, self._docker = image, limits, docker
        self._name: str | None = None

    def exec(
        self,
        command: str,
        timeout: float,
        *,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> ExecResult:
        """Run a command in the image's environment; see `empg_envs.swe.sandbox.Sandbox`."""
        variables = [part for key, value in (env or {}).items() for part in ("--env", f"{key}={value}")]
        argv = ["exec", "--interactive", "--workdir", ROOT, *variables, self._running()]
        seconds = ["timeout", "--signal=KILL", f"{timeout:g}"]
        started = time.monotonic()
        script = PRELUDE + command.replace("\0", "")
        try:
            code, capture = self._call(
                [*argv, *seconds, "bash", "-c", script], timeout + MARGIN_SECONDS, stdin
            )
            late = code == 137 and time.monotonic() - started >= timeout
        except LateError:  # a process outside of the command's process group keeps its output open
            code, capture, late = -9, Capture(0), True
        # Kill the processes that the command left; process 1 survives.
        self._call(["exec", self._running(), "bash", "-c", "kill -9 -1"], FILE_SECONDS)
        head, tail, omitted = capture.parts()
        middle = f"\n[{omitted} bytes left out]\n".encode() if omitted else b""
        output = (head + middle + tail).decode("utf-8", "replace")
        return ExecResult(output, -9 if late else code, "timeout" if late else "exit", omitted)

    def read(self, path: str) -> bytes:
        """Return a file's bytes; see `empg_envs.swe.sandbox.Sandbox`."""
        code, capture = self._script(_READ, path, str(READ_BYTES + 1))
        self._check(code, path)
        data = capture.parts()[0]
        if len(data) > READ_BYTES:
            raise FileError(f"ValueError: {path} holds more than {READ_BYTES} bytes")
        return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file; see `empg_envs.swe.sandbox.Sandbox`."""
        self._check(self._script(_WRITE, path, stdin=data)[0], path)

    def snapshot(self) -> Tree:
        """Return the files of the task's folder, without version control."""
        argv = ["exec", self._running(), "tar", "-C", ROOT, "--exclude=.git", "-cf", "-", "."]
        code, capture = self._call(argv, FILE_SECONDS)
        head, tail, omitted = capture.parts()
        if code or omitted:
            raise FileError(f"the files of {ROOT} are too many")
        try:
            return read_archive(head + tail, ROOT, has_top=False)
        except ArchiveError as error:
            raise FileError(str(error)) from None

    def reset(self, tree: Tree) -> None:
        """Start a new container of the image, with these files added to its own."""
        self.close()
        remove_orphans(self._docker)
        limits, name = self._limits, f"empg-jax-{uuid.uuid4().hex[:12]}"
        argv = ["run", "--detach", "--rm", "--name", name, "--label", f"{OWNER}={_owner(os.getpid())}"]
        argv += ["--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        argv += ["--memory", f"{limits.memory_mb}m", "--memory-swap", f"{limits.memory_mb}m"]
        argv += ["--pids-limit", str(limits.processes), "--cpus", f"{limits.cpus:g}", "--workdir", ROOT]
        code, capture = self._call(
            [*argv, "--entrypoint", "bash", self._image, "-c", INIT], START_SECONDS, name=name
        )
        if code:
            said = capture.parts()[0].decode("utf-8", "replace").strip()
            raise SandboxError(f"{self._docker} cannot start a container of {self._image}: {said[:500]}")
        self._name = name
        for path, (data, _) in tree.items():
            self.write(path, data)

    def close(self) -> None:
        """Remove the container."""
        name, self._name = self._name, None
        if name is not None:
            self._call(["rm", "--force", name], FILE_SECONDS)

    def _running(self) -> str:
        if self._name is None:
            raise SandboxError("the container is closed: reset it first")
        return self._name

    def _script(self, script: str, *arguments: str, stdin: bytes = b"") -> tuple[int, Capture]:
        argv = ["exec", "--interactive", "--workdir", ROOT, self._running()]
        return self._call([*argv, "bash", "-c", script, "bash", *arguments], FILE_SECONDS, stdin)

    def _check(self, code: int, path: str) -> None:
        if code:
            raise FileError(_REFUSED.get(code, f"OSError: {path}: exit code {code}").format(path=path))

    def _call(
        self, arguments: list[str], seconds: float, stdin: bytes = b"", name: str = ""
    ) -> tuple[int, Capture]:
        """Run the docker program.

        Raises:
          SandboxError: the program is not installed, or does not end in time.
        """
        capture = Capture(KEEP_BYTES)
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


def remove_orphans(docker: str = "docker") -> list[str]:
    """Remove the containers whose owner processes no longer exist; return their ids."""
    listing = [
        docker,
        "ps",
        "--all",
        "--filter",
        f"label={OWNER}",
        "--format",
        f'{{{{.ID}}}} {{{{.Label "{OWNER}"}}}}',
    ]
    try:
        found = subprocess.run(listing, capture_output=True, text=True, timeout=FILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    removed = []
    for line in found.stdout.splitlines():
        number, _, owner = line.strip().partition(" ")
        pid = owner.partition(":")[0]
        if pid.isdigit() and _owner(int(pid)) != owner:
            subprocess.run([docker, "rm", "--force", number], capture_output=True, timeout=FILE_SECONDS)
            removed.append(number)
    return removed


def _owner(pid: int) -> str:
    """Identify a process by its id and start time, because the system reuses ids."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return f"{pid}:"
    return f"{pid}:{stat.rpartition(')')[2].split()[19]}"


class SweRexSandbox:
    """A sandbox of the ``swe-rex`` package: docker, modal, fargate or a remote server, behind one interface.

    This is a thin adapter, and every method is one call of the runtime. The deployment defines the isolation.
    """

    root = ROOT

    def __init__(self, deployment: Any) -> None:
        """Store the deployment, an object of ``swerex.deployment`` that is not started yet."""
        self._deployment = deployment
        self._loop = asyncio.new_event_loop()
        self._is_started = False

    def exec(
        self,
        command: str,
        timeout: float,
        *,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> ExecResult:
        """Run a command in the image's environment; see `empg_envs.swe.sandbox.Sandbox`."""
        from swerex.exceptions import CommandTimeoutError
        from swerex.runtime.abstract import Command

        exports = "".join(f"export {key}={shlex.quote(value)}; " for key, value in (env or {}).items())
        script = exports + PRELUDE + command.replace("\0", "")
        if stdin:
            script = f"echo {base64.b64encode(stdin).decode()} | base64 -d | (\n{script}\n)"
        request = Command(command=["bash", "-c", f"exec 2>&1; {script}"], timeout=timeout, cwd=ROOT)
        try:
            response = self._wait(self._runtime().execute(request))
        except CommandTimeoutError:
            return ExecResult("", -9, "timeout")
        return ExecResult(response.stdout, int(response.exit_code or 0))

    def read(self, path: str) -> bytes:
        """Return a file's bytes; see `empg_envs.swe.sandbox.Sandbox`."""
        encoded = self.exec(
            f"bash -c {shlex.quote(_READ)} bash {shlex.quote(path)} {READ_BYTES} | base64; "
            "exit ${PIPESTATUS[0]}",
            FILE_SECONDS,
        )
        if encoded.returncode:
            raise FileError(_REFUSED.get(encoded.returncode, f"OSError: {path}").format(path=path))
        return base64.b64decode(encoded.output)

    def write(self, path: str, data: bytes) -> None:
        """Write a file; see `empg_envs.swe.sandbox.Sandbox`."""
        result = self.exec(
            f"bash -c {shlex.quote(_WRITE)} bash {shlex.quote(path)}", FILE_SECONDS, stdin=data
        )
        if result.returncode:
            raise FileError(_REFUSED.get(result.returncode, f"OSError: {path}").format(path=path))

    def snapshot(self) -> Tree:
        """Return the files of the task's folder, without version control."""
        result = self.exec(f"tar -C {ROOT} --exclude=.git -czf - . | base64", FILE_SECONDS)
        try:
            return read_archive(base64.b64decode(result.output), ROOT, has_top=False)
        except (ArchiveError, ValueError) as error:
            raise FileError(str(error)) from None

    def reset(self, tree: Tree) -> None:
        """Restart the deployment, with these files added to its own."""
        self.close()
        self._loop = asyncio.new_event_loop()
        self._wait(self._deployment.start())
        self._is_started = True
        for path, (data, _) in tree.items():
            self.write(path, data)

    def close(self) -> None:
        """Stop the deployment."""
        if self._is_started:
            self._is_started = False
            self._wait(self._deployment.stop())
        self._loop.close()

    def _runtime(self) -> Any:
        if not self._is_started:
            raise SandboxError("the deployment is not started: reset it first")
        return self._deployment.runtime

    def _wait(self, awaitable: Any) -> Any:
        from swerex.exceptions import CommandTimeoutError

        try:
            return self._loop.run_until_complete(awaitable)
        except CommandTimeoutError:
            raise
        except Exception as error:  # a remote deployment may raise anything
            raise SandboxError(f"swe-rex: {type(error).__name__}: {error}") from error
