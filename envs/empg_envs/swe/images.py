"""The backend for tasks inside container images: SWE-bench's images per instance, and R2E-Gym's."""

from __future__ import annotations

import dataclasses
import importlib
import random
import shlex
import weakref
from typing import Any

from empg_envs.swe import grading, imaged, patches, reports
from empg_envs.swe.containers import ROOT, DockerSandbox, SweRexSandbox
from empg_envs.swe.grading import Grade
from empg_envs.swe.imaged import Checked
from empg_envs.swe.judge import canaries
from empg_envs.swe.judge.trial import LAYERS
from empg_envs.swe.sandbox import ExecResult, Limits, Sandbox
from empg_envs.swe.tasks import Task, TaskError

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

    def __init__(
        self,
        kind: str,
        limits: Limits,
        *,
        docker: str = "docker",
        deployment: str = "",
        layers: frozenset[str] = LAYERS,
    ) -> None:
        """Set up the kind of containers.

        Args:
          kind: ``docker`` or ``swerex``.
          limits: limits of a docker container; a swe-rex deployment has its own limits.
          docker: the docker program.
          deployment: swe-rex's deployment class as ``package.module:Class``; its argument is ``image``.
          layers: the judge's layers that take part.

        Raises:
          ValueError: swe-rex is not installed, or the deployment does not exist.
        """
        self._kind, self._limits, self._docker = kind, limits, docker
        self._deployment = _load(deployment) if kind == "swerex" else None
        self._layers, self._draw = layers, random.SystemRandom()
        # Sandbox → commit that its agent started from.
        self._bases: weakref.WeakKeyDictionary[Sandbox, str] = weakref.WeakKeyDictionary()

    def open(self, task: Task, sandbox: Sandbox | None = None) -> Sandbox:
        """Return a new container of the task's image, without the history after its commit."""
        if sandbox is not None:
            sandbox.close()
        found = self._make(task)
        found.reset({})
        if task.expected is not None:
            found.exec(HIDE, imaged.GIT_SECONDS)
        self._bases[found] = imaged.prune(found)
        return found

    def collect(self, task: Task, sandbox: Sandbox) -> str:
        """Return the agent's changes since the commit that it started from, whether committed or not."""
        base = shlex.quote(self._bases.get(sandbox, "HEAD"))
        exclude = "-- . ':!run_tests.sh' ':!r2e_tests'" if task.expected is not None else ""
        command = (
            f"{imaged.GIT} add -A && {imaged.GIT} diff --cached --no-ext-diff --no-color {base} {exclude}"
        )
        result = sandbox.exec(command, imaged.GIT_SECONDS)
        return result.output if result.returncode == 0 and not result.omitted else ""

    def grade(self, task: Task, patch: str, timeout: float) -> Grade:
        """Judge a patch in a fresh container; see `empg_envs.swe.judge` and `empg_envs.swe.imaged`."""
        if not patch.strip():
            return Grade(False, "no_patch")
        if len(patch) > grading.MAX_PATCH_CHARS:
            return Grade(False, "patch_too_large")
        sandbox = self._make(task)
        try:
            sandbox.reset({})
            sandbox.write(PATCH_FILE, patch.encode())
            apply = f"{imaged.GIT} apply --verbose {PATCH_FILE}"
            script = f"{apply} || patch --batch --fuzz=5 -p1 -i {PATCH_FILE}"
            applied = sandbox.exec(script, imaged.GIT_SECONDS)
            if applied.returncode:
                return Grade(False, "patch_does_not_apply", output=applied.output[-OUTPUT_CHARS:])
            try:
                checked = imaged.check_patch(task, sandbox, patch, is_reading="reading" in self._layers)
            except patches.PatchError as error:
                return Grade(False, "patch_does_not_apply", output=str(error))
            command, parser = self._tests(task, sandbox)
            if "canaries" in self._layers:
                planted = imaged.plant(task, sandbox, self._draw)
                checked = dataclasses.replace(checked, planted=planted)
            result = sandbox.exec(command, timeout)
        finally:
            sandbox.close()
        # The exit code of a pipe or of an alternative is not that of the tests.
        code = None if "|" in command or "sessions" not in self._layers else result.returncode
        return self._conclude(task, result, parser, checked, code)

    def _conclude(
        self,
        task: Task,
        result: ExecResult,
        parser: reports.Parser,
        checked: Checked,
        code: int | None,
    ) -> Grade:
        limit = None if result.reason == "exit" else result.reason
        statuses, canary = canaries.sort_out(checked.planted, parser(result.output))
        doubts = [*checked.marks, *canaries.doubts(canary)]
        if limit is None and "sessions" in self._layers:
            doubts += reports.doubts(result.output, parser, code)
        output = result.output[-OUTPUT_CHARS:]
        grade = grading.judge(task, statuses, dropped=checked.dropped, output=output, limit=limit)
        if grade.resolved and not reports.is_believable(parser(result.output), code):
            grade = dataclasses.replace(grade, resolved=False, reason="unresolved")
        if grade.resolved:
            doubts += canaries.missing(checked.planted, canary)
        return grading.believe(grade, doubts)

    def _tests(self, task: Task, sandbox: Sandbox) -> tuple[str, reports.Parser]:
        """Restore the tests; return the command that runs them and the parser of its output."""
        if task.expected is not None:
            return RUN_R2E, reports.parse_r2e
        files = patches.touched(task.test_patch)
        if task.test_patch:
            names = " ".join(map(shlex.quote, sorted(files)))
            sandbox.write(TEST_PATCH_FILE, task.test_patch.encode())
            # Restore each file separately, because files that the test patch adds do not exist in git yet.
            base, git = shlex.quote(task.base), imaged.GIT
            restore = f"for f in {names}; do {git} checkout {base} -- $f || rm -f $f; done"
            placed = sandbox.exec(f"{restore}; {git} apply --verbose {TEST_PATCH_FILE}", imaged.GIT_SECONDS)
            if placed.returncode:
                raise TaskError(
                    f"task {task.instance_id}: its test patch does not apply: {placed.output[-500:]}"
                )
        command = str(task.row.get("test_cmd") or reports.command_of(task.repo))
        targets = " ".join(map(shlex.quote, reports.test_targets(task.repo, files or task.test_files)))
        # Its own exit code is the command's last word: the engine reports it, and no output can change it.
        return f"{command} {targets} 2>&1", reports.parser_of(task.repo)

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
