"""Sandboxes of the package ``swe-rex``."""

from __future__ import annotations

import asyncio
import base64
import shlex
from collections.abc import Mapping
from typing import Any

from empg_envs.swe.containers import (
    APPEND,
    FILE_SECONDS,
    MAX_COMMAND_BYTES,
    PRELUDE,
    READ,
    READ_BYTES,
    REFUSED,
    ROOT,
    WRITE,
    check_name,
)
from empg_envs.swe.sandbox import ExecResult, FileError, LostSandboxError, SandboxError
from empg_envs.swe.tree import ArchiveError, Tree, read_archive

PIECE_BYTES = 1 << 16  # of a file in one command, where it takes a third more


class SweRexSandbox:
    """A sandbox of the ``swe-rex`` package: docker, modal, fargate or a remote server, behind one interface.

    This is a thin adapter, and every method is a call of the runtime or a few. The deployment defines the
    isolation.
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
        if len(script.encode("utf-8", "surrogateescape")) > MAX_COMMAND_BYTES:
            return ExecResult(f"a command has at most {MAX_COMMAND_BYTES} bytes", 126)
        request = Command(command=["bash", "-c", f"exec 2>&1; {script}"], timeout=timeout, cwd=ROOT)
        try:
            response = self._wait(self._runtime().execute(request))
        except CommandTimeoutError:
            return ExecResult("", -9, "timeout")
        return ExecResult(response.stdout, int(response.exit_code or 0))

    def read(self, path: str) -> bytes:
        """Return a file's bytes; see `empg_envs.swe.sandbox.Sandbox`."""
        check_name(path)
        encoded = self.exec(
            f"bash -c {shlex.quote(READ)} bash {shlex.quote(path)} {READ_BYTES + 1} | base64; "
            "exit ${PIPESTATUS[0]}",
            FILE_SECONDS,
        )
        if encoded.returncode:
            raise FileError(REFUSED.get(encoded.returncode, f"OSError: {path}").format(path=path))
        data = base64.b64decode(encoded.output)
        if len(data) > READ_BYTES:
            raise FileError(f"ValueError: {path} holds more than {READ_BYTES} bytes")
        return data

    def write(self, path: str, data: bytes) -> None:
        """Write a file; see `empg_envs.swe.sandbox.Sandbox`."""
        check_name(path)
        for start in range(0, max(1, len(data)), PIECE_BYTES):
            command = f"bash -c {shlex.quote(APPEND if start else WRITE)} bash {shlex.quote(path)}"
            if not data:
                command += " < /dev/null"
            result = self.exec(command, FILE_SECONDS, stdin=data[start : start + PIECE_BYTES])
            if result.returncode:
                raise FileError(REFUSED.get(result.returncode, f"OSError: {path}").format(path=path))

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
            # Once it has started, an agent may have brought that about.
            kind = LostSandboxError if self._is_started else SandboxError
            raise kind(f"swe-rex: {type(error).__name__}: {error}") from error
