"""Beside the engine: what the agent is told about its tools, and how its answers are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from empg_envs.base import ActionParser, Message, ParsedAction, PlainParser, PlainPrompts, PromptBuilder
from empg_envs.swe import terse
from empg_envs.swe.tasks import load_base, load_panels
from empg_envs.swe.tools import FUNCTIONS, SUBMIT, find_call, parse_call

TOOLS = ("functions", "bash", "terse")
FALLBACK_CHARACTERS = 200  # of an answer without a call; the environment answers that it found none

_FUNCTIONS = """\
You are a software engineer who mends a bug in a repository. You act by calling functions, one per answer:

<function=file_editor>
  <parameter=command>view</parameter>
  <parameter=path>package/module.py</parameter>
  <parameter=view_range>[1, 40]</parameter>
</function>

Functions:
- file_editor: command (view, create, str_replace, insert, undo_edit), path; view takes view_range \
[first, last]; create takes file_text; str_replace takes old_str, which must occur exactly once, and \
new_str; insert takes insert_line (0 for the beginning) and new_str.
- execute_bash: cmd, a shell command. It runs in a new shell in the repository's folder, without a network; \
what it leaves running is ended.
- search: search_term and path; of a folder it lists the files that hold the term, of a file the lines.
- finish: command=submit. Hands in your work: the repository's tests decide.

Reason first, in a few sentences; then give exactly one call. Do not change the tests: they are put back
before your work is judged."""

_BASH = f"""\
You are a software engineer who mends a bug in a repository. You act by shell commands, one per answer, in a
single block like this:

```bash
grep -rn "def parse" src
```

Every command runs in a new shell in the repository's folder, without a network; what it leaves running is
ended. Reason first, in a few sentences; then give exactly one block. When the bug is mended, give the command
`echo {SUBMIT}` alone: it hands in your work, and the repository's tests decide. Do not change the tests: they
are put back before your work is judged."""

_TASK = "The repository lies in {root}. This is the task:\n\n{task}"


def make_prompts(tools: str = "functions", root: str = "/testbed") -> PromptBuilder:
    """Build the prompt builder for a tool protocol.

    Args:
      tools: ``functions``, ``bash`` or ``terse``, as the environment's option.
      root: where the repository lies for the agent.

    Raises:
      ValueError: an unknown protocol.
    """
    _check(tools)
    return (
        PlainPrompts()
        if tools == "terse"
        else EngineerPrompts(_FUNCTIONS if tools == "functions" else _BASH, root)
    )


def make_parser(tools: str = "functions", root: str = "/testbed") -> ActionParser:
    """Build the parser for a tool protocol; ``root`` concerns the prompts alone.

    Raises:
      ValueError: an unknown protocol.
    """
    _check(tools)
    parsers: dict[str, Callable[[], ActionParser]] = {
        "functions": FunctionParser,
        "bash": BashParser,
        "terse": PlainParser,
    }
    return parsers[tools]()


def _check(tools: str) -> None:
    if tools not in TOOLS:
        raise ValueError(f"unknown swe tools {tools!r}; the tools are {', '.join(TOOLS)}")


class EngineerPrompts(PlainPrompts):
    """Instructions and task first; then observations, as one transcript or in fresh windows."""

    def __init__(self, instructions: str, root: str) -> None:
        """Initialize with ``instructions``: what the tools are; ``root``: where the repository lies."""
        self._instructions, self._root = instructions, root

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return the instructions as the system's message, the task as the user's."""
        task = _TASK.format(root=self._root, task=info["task"])
        return [{"role": "system", "content": self._instructions}, {"role": "user", "content": task}]

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return the observation."""
        return observation

    def recall(
        self,
        history: Sequence[tuple[str, str]],
        observation: str,
        info: Mapping[str, Any],
        turn: int,
    ) -> list[Message]:
        """Return instructions and task, the remembered turns, the present observation."""
        messages = self.start(observation, info)
        past = "\n\n".join(
            f"Action {number}:\n{action}\nObservation {number}:\n{seen}"
            for number, (action, seen) in enumerate(
                _follow_ups(history, observation), turn - len(history) + 1
            )
        )
        told = f"You have taken {turn} actions. The last {len(history)} and what they gave:\n\n{past}"
        messages[-1]["content"] += f"\n\n{told if history else observation}"
        return messages


def _follow_ups(history: Sequence[tuple[str, str]], observation: str) -> list[tuple[str, str]]:
    """Return actions with what they gave: the observation that a turn answers stands one turn later."""
    seen = [observed for observed, _ in history[1:]] + [observation]
    return [(action, gave) for (_, action), gave in zip(history, seen, strict=True)]


class FunctionParser:
    """The first function call of a response; valid when there is one and the function exists."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the call; without one the end of the response is passed on."""
        text = find_call(response)
        call = None if text is None else parse_call(text)
        if text is None or call is None:
            return ParsedAction(action=response[-FALLBACK_CHARACTERS:], is_valid=False)
        return ParsedAction(action=text, is_valid=call.name in FUNCTIONS)


class BashParser:
    """The one fenced block of a response; none or several are invalid, and then nothing is run."""

    _BLOCK = re.compile(r"```(?:bash|sh)[ \t]*\n(.*?)\n?```", re.DOTALL)

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Read the block."""
        found = self._BLOCK.findall(response)
        command = found[0].strip() if len(found) == 1 else ""
        return ParsedAction(action=command, is_valid=bool(command))


def phrases(tools: str = "functions", tasks: str = "tiny", **options: Any) -> list[str]:
    """Return the closed vocabulary of the embedded tasks under the terse tools, for a small tokenizer.

    Args:
      tools: the environment's tools; only ``terse`` has a closed vocabulary.
      tasks: the environment's tasks; only the embedded ones have one.
      **options: further options of the environment; the vocabulary does not depend on them.

    Raises:
      ValueError: other tools or tasks.
    """
    if tools != "terse" or tasks != "tiny":
        raise ValueError(
            f"swe tools {tools!r} over tasks {tasks!r} have no closed vocabulary; use a tokenizer, or the "
            "tools 'terse' over the tasks 'tiny'"
        )
    panels = load_panels(tasks)
    bases = sorted({task.base for panel in panels.values() for task in panel})
    return terse.vocabulary(load_base(base) for base in bases)
