"""Prompts with descriptions of the tools, action parsers, and a closed vocabulary for small models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from empg_envs.base import (
    ActionParser,
    Message,
    ParsedAction,
    PlainParser,
    PlainPrompts,
    PromptBuilder,
    after_thought,
)
from empg_envs.swe import terse
from empg_envs.swe.tasks import load_base, load_panels
from empg_envs.swe.tools import FUNCTIONS, SUBMIT, find_call, parse_call

TOOLS = ("functions", "bash", "terse")
MAX_TURNS = 40  # default of the environment
FALLBACK_CHARACTERS = 200  # number of last characters that are the action of an answer without a call

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
      tools: ``functions``, ``bash`` or ``terse``; it must equal the environment's option.
      root: path of the repository inside the sandbox.

    Raises:
      ValueError: the protocol is unknown.
    """
    _check(tools)
    return (
        PlainPrompts()
        if tools == "terse"
        else EngineerPrompts(_FUNCTIONS if tools == "functions" else _BASH, root)
    )


def make_parser(tools: str = "functions", root: str = "/testbed") -> ActionParser:
    """Build the parser for a tool protocol; ``root`` is ignored, it only affects the prompts.

    Raises:
      ValueError: the protocol is unknown.
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
    """A prompt builder with instructions and task, then observations, for transcript or window."""

    def __init__(self, instructions: str, root: str) -> None:
        """Store the instructions about the tools, and the path ``root`` of the repository."""
        self._instructions, self._root = instructions, root

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return the instructions as a system message and the task as a user message."""
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
        """Return instructions and task, the past turns, and the current observation."""
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
    """Pair actions with their results; the result of an action is the observation one turn later."""
    seen = [observed for observed, _ in history[1:]] + [observation]
    return [(action, gave) for (_, action), gave in zip(history, seen, strict=True)]


class FunctionParser:
    """A parser of the first function call of a response; it is valid if the function exists."""

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse the call behind the thought; without one, the end of that text is an invalid action."""
        said = after_thought(response)
        text = find_call(said)
        call = None if text is None else parse_call(text)
        if text is None or call is None:
            return ParsedAction(action=said[-FALLBACK_CHARACTERS:], is_valid=False)
        return ParsedAction(action=text, is_valid=call.name in FUNCTIONS)


class BashParser:
    """A parser of the only fenced block of a response; none or several blocks are invalid and run nothing."""

    _BLOCK = re.compile(r"```(?:bash|sh)[ \t]*\n(.*?)\n?```", re.DOTALL)

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse the block."""
        found = self._BLOCK.findall(after_thought(response))
        command = found[0].strip() if len(found) == 1 else ""
        return ParsedAction(action=command, is_valid=bool(command))


def check_turns(
    turns: int, *, max_turns: int = MAX_TURNS, submit_at_limit: bool = False, **options: Any
) -> None:
    """Check that an episode may have as many turns as the environment needs to end it.

    Args:
      turns: turns after which the caller ends an episode.
      max_turns: the environment's own limit.
      submit_at_limit: whether it grades an episode at its limit.
      **options: further options of the environment.

    Raises:
      ValueError: ``submit_at_limit`` would have no effect.
    """
    if submit_at_limit and turns < max_turns:
        raise ValueError(
            f"submit_at_limit grades an episode after max_turns={max_turns} turns, but env.max_turns={turns} "
            "ends it before: make them equal"
        )


def phrases(tools: str = "functions", tasks: str = "tiny", **options: Any) -> list[str]:
    """Return the closed vocabulary of the embedded tasks under the terse tools, for a small tokenizer.

    Args:
      tools: the environment's tools; only ``terse`` has a closed vocabulary.
      tasks: the environment's tasks; only the embedded tasks have a closed vocabulary.
      **options: further options of the environment; the vocabulary does not depend on them.

    Raises:
      ValueError: the tools or tasks have no closed vocabulary.
    """
    if tools != "terse" or tasks != "tiny":
        raise ValueError(
            f"swe tools {tools!r} over tasks {tasks!r} have no closed vocabulary; use a tokenizer, or the "
            "tools 'terse' over the tasks 'tiny'"
        )
    panels = load_panels(tasks)
    bases = sorted({task.base for panel in panels.values() for task in panel})
    return terse.vocabulary(load_base(base) for base in bases)
