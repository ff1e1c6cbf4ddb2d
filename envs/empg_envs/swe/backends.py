"""Backends, which open sandboxes for tasks and grade patches: one class per kind of sandbox."""

from __future__ import annotations

import random
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from empg_envs.names import suggest
from empg_envs.rows import DataError
from empg_envs.swe import grading, patches
from empg_envs.swe.bubblewrap import GUEST, GUEST_HOME, find_interpreter
from empg_envs.swe.caged import BubblewrapSandbox, GuestSandbox, LocalSandbox
from empg_envs.swe.grading import Grade
from empg_envs.swe.judge import trial
from empg_envs.swe.judge.canaries import Planted
from empg_envs.swe.judge.made import MadeBugs
from empg_envs.swe.judge.reading import find_strays, read_changes
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.sandbox import FileError, Limits, Sandbox
from empg_envs.swe.tasks import Task, broken_tree
from empg_envs.swe.tree import Tree

NAMES = ("bubblewrap", "docker", "swerex", "local")


class Backend(Protocol):
    """The protocol of backends: open sandboxes for tasks, collect an agent's patch, and grade patches."""

    def open(self, task: Task, sandbox: Sandbox | None = None) -> Sandbox:
        """Return a sandbox with the task's broken files; a given sandbox of this backend may be reused."""
        ...

    def collect(self, task: Task, sandbox: Sandbox) -> str:
        """Return the agent's changes as a patch."""
        ...

    def grade(self, task: Task, patch: str, timeout: float) -> Grade:
        """Grade a patch in a fresh sandbox; the tests may run for ``timeout`` seconds, up to three times."""
        ...


class TreeBackend:
    """A backend for tasks with local files, in a bubblewrap sandbox or in a plain folder."""

    def __init__(
        self,
        *,
        is_caged: bool = True,
        python: str | None = None,
        limits: Limits | None = None,
        sources: str | Path | None = None,
        layers: frozenset[str] = trial.LAYERS,
    ) -> None:
        """Set up the sandbox and the interpreter.

        Args:
          is_caged: whether commands run under bubblewrap.
          python: interpreter of the tests; None is the current interpreter.
          limits: limits of every sandbox.
          sources: folder of source archives.
          layers: the judge's layers that take part.

        Raises:
          SandboxError: bubblewrap or the interpreter cannot run here.
        """
        self._layers = layers
        self._draw = random.SystemRandom()
        self._is_caged = is_caged
        self._interpreter = find_interpreter(python)
        self._limits = limits or Limits()
        self._sources = sources
        self._made = MadeBugs(self._draw)
        self._make().close()

    @property
    def test_command(self) -> str:
        """Shell command of the test runner, which reads its request from stdin."""
        return self._program("runner")

    def open(self, task: Task, sandbox: Sandbox | None = None) -> Sandbox:
        """Return a sandbox with the task's broken files."""
        found = sandbox if isinstance(sandbox, GuestSandbox) else self._make()
        found.reset(broken_tree(task, self._sources))
        return found

    def collect(self, task: Task, sandbox: Sandbox) -> str:
        """Return the difference between the broken and the current files, without links and binaries."""
        try:
            now = sandbox.snapshot()
        except FileError:
            return ""
        patch, _ = patches.diff(broken_tree(task, self._sources), now)
        return patch

    def grade(self, task: Task, patch: str, timeout: float) -> Grade:
        """Apply the patch to fresh files, restore the tests, and run them in a fresh sandbox."""
        if not patch.strip():
            return Grade(False, "no_patch")
        if len(patch) > grading.MAX_PATCH_CHARS:
            return Grade(False, "patch_too_large")
        broken = broken_tree(task, self._sources)
        try:
            changed = patches.apply(broken, patch)
            tree, dropped = grading.candidate(task, broken, patch)
        except patches.PatchError as error:
            return Grade(False, "patch_does_not_apply", output=str(error))
        marks: list[str] = []
        if "reading" in self._layers:
            marks, strays = self._read(task, broken, changed, dropped)
            tree = {path: file for path, file in tree.items() if path not in strays}
            dropped = (*dropped, *sorted(strays))
        bugs = self._second_bugs(task, broken, timeout) if "second" in self._layers else []
        plan = trial.prepare(task, tree, bugs, self._draw, self._layers)
        return self._try(task, plan, timeout, marks=marks, dropped=dropped, layers=self._layers)

    def run_tests(self, task: Task, tree: Tree, timeout: float) -> Grade:
        """Run the task's tests over a trusted tree: their statuses, without the layers against tampering."""
        return self._try(task, trial.Trial(Planted(tree), None), timeout, layers=frozenset())

    def _try(self, task: Task, plan: trial.Trial, timeout: float, **known: Any) -> Grade:
        sandbox = self._make()
        try:
            sandbox.reset_fixed(plan.tree)
            request = trial.order(task, plan, sandbox.root, has_namespace=self._is_caged)
            result = sandbox.exec(self._program("warden"), timeout, stdin=request)
        except FileError as error:
            return Grade(False, "does_not_fit", dropped=known.get("dropped", ()), output=str(error))
        finally:
            sandbox.close()
        return trial.conclude(task, plan, result, **known)

    def _read(
        self, task: Task, broken: Tree, changed: Tree, dropped: tuple[str, ...]
    ) -> tuple[list[str], set[str]]:
        """Read what the patch adds: marks and strays; see `empg_envs.swe.judge.reading`."""
        shadows = [path for path in changed if path not in broken and grading.shadows(path, broken)]
        names = (*task.fail_to_pass, *task.pass_to_pass)
        gold = grading.repair(task, broken)
        strays = find_strays(broken, changed, gold, names=names, dropped=dropped)
        rest = {path: file for path, file in changed.items() if path not in strays}
        own = grading.own_tools(broken)
        return read_changes(broken, rest, gold, names=names, shadows=shadows, own=own), strays

    def _second_bugs(self, task: Task, broken: Tree, timeout: float) -> list[SecondBug]:
        """Return the bugs of the task's siblings; without siblings, one that is made once for the task.

        As this is a part of an episode's last step, making it takes no longer than the tests may.
        """
        if task.second_bugs or not task.patch:
            return list(task.second_bugs)
        known = self._made.recall(task)
        if known is None:
            gold = grading.add_tests(task, grading.repair(task, broken))
            known = self._made.make(
                task,
                gold,
                lambda tree, seconds: self.run_tests(task, tree, seconds).statuses,
                timeout,
                within=timeout,
            )
        return known

    def _program(self, name: str) -> str:
        home = f"{GUEST_HOME}/empg_envs/swe/guest" if self._is_caged else str(GUEST)
        python, program = shlex.quote(self._interpreter.executable), shlex.quote(f"{home}/{name}.py")
        return f"exec {python} -I -B {program}"

    def _make(self) -> GuestSandbox:
        if self._is_caged:
            return BubblewrapSandbox(self._interpreter, self._limits)
        return LocalSandbox(self._interpreter, self._limits)


