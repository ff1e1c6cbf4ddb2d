"""Action parsers and prompt builders whose faults are told: both may be the user's own code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from empg_envs.answers import describe
from empg_envs.base import ActionParser, ParsedAction, PromptBuilder
from empg_jax.errors import RunError, first_line
from empg_jax.text.template import Message

_SHOWN = 80  # characters of a response or an observation in a message


class CodeFault(RunError):
    """Code of the user's raised an exception.

    Attributes:
      reason: why the episode is lost, in one word.
      duty: what such code must do.
    """

    reason: str
    duty: str


class ParserFault(CodeFault):
    """An action parser raised an exception at a response."""

    reason, duty = "parser_error", "a parser must take any text"


class PromptFault(CodeFault):
    """A prompt builder raised an exception at an observation."""

    reason, duty = "prompt_error", "a prompt builder must take every observation and info of its environment"


class CheckedParser:
    """An action parser that is checked at every response."""

    def __init__(self, parser: ActionParser) -> None:
        """Set the parser within."""
        kind = parser if hasattr(parser, "__qualname__") else type(parser)
        self._parser, self._name = parser, f"{kind.__module__}.{kind.__qualname__}"

    def __call__(self, response: str, info: Mapping[str, Any]) -> ParsedAction:
        """Parse a response.

        Raises:
          ParserFault: the parser raised an exception.
          RunError: it returned something other than a `ParsedAction` with a text and a bool.
        """
        try:
            found: Any = self._parser(response, info)
        except Exception as error:  # whatever its code raises
            raise ParserFault(
                f"the action parser {self._name} raised {first_line(error)}; the response begins "
                f"{response[:_SHOWN]!r}"
            ) from error
        if not isinstance(found, ParsedAction):
            raise RunError(
                f"the action parser {self._name} returned {describe(found)}; expected a ParsedAction"
            )
        if not isinstance(found.action, str) or not isinstance(found.is_valid, bool):
            raise RunError(
                f"the action parser {self._name} returned {found!r:.200}; expected action of type str and "
                "is_valid of type bool"
            )
        return found


class CheckedPrompts:
    """A prompt builder that is checked at every observation.

    Its methods raise `PromptFault` where the builder raises an exception, and `RunError` where it returns
    another type than a `PromptBuilder` does.
    """

    def __init__(self, prompts: PromptBuilder) -> None:
        """Set the prompt builder within."""
        self._prompts = prompts

    def start(self, observation: str, info: Mapping[str, Any]) -> list[Message]:
        """Return the messages before the first response."""
        return self._messages("start", self._call("start", observation, observation, info))

    def follow(self, observation: str, info: Mapping[str, Any]) -> str:
        """Return what the user says after a response."""
        content = self._call("follow", observation, observation, info)
        if not isinstance(content, str):
            raise RunError(f"{self._name}: follow returned {describe(content)}; expected str")
        return content

    def window(
        self, history: Sequence[tuple[str, str]], observation: str, info: Mapping[str, Any], num_turns: int
    ) -> list[Message]:
        """Return the messages before a response that repeat the last turns."""
        return self._messages(
            "window", self._call("window", observation, history, observation, info, num_turns)
        )

    @property
    def _name(self) -> str:
        return f"the prompt builder {type(self._prompts).__qualname__}"

    def _call(self, method: str, observation: str, *arguments: Any) -> Any:
        try:
            return getattr(self._prompts, method)(*arguments)
        except Exception as error:  # whatever its code raises
            raise PromptFault(
                f"{self._name}: {method} raised {first_line(error)}; the observation begins "
                f"{observation[:_SHOWN]!r}"
            ) from error

    def _messages(self, method: str, messages: Any) -> list[Message]:
        told = f"{self._name}: {method} returned"
        if not isinstance(messages, (list, tuple)) or not messages:
            raise RunError(f"{told} {describe(messages)}; expected a list of messages")
        for index, message in enumerate(messages):
            has_both = isinstance(message, Mapping) and all(
                isinstance(message.get(key), str) for key in ("role", "content")
            )
            if not has_both:
                raise RunError(
                    f"{told} as message {index} {describe(message)}; expected a dict with the texts role and "
                    "content"
                )
        return list(messages)
