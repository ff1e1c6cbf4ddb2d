"""Sandboxes of swe-rex, with a stand-in for the package that runs its commands here."""

import dataclasses
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from empg_envs.swe.deployments import SweRexSandbox
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.sandbox import FileError, Limits, LostSandboxError, SandboxError


@dataclasses.dataclass
class Command:
    command: list[str]
    timeout: float
    cwd: str


class CommandTimeoutError(RuntimeError):
    pass


class FakeDeployment:
    """Runs swe-rex's commands here, with a folder in place of /testbed."""

    def __init__(self, root: Path) -> None:
        self.root, self.runtime, self.log = root, self, []

    async def start(self) -> None:
        self.log.append("start")

    async def stop(self) -> None:
        self.log.append("stop")

    async def execute(self, request: Command) -> Any:
        command = [word.replace("/testbed", str(self.root)) for word in request.command]
        try:
            found = subprocess.run(
                command, cwd=self.root, capture_output=True, text=True, timeout=request.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise CommandTimeoutError from error
        return types.SimpleNamespace(stdout=found.stdout, exit_code=found.returncode)


def test_swe_rex_is_adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "swerex": types.ModuleType("swerex"),
        "swerex.exceptions": types.ModuleType("swerex.exceptions"),
        "swerex.runtime": types.ModuleType("swerex.runtime"),
        "swerex.runtime.abstract": types.ModuleType("swerex.runtime.abstract"),
    }
    modules["swerex.exceptions"].CommandTimeoutError = CommandTimeoutError  # type: ignore[attr-defined]
    modules["swerex.runtime.abstract"].Command = Command  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    root = (tmp_path / "testbed").resolve()
    root.mkdir()
    deployment = FakeDeployment(root)
    sandbox = SweRexSandbox(deployment)
    sandbox.reset({})
    sandbox.write("d/a.bin", b"\x00\xff\n" * 5)
    assert sandbox.read("d/a.bin") == b"\x00\xff\n" * 5
    assert sandbox.snapshot()["d/a.bin"].data == b"\x00\xff\n" * 5
    result = sandbox.exec("cat; echo $X; exit 3", 20, env={"X": "it's"}, stdin=b"in\n")
    assert (result.output, result.returncode) == ("in\nit's\n", 3)
    assert sandbox.exec("sleep 20", 0.2).reason == "timeout"
    with pytest.raises(FileError, match="outside"):
        sandbox.read("/etc/passwd")
    with pytest.raises(FileError, match="no such file"):
        sandbox.read("none")
    large = bytes(range(256)) * 4096  # what a command cannot hold
    for data in (large, b"", large[:-1]):
        sandbox.write("d/a.bin", data)
        assert sandbox.read("d/a.bin") == data
    sandbox.write("d/a.bin", large + b"x")
    with pytest.raises(FileError, match="holds more than 1048576 bytes"):
        sandbox.read("d/a.bin")
    for path in ("a\0b", "x" * 200_000):
        with pytest.raises(FileError, match="is no path"):
            sandbox.read(path)
    assert sandbox.exec(f"echo {'x' * 130_000}", 20).returncode == 126

    async def lost(request: Command) -> Any:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch, pytest.raises(LostSandboxError, match="ConnectionError: gone"):
        patch.setattr(deployment.runtime, "execute", lost)  # an agent may have killed the server
        sandbox.exec("true", 5)
    sandbox.close()
    assert deployment.log == ["start", "stop"]
    with pytest.raises(SandboxError, match="not started"):
        sandbox.exec("true", 5)


def test_swe_rex_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install -e '\.\[swerex\]'"):
        ImageBackend("swerex", Limits(), deployment="no_such_swerex.module:Deployment")