def make_backend(
    name: str = "bubblewrap",
    *,
    allow_local: bool = False,
    python: str | None = None,
    limits: Mapping[str, Any] | None = None,
    sources: str | None = None,
    **options: Any,
) -> Backend:
    """Build a backend by name.

    Args:
      name: ``bubblewrap``, ``docker``, ``swerex`` or ``local``; ``local`` isolates nothing and needs
        ``allow_local``.
      allow_local: whether agents' commands may run as the current user without isolation.
      python: interpreter of tasks with local files.
      limits: fields of `Limits`.
      sources: folder of source archives.
      **options: options of the docker and swerex backends.

    Raises:
      ValueError: a name or option is unknown, or ``local`` is given without the flag.
      SandboxError: the backend cannot run here.
    """
    bounds = _limits(limits or {})
    if name in ("bubblewrap", "local"):
        if options:
            raise ValueError(f"swe backend {name!r} has no option {sorted(options)[0]!r}")
        if name == "local" and not allow_local:
            raise ValueError(
                "swe backend 'local' runs the agent's commands as the current user without isolation: set "
                "allow_local=true to accept that, or use 'bubblewrap'"
            )
        return TreeBackend(is_caged=name == "bubblewrap", python=python, limits=bounds, sources=sources)
    if name in ("docker", "swerex"):
        from empg_envs.swe.images import make_image_backend

        return make_image_backend(name, bounds, **options)
    raise ValueError(
        f"unknown swe backend {name!r}{suggest(name, NAMES) or '.'} The backends are {', '.join(NAMES)}"
    )


def _limits(values: Mapping[str, Any]) -> Limits:
    known = Limits.__dataclass_fields__
    for name in values:
        if name not in known:
            raise ValueError(f"unknown sandbox limit {name!r}; the limits are {', '.join(known)}")
    return Limits(**values)


def check_has_files(tasks: list[Task], name: str) -> None:
    """Raise DataError if a backend cannot open the tasks."""
    for task in tasks:
        if name in ("bubblewrap", "local") and not task.has_tree:
            raise DataError(
                f"task {task.instance_id} lives in the image {task.image}: use backend 'docker' or 'swerex'"
            )
        if name in ("docker", "swerex") and task.image is None:
            raise DataError(f"task {task.instance_id} has no image: use backend 'bubblewrap'")
