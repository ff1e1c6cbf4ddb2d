"""Repository repair as a `TextEnv`."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from empg_envs.base import whole_characters
from empg_envs.swe import expert, patches, terse
from empg_envs.swe.backends import TreeBackend, check_has_files, make_backend
from empg_envs.swe.grading import SUSPECT, Grade
from empg_envs.swe.predictions import append_prediction, prediction
from empg_envs.swe.prompt import MAX_TURNS, TOOLS
from empg_envs.swe.sandbox import LostSandboxError, Sandbox
from empg_envs.swe.tasks import Task, broken_tree, load_panels
from empg_envs.swe.tools import BashTools, FunctionTools, Tools
from empg_envs.swe.tree import LINK, Tree

LOST = "sandbox_lost"
MAX_DETAIL = 2000  # characters of what is said about a suspect patch or a lost sandbox


class SweEnv:
    """A repository with a bug, tools to fix it, and its own tests as the judge.

    An episode has one sandbox. It terminates when the agent submits its work. The changes are then collected
    as a patch, applied to fresh files with the original tests, and tested in a fresh sandbox. The reward is
    1.0 if the task is solved, else 0.0. At the limit of turns or time the episode is truncated with reward
    0.0, unless ``submit_at_limit`` is set.

    A step that ends an episode may take a command's limit and three times that of the tests.

    ``info`` contains ``task`` (the problem statement), ``instance_id``, ``group`` (the repository), ``won``,
    and after the grading ``reason`` and ``metrics`` (shares of tests with the wanted status, and whether the
    grade is suspect). A patch that tampers with its judge has the reward 0.0 and ``outcome`` ``suspect``,
    with the signs of it in ``detail``; see `empg_envs.swe.judge`. The ``outcome`` of an episode whose
    sandbox, or that of its judge, is gone is ``sandbox_lost``.
    """

    # What `make_backend` takes besides the name; which of them fit depends on the backend.
    more_options = (
        "allow_local",
        "python",
        "limits",
        "sources",
        "docker",
        "deployment",
        "network",
        "writable",
    )

    def __init__(
        self,
        tasks: str | Mapping[str, str] = "tiny",
        *,
        tools: str = "functions",
        backend: str = "bubblewrap",
        max_turns: int = MAX_TURNS,
        command_timeout: float = 90.0,
        episode_timeout: float = 5400.0,
        grade_timeout: float = 300.0,
        submit_at_limit: bool = False,
        predictions: str | None = None,
        model_name: str = "empg-jax",
        **backend_options: Any,
    ) -> None:
        """Read the tasks and check that their sandboxes can run here.

        Args:
          tasks: ``tiny``, a source of rows (a file, or a data set of the hub; see `empg_envs.rows`), or
            split → source; see `empg_envs.swe.tasks.load_panels`.
          tools: ``functions``, ``bash`` or ``terse``.
          backend: ``bubblewrap``, ``docker``, ``swerex`` or ``local``.
          max_turns: number of steps after which an episode is truncated.
          command_timeout: time limit of one command in seconds.
          episode_timeout: seconds after which an episode is truncated at its next step.
          grade_timeout: time limit of the tests in seconds.
          submit_at_limit: whether the work of a truncated episode is graded. A caller that ends episodes
            before ``max_turns`` grades nothing.
          predictions: file to which every graded patch is appended, in SWE-bench's format.
          model_name: the model's name in this file.
          **backend_options: see `empg_envs.swe.backends.make_backend`.

        Raises:
          ValueError: an option has an invalid value.
          SandboxError: the backend cannot run here. The message tells how to fix this.
        """
        if tools not in TOOLS:
            raise ValueError(f"unknown swe tools {tools!r}; the tools are {', '.join(TOOLS)}")
        for name, value in (
            ("max_turns", max_turns),
            ("command_timeout", command_timeout),
            ("episode_timeout", episode_timeout),
            ("grade_timeout", grade_timeout),
        ):
            if value <= 0:
                raise ValueError(f"swe {name} must be positive, not {value}")
        self._panels = load_panels(tasks)
        check_has_files([task for panel in self._panels.values() for task in panel], backend)
        self._backend = make_backend(backend, **backend_options)
        self._kind, self._max_turns = tools, max_turns
        # Commands of a shell print times, ports and process ids. The terse tools only read and edit.
        self.replayable = tools == "terse"
        self._command_timeout, self._episode_timeout = command_timeout, episode_timeout
        self._grade_timeout, self._submit_at_limit = grade_timeout, submit_at_limit
        self._predictions = None if predictions is None else Path(predictions)
        self._model_name, self._sources = model_name, backend_options.get("sources")
        self._draw = random.Random(0)
        self._sandbox: Sandbox | None = None
        self._task: Task | None = None
        self._tools: Tools | None = None
        self._actions: list[str] = []
        self._deadline = 0.0
        self._is_done = False

    def list_splits(self) -> list[str]:
        """Return the names of the task panels."""
        return list(self._panels)

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel.

        Raises:
          ValueError: there is no such panel.
        """
        if split not in self._panels:
            raise ValueError(f"unknown swe split {split!r}; the splits are {', '.join(self._panels)}")
        return len(self._panels[split])

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a task without its solution, with its content hash."""
        task = self._find(split, index)
        return {
            "split": split,
            "index": index,
            "instance_id": task.instance_id,
            "repo": task.repo,
            "version": task.version,
            "base": task.base,
            "task": task.problem_statement,
            "fail_to_pass": len(task.fail_to_pass),
            "pass_to_pass": len(task.pass_to_pass),
            "content_hash": task.content_hash,
        }

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode in a sandbox of its own.

        Args:
          seed: seeds the random choice of an index, for resets without ``index``.
          split: the panel; the default is the first one.
          index: index of the task in its panel.

        Raises:
          ValueError: the split is unknown.
          IndexError: the index is outside of the panel.
          SandboxError: the sandbox does not start.
        """
        if seed is not None:
            self._draw = random.Random(seed)
        split = next(iter(self._panels)) if split is None else split
        if index is None:
            index = self._draw.randrange(self.num_tasks(split))
        task = self._find(split, index)
        # The backend may reuse the sandbox of the last episode.
        self._sandbox = self._backend.open(task, self._sandbox)
        self._task, self._actions, self._is_done = task, [], False
        self._deadline = time.monotonic() + self._episode_timeout
        self._tools = self._make_tools(task, self._sandbox)
        observation = terse.opening(task) if self._kind == "terse" else task.problem_statement
        return observation, self._info(won=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Carry out one action; every text has a defined result.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
          SandboxError: the judge's sandbox cannot be started; a failure of the machine.
        """
        task, sandbox, tools = self._playing("step")
        left = self._deadline - time.monotonic()
        if left <= 0:
            return self._cut(task, sandbox, "The time for this task is over.", "episode_timeout")
        action = whole_characters(action)
        self._actions.append(action)
        try:
            # The command's limit includes the episode's limit, so that a last command cannot run past it.
            reply = tools.run(action, min(self._command_timeout, left))
        except LostSandboxError as error:
            return self._lose(error)
        if reply.is_final:
            grade = self._judge(task, sandbox)
            self._is_done = True
            return reply.text, float(grade.resolved), True, False, self._info(grade.resolved, grade)
        if len(self._actions) >= self._max_turns:
            return self._cut(task, sandbox, reply.text, "turn_limit")
        return reply.text, 0.0, False, False, self._info(won=False)

    def expert_action(self) -> str:
        """Return the next action to reproduce the gold patch with the agent's tools.

        Raises:
          RuntimeError: before the first reset, after the end of the episode, or for tasks inside an image.
        """
        task, sandbox, _ = self._playing("expert_action")
        if not task.has_tree:
            raise RuntimeError(f"task {task.instance_id} lies in an image: its expert cannot see the files")
        broken = broken_tree(task, self._sources)
        goal = patches.apply(broken, task.patch)
        return expert.ACTIONS[self._kind](_text_files(sandbox.snapshot()), _text_files(goal), self._actions)

    def close(self) -> None:
        """End the episode and its sandbox."""
        if self._sandbox is not None:
            self._sandbox.close()
        self._sandbox = self._task = self._tools = None

    def _make_tools(self, task: Task, sandbox: Sandbox) -> Tools:
        if self._kind == "terse":
            if not isinstance(self._backend, TreeBackend):
                raise ValueError("swe tools 'terse' need backend 'bubblewrap' or 'local'")
            return terse.TerseTools(sandbox, task, self._backend.test_command)
        kind = FunctionTools if self._kind == "functions" else BashTools
        return kind(sandbox)

    def _cut(
        self, task: Task, sandbox: Sandbox, text: str, reason: str
    ) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Truncate the episode."""
        self._is_done = True
        if not self._submit_at_limit:
            return text, 0.0, False, True, {**self._info(won=False), "reason": reason}
        grade = self._judge(task, sandbox)
        return text, float(grade.resolved), False, True, self._info(grade.resolved, grade)

    def _lose(self, error: LostSandboxError) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Truncate an episode whose sandbox does not answer after an action.

        The action may be the cause. If this were a failure of the machine, whose episodes are sampled again,
        an agent that sees its work fail could get another try.
        """
        self._is_done = True
        lost = {"reason": LOST, "outcome": LOST, "detail": str(error)[:MAX_DETAIL]}
        return "The sandbox does not answer.", 0.0, False, True, {**self._info(won=False), **lost}

    def _judge(self, task: Task, sandbox: Sandbox) -> Grade:
        # Only the patch leaves the agent's sandbox, which may be manipulated. Grading uses a fresh one.
        try:
            patch = self._backend.collect(task, sandbox)
            grade = self._backend.grade(task, patch, self._grade_timeout)
        except LostSandboxError as error:  # either sandbox, and what the agent wrote may be the cause
            return Grade(False, LOST, output=str(error))
        if self._predictions is not None:
            append_prediction(self._predictions, prediction(task.instance_id, self._model_name, patch))
        return grade

    def _find(self, split: str, index: int) -> Task:
        count = self.num_tasks(split)
        if not 0 <= index < count:
            raise IndexError(f"swe split {split!r} has tasks 0 to {count - 1}, not {index} ({count} tasks)")
        return self._panels[split][index]

    def _playing(self, caller: str) -> tuple[Task, Sandbox, Tools]:
        if self._task is None or self._sandbox is None or self._tools is None:
            raise RuntimeError(f"{caller}() without an episode: call reset() first")
        if self._is_done:
            raise RuntimeError(f"{caller}() after the episode ended: call reset() first")
        return self._task, self._sandbox, self._tools

    def _info(self, won: bool, grade: Grade | None = None) -> dict[str, Any]:
        assert self._task is not None
        info: dict[str, Any] = {
            "task": self._task.problem_statement,
            "instance_id": self._task.instance_id,
            "group": self._task.repo,
            "won": won,
        }
        if grade is not None:
            info |= {"reason": grade.reason, "metrics": grade.metrics}
            if grade.reason == SUSPECT:
                info |= {"outcome": SUSPECT, "detail": "; ".join(grade.doubts)[:MAX_DETAIL]}
            elif grade.reason == LOST:
                info |= {"outcome": LOST, "detail": grade.output[:MAX_DETAIL]}
        return info


def _text_files(tree: Tree) -> Tree:
    """Return the files that a patch can change."""
    return {path: file for path, file in tree.items() if b"\0" not in file.data and file.mode != LINK}
