"""The backend for tasks inside container images: SWE-bench's images per instance, and R2E-Gym's."""

from __future__ import annotations

import importlib
import shlex
from typing import Any

from empg_envs.swe import grading, patches, reports
from empg_envs.swe.containers import ROOT, DockerSandbox, SweRexSandbox
from empg_envs.swe.grading import Grade
from empg_envs.swe.sandbox import Limits, Sandbox
from empg_envs.swe.tasks import Task, TaskError

GIT_SECONDS = 120.0
OUTPUT_CHARS = 4000
PATCH_FILE, TEST_PATCH_FILE = "/tmp/agent.patch", "/tmp/tests.patch"
# In R2E-Gym's images the tests are next to the repository; an agent must not see them.
HIDE = f"rm -rf /r2e_tests {ROOT}/r2e_tests {ROOT}/run_tests.sh /run_tests.sh"
RUN_R2E = (
    f"for d in {ROOT} /root /; do if [ -f $d/run_tests.sh ]; then script=$d/run_tests.sh; break; fi; done; "
    f'[ -e {ROOT}/r2e_tests ] || ln -s /r2e_tests {ROOT}/r2e_tests; bash "$script" 2>&1'
)


class ImageBackend:
    """A backend with one container per episode; it collects ``git diff`` and grades in a fresh container."""

    def __init__(self, kind: str, limits: Limits, *, docker: str = "docker", deployment: str = "") -> None:
        """Set up the kind of containers.

        Args:
          kind: ``docker`` or ``swerex``.
          limits: limits of a docker container; a swe-rex deployment has its own limits.
          docker: the docker program.
          deployment: swe-rex's deployment class as ``package.module:Class``; its argument is ``image``.

        Raises:
          ValueError: swe-rex is not installed, or the deployment does not exist.
        """
        self._kind, self._limits, self._docker = kind, limits, docker
        self._deployment = _load(deployment) if kind == "swerex" else None

    def open(self, task: Task, sandbox: Sandbox | None = None) -> Sandbox:
        """Return a new container of the task's image."""
        if sandbox is not None:
            sandbox.close()
        found = self._make(task)
        found.reset({})
        if task.expected is not None:
            found.exec(HIDE, GIT_SECONDS)
        return found

    def collect(self, task: Task, sandbox: Sandbox) -> str:
        """Return the agent's changes by ``git diff``."""
        base = shlex.quote(task.base) if task.base and task.expected is None else "HEAD"
        git = f"git -c core.fileMode=false -c safe.directory={ROOT}"
        exclude = "-- . ':!run_tests.sh' ':!r2e_tests'" if task.expected is not None else ""
        command = f"{git} add -A && {git} diff --cached --no-color {base} {exclude}"
        result = sandbox.exec(command, GIT_SECONDS)
        return result.output if result.returncode == 0 and not result.omitted else ""

    def grade(self, task: Task, patch: str, timeout: float) -> Grade:
        """Apply the patch in a fresh container, restore the tests, run them, and parse the log."""
        if not patch.strip():
            return Grade(False, "no_patch")
        sandbox = self._make(task)
        try:
            sandbox.reset({})
            sandbox.write(PATCH_FILE, patch.encode())
            apply = f"git -c safe.directory={ROOT} apply --verbose {PATCH_FILE}"
            applied = sandbox.exec(f"{apply} || patch --batch --fuzz=5 -p1 -i {PATCH_FILE}", GIT_SECONDS)
            if applied.returncode:
                return Grade(False, "patch_does_not_apply", output=applied.output[-OUTPUT_CHARS:])
            command, parser = self._tests(task, sandbox)
            result = sandbox.exec(command, timeout)
        finally:
            sandbox.close()
        limit = None if result.reason == "exit" else result.reason
        return grading.judge(task, parser(result.output), output=result.output[-OUTPUT_CHARS:], limit=limit)

    def _tests(self, task: Task, sandbox: Sandbox) -> tuple[str, reports.Parser]:
        """Restore the tests; return the command that runs them and the parser of its output."""
        if task.expected is not None:
            return RUN_R2E, reports.parse_r2e
        command, parser = reports.COMMANDS.get(task.repo, reports.DEFAULT)
        files = patches.touched(task.test_patch)
        if task.test_patch:
            git = f"git -c safe.directory={ROOT}"
            names = " ".join(map(shlex.quote, sorted(files)))
            sandbox.write(TEST_PATCH_FILE, task.test_patch.encode())
            # Restore each file separately, because files that the test patch adds do not exist in git yet.
            restore = f"for f in {names}; do {git} checkout {shlex.quote(task.base)} -- $f || rm -f $f; done"
            placed = sandbox.exec(f"{restore}; {git} apply --verbose {TEST_PATCH_FILE}", GIT_SECONDS)
            if placed.returncode:
                raise TaskError(
                    f"task {task.instance_id}: its test patch does not apply: {placed.output[-500:]}"
                )
        command = str(task.row.get("test_cmd") or command)
        targets = " ".join(map(shlex.quote, reports.test_targets(task.repo, files or task.test_files)))
        return f"{command} {targets} 2>&1", parser

    def _make(self, task: Task) -> Sandbox:
        assert task.image is not None
        if self._deployment is not None:
            return SweRexSandbox(self._deployment(image=task.image))
        return DockerSandbox(task.image, self._limits, self._docker)


def make_image_backend(kind: str, limits: Limits, **options: Any) -> ImageBackend:
    """Build the backend; see `ImageBackend`.

    Raises:
      ValueError: an option is unknown.
    """
    known = {"docker": ("docker",), "swerex": ("deployment",)}[kind]
    for name in options:
        if name not in known:
            raise ValueError(
                f"swe backend {kind!r} has no option {name!r}; its options are {', '.join(known)}"
            )
    return ImageBackend(kind, limits, **options)


def _load(path: str) -> Any:
    module, _, name = (path or "swerex.deployment.docker:DockerDeployment").partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"swe backend 'swerex' needs the package swe-rex ({error}); "
            "in the clone: pip install -e '.[swerex]'"
        ) from error
    except AttributeError:
        raise ValueError(f"swe-rex deployment {path!r}: {module} has no {name!r}") from None
