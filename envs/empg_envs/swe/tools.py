"""The agent's tools: R2E-Gym's four functions, or a plain shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from empg_envs.swe.editor import EditorError, FileEditor
from empg_envs.swe.sandbox import ExecResult, Sandbox

MAX_OUTPUT = 10_000  # characters of an observation; the middle of a longer one is cut out
SUBMIT = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
FUNCTIONS = ("file_editor", "execute_bash", "search", "finish")
_CALL, _CALL_END = re.compile(r"<function=(\w+)>"), "</function>"
_PARAMETER, _PARAMETER_END = re.compile(r"<parameter=(\w+)>"), "</parameter>"
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_LIMITS = {
    "timeout": "it ran longer than {seconds:g} seconds",
    "memory": "it used too much memory",
    "processes": "it started too many processes",
    "files": "it made too many files",
    "output": "it printed too much",
}


class Call(NamedTuple):
    """A function call in a text."""

    name: str
    arguments: dict[str, str]


class Reply(NamedTuple):
    """The observation after an action, and whether the agent has submitted its work."""

    text: str
    is_final: bool = False


class Tools(Protocol):
    """The protocol of tools, which carry out actions in one sandbox."""

    def run(self, action: str, seconds: float) -> Reply:
        """Carry out an action within ``seconds``; every text has a defined result.

        Raises:
          SandboxError: the sandbox died.
        """
        ...


def parse_call(text: str) -> Call | None:
    """Parse the first ``<function=name><parameter=key>value</parameter></function>`` of a text.

    One line break after an opening tag, and one before a closing tag, belong to the markup.
    """
    found = next(_blocks(text, _CALL, _CALL_END), None)
    if found is None:
        return None
    arguments = {}
    for name, value, _ in _blocks(found[1], _PARAMETER, _PARAMETER_END):
        arguments[name] = value.removeprefix("\n").removesuffix("\n")
    return Call(found[0], arguments)


def find_call(text: str) -> str | None:
    """Return the text of the first call."""
    found = next(_blocks(text, _CALL, _CALL_END), None)
    return None if found is None else found[2]


def _blocks(text: str, opening: re.Pattern[str], closing: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, content and whole text of every block, in time linear in the text."""
    place = 0
    while match := opening.search(text, place):
        end = text.find(closing, match.end())
        if end < 0:
            return
        place = end + len(closing)
        yield match[1], text[match.end() : end], text[match.start() : place]


def render_call(name: str, **arguments: str) -> str:
    """Return the text of a call."""
    parts = [f"  <parameter={key}>{value}</parameter>\n" for key, value in arguments.items()]
    return f"<function={name}>\n{''.join(parts)}</function>"


def clean(text: str, most: int = MAX_OUTPUT) -> str:
    """Remove escape sequences and control characters, and cut out the middle of a long text."""
    text = _ESCAPES.sub("", text.replace("\r\n", "\n"))
    text = _CONTROLS.sub(lambda match: f"\\x{ord(match.group()):02x}", text)
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters left out]\n{text[-half:]}"


def describe(result: ExecResult, seconds: float) -> str:
    """Return one line about the end of a command, or the empty string after a success."""
    if result.reason != "exit":
        why = _LIMITS.get(result.reason, result.reason).format(seconds=seconds)
        return f"[the command was ended: {why}]"
    return f"[exit code {result.returncode}]" if result.returncode else ""


class FunctionTools:
    """R2E-Gym's functions ``file_editor``, ``execute_bash``, ``search`` and ``finish``."""

    def __init__(self, sandbox: Sandbox, max_output: int = MAX_OUTPUT) -> None:
        """Work in one sandbox for one episode."""
        self._sandbox, self._most = sandbox, max_output
        self._editor = FileEditor(sandbox)

    def run(self, action: str, seconds: float) -> Reply:
        """Carry out the first call in the text."""
        call = parse_call(action)
        if call is None:
            return Reply("No function call was found. Write one as <function=name>…</function>.")
        match call.name:
            case "finish":
                return Reply("The work was handed in.", is_final=True)
            case "file_editor":
                text = self._edit(call.arguments)
            case "execute_bash":
                text = self._bash(call.arguments, seconds)
            case "search":
                text = self._search(call.arguments, seconds)
            case _:
                return Reply(f"There is no function {call.name!r}; the functions are {', '.join(FUNCTIONS)}.")
        return Reply(f"Execution output of [{call.name}]:\n{clean(text, self._most)}")

    def _edit(self, arguments: dict[str, str]) -> str:
        try:
            return self._editor.run(arguments)
        except EditorError as error:
            return f"ERROR: {error}"

    def _bash(self, arguments: dict[str, str], seconds: float) -> str:
        command = arguments.get("cmd", arguments.get("command"))
        if command is None:
            return "ERROR: the parameter 'cmd' is missing"
        result = self._sandbox.exec(command, seconds)
        return "\n".join(filter(None, (result.output.rstrip("\n"), describe(result, seconds))))

    def _search(self, arguments: dict[str, str], seconds: float) -> str:
        term, path = arguments.get("search_term"), arguments.get("path", ".").strip() or "."
        if not term:
            return "ERROR: the parameter 'search_term' is missing"
        quoted, place = shlex.quote(term), shlex.quote(path)
        # For a file show the matching lines; for a folder show the files with their numbers of matches.
        command = (
            f"if [ -d {place} ]; then grep -rIcF --exclude-dir='.?*' -e {quoted} -- {place} "
            f"| grep -v ':0$' | sort; else grep -nF -e {quoted} -- {place}; fi"
        )
        result = self._sandbox.exec(command, seconds)
        if result.reason != "exit":
            return describe(result, seconds)
        return result.output.rstrip("\n") or f"No match for {term!r} in {path}."


class BashTools:
    """A new shell for every command; an output that begins with `SUBMIT` submits the work."""

    def __init__(self, sandbox: Sandbox, max_output: int = MAX_OUTPUT) -> None:
        """Work in one sandbox for one episode."""
        self._sandbox, self._most = sandbox, max_output

    def run(self, action: str, seconds: float) -> Reply:
        """Run the text as a shell command."""
        if not action.strip():
            return Reply("There was no command.")
        result = self._sandbox.exec(action, seconds)
        first = result.output.lstrip().partition("\n")[0].strip()
        if first == SUBMIT and result.reason == "exit" and result.returncode == 0:
            return Reply("The work was handed in.", is_final=True)
        why = describe(result, seconds) if result.reason != "exit" else ""
        parts = [f"<returncode>{result.returncode}</returncode>", why, "<output>"]
        return Reply(
            "\n".join([*filter(None, parts), clean(result.output, self._most).rstrip("\n"), "</output>"])
        )
