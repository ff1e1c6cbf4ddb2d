"""The environment of a program: each call of the policy is an observation, each answer an action.

`HarnessEnv.reset` starts the program and waits for its first call. `HarnessEnv.step` answers the call and
waits for the next one, or for the program's end, whose last line of output tells the reward.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from typing import Any

from empg_envs.base import EnvFault
from empg_envs.draw import Draw
from empg_envs.harness.server import Call, Endpoint, Session
from empg_envs.names import import_function
from empg_envs.orphans import PROGRAM, end_descendants
from empg_envs.task_lines import describe_task, number_tasks, read_tasks
from empg_envs.verdicts import read_verdict

LOOK_SECONDS = 0.02  # until the first look at a program that does not call
LONGEST_LOOK = 0.16  # between two looks; every one is twice as long as the one before
TASK_BYTES = 1 << 16  # of the longest task in a variable; Linux refuses one of 128 KiB
TAIL = 2000  # last characters of a program's output in messages

_endpoint: list[Endpoint] = []
_lock = threading.Lock()


class HarnessEnv:
    """A user's own agent program, started anew for each episode.

    The program finds its task as JSON on standard input and, up to 64 KiB, in ``EMPG_TASK``; the policy is at
    ``OPENAI_BASE_URL`` with the key ``OPENAI_API_KEY``. It ends with status 0, and the last line of its
    standard output is JSON with ``reward`` (a number), and optionally ``success`` (true or false) and
    ``metrics``. What it writes to standard error is shown in messages alone.

    Args:
      command: the program and its arguments; no shell reads them.
      tasks: JSON lines, one task each; ``"split"`` in a task says ``train`` or ``test``, and ``"group"`` its
        kind. Without any split, every fifth task is a test task. None: the tasks are numbers.
      num_tasks: number of tasks of each split where there is no file.
      scorer: ``package.module:function`` that gives the reward in place of the last line. It gets the task
        and the program's standard output, and returns a number, or a dict like that line.
      start_timeout: seconds until the first call; keep it below ``workers.reset_timeout``.
      call_timeout: seconds from the policy's answer to the next call or the end, also where the client asks
        once more in between; keep it below ``workers.step_timeout``.

    Raises:
      ValueError: the command is empty, or the file of tasks or the scorer cannot be used.
    """

    replayable = False
    bounded = False

    def __init__(
        self,
        command: str = "",
        tasks: str | None = None,
        num_tasks: int = 256,
        scorer: str | None = None,
        start_timeout: float = 25.0,
        call_timeout: float = 8.0,
    ):
        self._command = shlex.split(command)
        if not self._command:
            raise ValueError("name your program, for example env.options.command='python my_agent.py'")
        if self._command[0] in ("python", "python3"):
            self._command[0] = sys.executable
        self._panels = read_tasks(tasks) if tasks is not None else number_tasks(num_tasks)
        self._scorer = None if scorer is None else import_function("scorer", scorer)
        self._start_timeout, self._call_timeout = start_timeout, call_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = ""  # of the program and what it started
        self._session: Session | None = None
        self._call: Call | None = None
        self._output: Any = None
        self._errors: Any = None
        self._task: dict[str, Any] = {}
        self._draw: Draw | None = None

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start the program; return its first call."""
        self.close()
        split = split or "train"
        if index is None:
            if seed is not None or self._draw is None:
                self._draw = Draw("harness", seed or 0)
            index = self._draw.below(self.num_tasks(split))
        self._task = {**self.get_task(split, index), "seed": seed}
        self._start(json.dumps(self._task))
        call = self._next_call(self._start_timeout, time.monotonic())
        if call is None:
            raise EnvFault("agent_never_called", f"the program made no call; {self._describe_end()}")
        return self._observe(call)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Answer the program's call; return its next call, or the reward at its end."""
        if self._session is None or self._call is None:
            state = "has ended" if self._session is not None else "has not begun"
            raise RuntimeError(f"the episode {state}: call reset first")
        call = self._answer(self._call, action)
        if call is not None:
            observation, info = self._observe(call)
            return observation, 0.0, False, False, info
        self._call = None
        result = self._score()
        self._end_program()
        info = {"task": json.dumps(self._task, ensure_ascii=False), "won": result["success"]}
        return "", result["reward"], True, False, {**info, "metrics": result["metrics"]}

    def close(self) -> None:
        """End the program with all that it started, and its session."""
        if self._session is not None:
            _find_endpoint().close(self._session)
        self._end_program()
        self._session = self._call = None

    def __del__(self) -> None:
        if hasattr(self, "_session"):
            self.close()

    def list_splits(self) -> list[str]:
        """Return the splits that have tasks."""
        return list(self._panels)

    def num_tasks(self, split: str) -> int:
        """Return the number of tasks of a split."""
        return len(self._find_panel(split))

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return a task, with its split, index and hash."""
        panel = self._find_panel(split)
        if not 0 <= index < len(panel):
            raise IndexError(f"task {split}/{index} does not exist: the split has {len(panel)} tasks")
        return describe_task(panel[index], split, index)

    def _find_panel(self, split: str) -> list[dict[str, Any]]:
        if split not in self._panels:
            raise ValueError(f"unknown split {split!r}; there are {', '.join(self._panels)}")
        return self._panels[split]

    def _start(self, task: str) -> None:
        endpoint = _find_endpoint()
        self._session = endpoint.open()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the program)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._mark = uuid.uuid4().hex
        given = {"EMPG_TASK": task} if len(task) <= TASK_BYTES else {}  # ASCII
        variables = {
            **{name: value for name, value in os.environ.items() if name != "EMPG_TASK"},
            **given,
            PROGRAM: self._mark,
            "OPENAI_BASE_URL": endpoint.url_of(self._session),
            "OPENAI_API_KEY": self._session.key,
            **_without_proxy("127.0.0.1"),
        }
        with tempfile.TemporaryFile() as source:
            source.write(task.encode() + b"\n")
            source.seek(0)
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=source,
                    stdout=self._output,
                    stderr=self._errors,
                    env=variables,
                    start_new_session=True,
                )
            except OSError as error:
                self._output.close()
                self._errors.close()
                raise EnvFault("agent_crashed", f"{self._command[0]} cannot be started: {error}") from None

    def _end_program(self) -> None:
        """End the program with all that it started, also in sessions of their own."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            end_descendants(None, self._mark, PROGRAM)
            self._output.close()
            self._errors.close()
        self._process = self._output = self._errors = None

    def _answer(self, call: Call, action: str) -> Call | None:
        """Answer a call and return the next one; None when the program has ended."""
        assert self._session is not None
        begin = time.monotonic()
        if call.has_left():  # the answer is for the client's next try, where that waits or comes next
            call.drop()
            again = self._session.take_repeat(call) or self._next_call(self._call_timeout, begin)
            if again is None or not again.repeats(call):
                return again
            call = again
        self._session.answer(call, action)
        return self._next_call(self._call_timeout, begin)

    def _next_call(self, seconds: float, begin: float) -> Call | None:
        """Wait for the next call that still waits for its answer; None when the program has ended.

        Args:
          seconds: for which it waits at most.
          begin: from when on, on the monotonic clock.

        Raises:
          EnvFault: it did neither in time.
        """
        assert self._session is not None and self._process is not None
        look = LOOK_SECONDS
        while True:
            # Looked at first: a call that was made before the end must not be lost.
            has_ended = self._process.poll() is not None
            with contextlib.suppress(queue.Empty):
                call = self._session.calls.get(timeout=0 if has_ended else look)
                if not call.has_left():
                    return call
                call.drop()
                continue
            if has_ended:
                return None
            look = min(2 * look, LONGEST_LOOK)
            if time.monotonic() > begin + seconds:
                raise EnvFault(
                    "agent_timeout",
                    f"the program neither called nor ended within {seconds:g} s; its output ends with: "
                    f"{self._read_tails()}",
                )

    def _observe(self, call: Call) -> tuple[str, dict[str, Any]]:
        self._call = call
        task = json.dumps(self._task, ensure_ascii=False)
        group = str(self._task.get("group") or "")
        info = {"task": task, "group": group, "messages": call.messages, "tools": call.tools, "won": False}
        return call.messages[-1]["content"], info

    def _score(self) -> dict[str, Any]:
        assert self._process is not None
        if self._process.returncode != 0:
            raise EnvFault("agent_crashed", self._describe_end())
        output = _read_end(self._output)
        found: Any = None
        if self._scorer is not None:
            found = self._scorer(self._task, output)
        else:
            lines = output.strip().split("\n")
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(lines[-1]) if lines else None
        try:
            return read_verdict(found)
        except ValueError as error:
            source = "the scorer" if self._scorer is not None else "its last line"
            raise EnvFault("agent_no_reward", f"{error}: {source} has none; {self._describe_end()}") from None

    def _describe_end(self) -> str:
        assert self._process is not None
        ended = f"ended with status {self._process.returncode}"
        return f"{shlex.join(self._command)} {ended}: {self._read_tails()}"

    def _read_tails(self) -> str:
        """Return the ends of what the program wrote, for messages."""
        tails = (_read_end(file).strip()[-TAIL:] for file in (self._output, self._errors))
        return "\n".join(filter(None, tails))


def _read_end(file: Any) -> str:
    """Return the last MiB of a file."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), 1 << 20, max(0, size - (1 << 20))).decode(errors="replace")


def _without_proxy(host: str) -> dict[str, str]:
    """Return the variables by which programs reach a host directly, besides those that they do already."""
    names = ("NO_PROXY", "no_proxy")
    given = [os.environ[name] for name in names if os.environ.get(name)]
    return dict.fromkeys(names, "*" if "*" in given else ",".join(dict.fromkeys([*given, host])))


def _find_endpoint() -> Endpoint:
    """Return the worker's endpoint, which is opened for its first episode."""
    with _lock:
        if not _endpoint:
            _endpoint.append(Endpoint())
        return _endpoint[0]
