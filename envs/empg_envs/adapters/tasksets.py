"""Reading the tasks of a ``verifiers`` taskset, if a prompt is all that they need."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Mapping
from typing import Any


def read_taskset(vf: Any, name: str, config: Mapping[str, Any], most: int) -> list[Any]:
    """Read the tasks, and look at each for what it needs.

    Args:
      vf: the package ``verifiers.v1``.
      name: the taskset's id: a module that exports it, in the current folder or installed.
      config: keys of its own configuration.
      most: tasks after which reading stops; a taskset may have no end.

    Raises:
      ValueError: it cannot be loaded, has no tasks, or they need more than a prompt and an answer.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = vf.taskset_config_type(name).model_validate({**config, "id": name})
        is_led = vf.environment_class(name) is not vf.SingleAgentEnv
        taskset = vf.load_taskset(made)
        needs = "to lead the conversation" if is_led else "tools" if taskset.toolsets(made) else ""
        tasks = [] if needs else list(itertools.islice(taskset, most))
    except Exception as error:  # code of the taskset's, too
        raise ValueError(f"taskset {name}: {type(error).__name__}: {error}") from None
    if not tasks and not needs:
        raise ValueError(f"taskset {name} has no tasks with {dict(config)}")
    # A taskset's tasks are of one kind.
    needs = needs or _need_of_kind(vf, tasks[0]) or next(filter(None, map(_need_of, tasks)), "")
    if needs:
        raise ValueError(
            f"taskset {name} needs {needs}; here a task is a prompt, and its rewards score one answer. "
            "What else a taskset can do needs the agents of verifiers"
        )
    return tasks


def messages_of(task: Any) -> list[dict[str, Any]]:
    """Return the messages that the policy answers; their content may be a list of parts."""
    data = task.data
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*system, {"role": "user", "content": data.prompt}]
    return [*system, *({"role": each.role, "content": each.content or ""} for each in data.prompt or ())]


def _need_of_kind(vf: Any, task: Any) -> str:
    """Return what tasks of this kind need besides a prompt and an answer; empty where there is nothing."""
    kind = type(task)
    if kind.NEEDS_CONTAINER:
        return "a container"
    if kind.toolsets(task.config):
        return "tools"
    scorers = [*task.hooks("metric"), *task.hooks("reward")]
    scorers += [judge.score for judge in task.plugged_judges()]
    runtimes = [inspect.signature(scorer).parameters.get("runtime") for scorer in scorers]
    has_hooks = kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize
    if has_hooks or any(found is not None and found.default is found.empty for found in runtimes):
        return "a machine to work on (setup, finalize, or a reward that takes the runtime)"
    return ""


def _need_of(task: Any) -> str:
    """Return what this task needs beyond what its kind does."""
    messages = messages_of(task)
    if not messages or messages[-1]["role"] != "user":
        return "a user who speaks first"
    parts = [part for each in messages if isinstance(each["content"], list) for part in each["content"]]
    if any(part.type != "text" for part in parts):
        return "a policy that sees pictures"
    if any(each["role"] not in ("system", "user", "assistant") for each in messages):
        return "tools"
    return "a container" if task.data.image else ""
