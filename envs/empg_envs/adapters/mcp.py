"""Tool servers of the Model Context Protocol: the policy calls tools, and its last words are the answer."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from typing import Any

from empg_envs.adapters.foreign import ForeignEnv, Reply
from empg_envs.adapters.stdio import StdioServer
from empg_envs.base import EnvFault, whole_characters
from empg_envs.names import import_function, suggest
from empg_envs.task_lines import describe_task, read_tasks
from empg_envs.verdicts import read_verdict


class McpEnv(ForeignEnv):
    """Tools of a server of the Model Context Protocol, which is started anew for each episode.

    An action is a call, ``{"name": …, "arguments": {…}}``; any other text is the answer and ends the episode,
    as ``max_turns`` calls do. The reward is then asked for.

    Args:
      command: the server and its arguments; no shell reads them. It speaks over stdin and stdout.
      tasks: JSON lines, one task each, with ``"prompt"``, the text for the policy, and maybe ``"split"``
        (train or test; without any, every fifth is a test task).
      setup_tool: tool that is called with the task before the policy begins.
      reward_tool: tool that is called with ``{"task", "answer"}`` at the end and gives a number, or JSON with
        ``reward``, and maybe ``success`` and ``metrics``.
      scorer: ``package.module:function`` of task, answer and calls that gives the same, in its place.
      max_turns: number of calls after which an episode is truncated, with an empty answer; at most
        ``env.max_turns``, which ends an episode without asking for the reward.
      start_timeout: seconds until the server has introduced itself; keep it below ``workers.reset_timeout``.
      call_timeout: seconds for a call, after which the policy reads an error; keep it below
        ``workers.step_timeout``. The last of ``max_turns`` calls has half of them, the reward tool the rest.

    Raises:
      ValueError: the command is empty, the tasks or the scorer cannot be used, or nothing gives a reward.
    """

    replayable = False  # nothing is known about what the tools do
    bounded = False

    def __init__(
        self,
        command: str = "",
        *,
        tasks: str = "",
        setup_tool: str | None = None,
        reward_tool: str | None = None,
        scorer: str | None = None,
        max_turns: int = 10,
        start_timeout: float = 12.0,
        call_timeout: float = 8.0,
    ) -> None:
        self._command = shlex.split(command)
        if not self._command or not tasks:
            missing = 'command="python server.py"' if not self._command else "tasks=FILE.jsonl"
            raise ValueError(f"name a server and its tasks: env.options.{missing} is missing")
        if (reward_tool is None) == (scorer is None):
            raise ValueError("give one of env.options.reward_tool and env.options.scorer, for the reward")
        self._panels = read_tasks(tasks)
        for split, panel in self._panels.items():
            for index, task in enumerate(panel):
                if not isinstance(task.get("prompt"), str) or not task["prompt"]:
                    raise ValueError(f'tasks={tasks}: task {index} of {split} has no "prompt"')
        super().__init__("mcp", {split: len(panel) for split, panel in self._panels.items()}, max_turns)
        self._hidden = {"setup_tool": setup_tool, "reward_tool": reward_tool}
        self._scorer = None if scorer is None else import_function("scorer", scorer)
        self._timeouts = start_timeout, call_timeout
        self._server: StdioServer | None = None
        self._tools: list[dict[str, Any]] = []
        self._task: dict[str, Any] = {}
        self._calls: list[dict[str, Any]] = []
        self._is_stuck = False  # the policy's newest call has no answer

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a task, with its split, index and hash."""
        self._seed_of(split, index)
        return describe_task(self._panels[split][index], split, index)

    def close(self) -> None:
        """End the episode and the server."""
        super().close()
        if self._server is not None:
            self._server.close()
        self._server = None

    def __del__(self) -> None:
        if hasattr(self, "_server"):
            self.close()

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        self.close()
        self._task, self._calls, self._is_stuck = self._panels[split][index], [], False
        self._server = StdioServer(self._command, *self._timeouts)
        listed = {tool["name"]: tool for tool in self._server.list_tools()}
        for option, name in self._hidden.items():
            if name is not None and name not in listed:
                raise EnvFault(
                    "mcp_error", f"{option}={name}: the server has {', '.join(listed) or 'no tools'}"
                )
        self._tools = [
            {"type": "function", "function": _function(tool)}
            for name, tool in listed.items()
            if name not in self._hidden.values()
        ]
        if (setup := self._hidden["setup_tool"]) is not None:
            text, is_error = self._server.call(setup, self._task)
            if is_error:
                raise EnvFault("mcp_error", f"setup_tool={setup}: {text}")
        return self._task["prompt"], self._info(False)

    def _act(self, action: str) -> Reply:
        assert self._server is not None
        call, seconds = _read_call(action), self._timeouts[1]
        end, is_last = time.monotonic() + seconds, self._turn + 1 >= self._max_turns
        if call is None and "<tool_call>" not in action:
            return self._end(action.strip(), end, is_truncated=False)
        if is_last and self._scorer is None:
            seconds /= 2  # the reward is asked for in this step, too
        observation = "error: that is no well-formed call" if call is None else self._call(call, seconds)
        if is_last:
            return self._end("", end, is_truncated=True)
        return observation, 0.0, False, False, self._info(False)

    def _call(self, call: dict[str, Any], seconds: float) -> str:
        """Call a tool; return its text."""
        assert self._server is not None
        names = [tool["function"]["name"] for tool in self._tools]
        if call["name"] in names:
            try:
                text, is_error = self._server.call(call["name"], call["arguments"], seconds)
                self._is_stuck = False
            except EnvFault as fault:
                if fault.reason != "mcp_timeout":
                    raise
                # Else a policy could have a lost episode discarded, by a call that takes long.
                text, is_error, self._is_stuck = f"no answer in {seconds:g} s", True, True
        else:
            hint = suggest(call["name"], names) or f"; there are {', '.join(names)}"
            text, is_error = f"there is no tool {call['name']!r}{hint}", True
        self._calls.append({**call, "result": text, "is_error": is_error})
        return f"error: {text}" if is_error else text or "(no text)"

    def _end(self, answer: str, end: float, *, is_truncated: bool) -> Reply:
        """Ask for the reward until a time of the monotonic clock, and end the server."""
        assert self._server is not None
        if self._scorer is not None:
            found = self._scorer(self._task, answer, self._calls)
        else:
            judge, told = str(self._hidden["reward_tool"]), {"task": self._task, "answer": answer}
            found = None
            try:
                text, is_error = self._server.call(judge, told, end - time.monotonic())
                if is_error:
                    raise EnvFault("mcp_error", f"reward_tool={judge}: {text}")
                with contextlib.suppress(ValueError, RecursionError):
                    found = json.loads(text)
            except EnvFault as fault:
                if fault.reason != "mcp_timeout" or not self._is_stuck:
                    raise
                found = 0.0  # the server is still busy with the policy's call
        try:
            verdict = read_verdict(found)
        except ValueError as error:
            told_by = "scorer" if self._scorer is not None else f"reward_tool={self._hidden['reward_tool']}"
            raise EnvFault("mcp_no_reward", f"{error} from the {told_by}: {found!r:.200}") from None
        self._server.close()
        self._server = None
        info = {
            **self._info(verdict["success"]),
            "metrics": {**verdict["metrics"], "calls": float(len(self._calls))},
        }
        return "", verdict["reward"], not is_truncated, is_truncated, info

    def _info(self, won: bool) -> dict[str, Any]:
        return {"task": self._task["prompt"], "tools": self._tools, "won": won}


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as clients of the OpenAI wire describe it."""
    parameters = tool.get("inputSchema") or {"type": "object", "properties": {}}
    return {"name": tool["name"], "description": tool.get("description", ""), "parameters": parameters}


def _read_call(action: str) -> dict[str, Any] | None:
    try:
        call = json.loads(whole_characters(json.dumps(json.loads(action), ensure_ascii=False)))
    except (ValueError, RecursionError):
        return None
    is_call = isinstance(call, dict) and call.keys() == {"name", "arguments"}
    return call if is_call and isinstance(call["name"], str) and isinstance(call["arguments"], dict) else None
