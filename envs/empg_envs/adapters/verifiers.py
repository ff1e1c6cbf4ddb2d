"""Tasksets of ``verifiers``: their tasks are the data, and their rewards score one answer to each."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from empg_envs.adapters.foreign import ForeignEnv, Reply, import_package
from empg_envs.adapters.tasksets import messages_of, read_taskset
from empg_envs.base import EnvFault, Message
from empg_envs.task_lines import HOLD_OUT


class VerifiersEnv(ForeignEnv):
    """Tasks of a taskset of ``verifiers``, one answer each, scored by their own rewards and judges.

    Args:
      taskset: its id: a module that exports the taskset, in the current folder or installed.
      config: keys of the taskset's own configuration.
      test_config: what differs in it for test tasks; None: every fifth task is a test task.
      answer: field of a task's data that holds a right answer, for a warm start; None: there is no expert.
      tasks: most tasks that are read, of each of the two.
      win_return: reward from which an episode is won.

    Raises:
      ValueError: the package or the taskset is missing, it refuses its configuration, or its tasks need more
        than a prompt and an answer (tools, a container, a conversation led by the taskset).
    """

    threads = False  # scorers of mathematics set an alarm, which the main thread alone may do

    def __init__(
        self,
        taskset: str = "",
        *,
        config: Mapping[str, Any] | None = None,
        test_config: Mapping[str, Any] | None = None,
        answer: str | None = None,
        tasks: int = 10_000,
        win_return: float = 1.0,
    ) -> None:
        if not taskset:
            raise ValueError("name a taskset of verifiers: env.options.taskset=NAME is missing")
        self._vf = import_package("verifiers.v1", "verifiers", extra="verifiers")
        self._win_return = win_return
        found = read_taskset(self._vf, taskset, config or {}, tasks)
        if test_config is not None:
            test = read_taskset(self._vf, taskset, {**(config or {}), **test_config}, tasks)
            self._panels = {"train": found, "test": test}
        else:
            test = found[HOLD_OUT - 1 :: HOLD_OUT]
            train = [task for number, task in enumerate(found, start=1) if number % HOLD_OUT]
            self._panels = {"train": train, **({"test": test} if test else {})}
        super().__init__(f"verifiers {taskset}", {name: len(p) for name, p in self._panels.items()}, 1)
        self._task = self._panels["train"][0]
        if answer is not None:
            fields = list(type(self._task.data).model_fields)
            if answer not in fields:
                raise ValueError(f"answer={answer}: a task of {taskset} has {', '.join(fields)}")
            self.expert_action = lambda: str(getattr(self._task.data, answer))

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a task's prompt, its name and its key, which `verifiers` makes from all of it."""
        self._seed_of(split, index)
        task = self._panels[split][index]
        told = {"name": task.data.name, "prompt": task.data.prompt_text}
        return {"split": split, "index": index, **told, "content_hash": task.key}

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        self._task = self._panels[split][index]
        return self._talk()[-1]["content"], self._info(False)

    def _act(self, action: str) -> Reply:
        trace, error = self._trace(action), 0.0
        try:
            asyncio.run(self._task.score(trace))
        except self._vf.TaskError:  # code of the task's, which may not expect every text
            error = 1.0
        except self._vf.RolloutError as fault:  # a judge that cannot be reached is nobody's zero
            raise EnvFault("verifiers_error", f"{type(fault).__name__}: {fault}") from None
        reward = 0.0 if error else float(trace.reward)
        parts = {name: found.score for name, found in trace.rewards.items() if found is not None}
        parts |= {name: value for name, value in trace.metrics.items() if value is not None}
        info = self._info(reward >= self._win_return) | {"metrics": {**parts, "scorer_error": error}}
        return "", reward, True, False, info

    def _info(self, won: bool) -> dict[str, Any]:
        *before, last = self._talk()
        return {"task": last["content"], "before": before, "won": won}

    def _talk(self) -> list[Message]:
        """Return the messages that the policy answers, as plain text."""
        to_text = importlib.import_module("verifiers.v1.types").content_text
        return [{**each, "content": to_text(each["content"])} for each in messages_of(self._task)]

    def _trace(self, answer: str) -> Any:
        """Make the record of an episode, from which the package's scorers read."""
        vf, task = self._vf, self._task
        trace = vf.Trace(
            task=vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash),
            state=importlib.import_module("verifiers.v1.state").state_cls(type(task))(),
            agent=vf.AgentInfo(config=vf.AgentConfig(runtime=vf.SubprocessConfig())),
        )
        said = vf.AssistantMessage(content=answer)
        reply = vf.Response(id="0", created=0, model="policy", message=said, finish_reason="stop")
        kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
        asked = [kinds[each["role"]](content=each["content"]) for each in self._talk()]
        importlib.import_module("verifiers.v1.graph").prepare_turn(trace, asked).commit(reply)
        trace.stop("agent_completed")
        return trace
