"""The backend for tasks inside container images: SWE-bench's images per instance, and R2E-Gym's."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import logging
import random
import re
import shlex
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.rows import DataError
from empg_envs.swe import grading, imaged, installing, patches, reports
from empg_envs.swe.containers import DockerSandbox
from empg_envs.swe.deployments import SweRexSandbox
from empg_envs.swe.grading import Grade
from empg_envs.swe.imaged import Checked, Suite
from empg_envs.swe.judge import trial
from empg_envs.swe.judge.logs import LogSession
from empg_envs.swe.judge.made import MadeBugs
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.judge.trial import LAYERS, OUTPUT_CHARS
from empg_envs.swe.sandbox import Limits, Sandbox
from empg_envs.swe.tasks import Task
from empg_envs.swe.tree import Tree

_log = logging.getLogger(__name__)

FIXED = "fixed"  # the layer of files that cannot be changed while tests run; a cage always has it
ALL_LAYERS = LAYERS | {FIXED}
REPLACED = "\ufffd"  # what a sandbox's output has in place of bytes that are no UTF-8
_NO_TEXT = re.compile(r"^(?:(?:new file|deleted file|old|new) mode|index \S+) 1[26]0000$", re.MULTILINE)


class ImageBackend:
    """A backend with one container per episode; it collects ``git diff`` and grades in a fresh container."""

    def __init__(
        self,
        kind: str,
        limits: Limits,
        *,
        docker: str = "docker",
        deployment: str = "",
        network: str = "none",
        writable: Mapping[str, Sequence[str]] | None = None,
        layers: frozenset[str] = ALL_LAYERS,
    ) -> None:
        """Set up the kind of containers.

        Args:
          kind: ``docker`` or ``swerex``.
          limits: limits of a docker container; a swe-rex deployment has its own limits.
          docker: the docker program.
          deployment: swe-rex's deployment class as ``package.module:Class``; its argument is ``image``.
          network: the engine's network for tests, for example ``bridge``; an agent never has one.
          writable: repository → folders below /testbed that its tests must be able to write to, besides those
            of `reports.WRITABLE`; ``.`` stands for all.
          layers: the judge's layers that take part.

        Raises:
          ValueError: swe-rex is not installed, or the deployment does not exist.
        """
        self._kind, self._limits, self._docker = kind, limits, docker
        self._deployment = _load(deployment) if kind == "swerex" else None
        self._network, self._layers = network, layers
        self._writable = {**reports.WRITABLE, **(writable or {})}
        self._draw: random.Random = random.SystemRandom()
        self._made, self._has_warned = MadeBugs(self._draw), False
        # Sandbox → commit that its agent started from.
        self._bases: weakref.WeakKeyDictionary[Sandbox, str] = weakref.WeakKeyDictionary()

    def open(self, task: Task, sandbox: Sandbox | None = None) -> Sandbox:
        """Return a new container of the task's image, without the history after its commit."""
        if sandbox is not None:
            sandbox.close()
        with contextlib.ExitStack() as failing:
            found = failing.enter_context(contextlib.closing(self._make(task)))
            found.reset({})
            if task.expected is not None:
                found.exec(imaged.HIDE, imaged.GIT_SECONDS)
            self._bases[found] = imaged.prune(found)
            failing.pop_all()  # nothing failed
        return found

    def collect(self, task: Task, sandbox: Sandbox) -> str:
        """Return the agent's changes since the commit that it started from, whether committed or not.

        Files that the judge's patches cannot hold are left out.
        """
        base = shlex.quote(self._bases.get(sandbox, "HEAD"))
        exclude = " ".join(f"':!{name}'" for name in imaged.JUDGES)
        exclude = f"-- . {exclude}" if task.expected is not None else ""
        diff = f"{imaged.GIT} diff --cached --no-ext-diff --no-color {base} {exclude}"
        # A container that is gone is no empty patch: this raises then.
        result = sandbox.exec(f"{imaged.STAGE}\n{diff}", imaged.GIT_SECONDS)
        if result.returncode or result.omitted:
            return ""
        patch = result.output
        if REPLACED in patch:  # the character may also be the file's own
            coded = sandbox.exec(f"{diff} | base64", imaged.GIT_SECONDS)
            if coded.returncode or coded.omitted:
                return ""
            try:
                patch = base64.b64decode(coded.output).decode("utf-8", "surrogateescape")
            except ValueError:  # an agent may have another program of this name
                return ""
        return _text_only(patch)

    def grade(self, task: Task, patch: str, timeout: float) -> Grade:
        """Judge a patch in a fresh container; see `empg_envs.swe.judge` and `empg_envs.swe.imaged`."""
        if not patch.strip():
            return Grade(False, "no_patch")
        if len(patch) > grading.MAX_PATCH_CHARS:
            return Grade(False, "patch_too_large")
        with contextlib.closing(self._make(task, is_judge=True)) as sandbox:
            sandbox.reset({})
            try:
                wrong, changed = imaged.apply_patch(task, sandbox, patch)
                if wrong is not None:
                    return Grade(False, "patch_does_not_apply", output=wrong[-OUTPUT_CHARS:])
                checked = imaged.check_patch(task, sandbox, changed, is_reading="reading" in self._layers)
            except patches.PatchError as error:
                return Grade(False, "patch_does_not_apply", output=str(error))
            note = self._install(task, sandbox, {*changed} - {*checked.dropped}, timeout)
            return self._try(task, sandbox, checked, timeout, note)

    def _install(self, task: Task, sandbox: Sandbox, changed: set[str], timeout: float) -> str:
        """Build what a patch changes, where that is necessary; return the output."""
        if not installing.is_needed(changed) or not isinstance(sandbox, DockerSandbox):
            return ""
        built, said = installing.build(task, sandbox, timeout)
        imaged.put(sandbox, built, {})
        return f"{said[-OUTPUT_CHARS // 2 :]}\n"

    def second_bugs(self, task: Task, timeout: float) -> list[SecondBug]:
        """Return a task's bugs for the second session, which are made once.

        This runs the tests up to 13 times, too long for a step of an episode: so `grade` uses only what
        was made before (``python -m empg_envs.swe.prepare``).

        Raises:
          DataError: the gold patch does not apply.
        """
        known = self._made.recall(task)
        if known is not None or not task.patch:
            return known or []
        with contextlib.closing(self._make(task, is_judge=True)) as sandbox:
            sandbox.reset({})
            with grading.fitting(task, "patch"):
                wrong, _ = imaged.apply_patch(task, sandbox, task.patch)
            if wrong is not None:
                raise DataError(f"task {task.instance_id}: its gold patch does not apply: {wrong[-500:]}")
            suite = imaged.place_tests(task, sandbox)
            files = {path for path in patches.touched(task.patch) if not grading.protected(path, task)}
            gold = imaged.read_files(sandbox, files)

            def run(tree: Tree, seconds: float) -> Mapping[str, str]:
                imaged.put(sandbox, tree, {})
                return self._session(sandbox, suite, suite.line(), seconds, "").statuses

            return self._made.make(task, gold, run, timeout)

    def _try(self, task: Task, sandbox: Sandbox, checked: Checked, timeout: float, note: str) -> Grade:
        """Run the sessions of a trial over the files of a container in which a checked patch is applied."""
        suite = imaged.place_tests(task, sandbox)
        bugs = self._recall(task) if "second" in self._layers else []
        now = imaged.read_files(sandbox, imaged.files_to_read(task, bugs))
        plan = trial.prepare(task, now, bugs, self._draw, self._layers)
        started = time.monotonic()
        imaged.put(sandbox, plan.planted.tree, now)
        first = self._session(sandbox, suite, suite.line(), timeout, plan.nonces[0])
        result = first.result
        known: dict[str, Any] = {
            "doubts": [*checked.marks, *(first.doubts() if "sessions" in self._layers else ())],
            "dropped": checked.dropped,
            "output": (note + result.output[-OUTPUT_CHARS // 2 :])[-OUTPUT_CHARS:],
            "limit": None if result.reason == "exit" else result.reason,
        }
        grade = trial.settle(task, dataclasses.replace(plan, second=None), (first, None), **known)
        if plan.second is None or not grade.resolved:
            return grade
        # In a container of its own, so that nothing tells the package which session is which. It may take as
        # long as the first one, or an agent could have it cut short by being slow.
        spent = time.monotonic() - started
        imaged.put(sandbox, plan.second.tree, plan.planted.tree)
        line = suite.line(trial.files_of(plan.reds, plan, []), plan.reds)
        other = self._session(sandbox, suite, line, max(spent, timeout - spent), plan.nonces[1])
        return trial.settle(task, plan, (first, other), **known)

    def _recall(self, task: Task) -> list[SecondBug]:
        known = self._made.recall(task)
        if known is None and task.patch and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "task %s, and maybe others, is judged without a second bug: make them with "
                "python -m empg_envs.swe.prepare TASKS --bugs",
                task.instance_id,
            )
        return known or []

    def _session(self, sandbox: Sandbox, suite: Suite, line: str, seconds: float, nonce: str) -> LogSession:
        """Run tests over the files that a container has now, where nothing can change them."""
        has_nonce = suite.has_witness and "sessions" in self._layers and nonce
        if FIXED in self._layers and isinstance(sandbox, DockerSandbox):  # swe-rex has nothing of the kind
            with contextlib.closing(sandbox.frozen(self._writable.get(suite.repo, ()))) as frozen:
                frozen.reset({})
                result = frozen.exec(line, seconds, stdin=nonce.encode())
        else:
            result = sandbox.exec(line, seconds, stdin=nonce.encode())
        code = result.returncode if suite.has_code and "sessions" in self._layers else None
        return LogSession(result, suite.parser, code, nonce if has_nonce else None)

    def _make(self, task: Task, *, is_judge: bool = False) -> Sandbox:
        assert task.image is not None
        if self._deployment is not None:
            return SweRexSandbox(self._deployment(image=task.image))
        network = self._network if is_judge else "none"
        return DockerSandbox(task.image, self._limits, self._docker, network=network, is_swept=not is_judge)


def make_image_backend(kind: str, limits: Limits, **options: Any) -> ImageBackend:
    """Build the backend; see `ImageBackend`.

    Raises:
      ValueError: an option is unknown.
    """
    known = {"docker": ("docker", "network", "writable"), "swerex": ("deployment",)}[kind]
    for name in options:
        if name not in known:
            raise ValueError(
                f"swe backend {kind!r} has no option {name!r}; its options are {', '.join(known)}"
            )
    return ImageBackend(kind, limits, **options)


def _text_only(patch: str) -> str:
    """Return git's patch without the files that `patches.render` refuses, and without links and submodules.

    A file that becomes a link, or was one, has two sections; neither is kept.
    """
    parts = re.split(r"^(?=diff --git )", patch, flags=re.MULTILINE)
    heads = [part.partition("\n")[0] for part in parts]
    refused = {head for head, part in zip(heads, parts, strict=True) if not _is_text(part)}
    return "".join(part for head, part in zip(heads, parts, strict=True) if head not in refused)


def _is_text(section: str) -> bool:
    try:
        patches.render(section)
    except patches.PatchError:
        return False
    return _NO_TEXT.search(section) is None


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
