"""Append-only history: the text after an answer, read off a small fixed conversation.

Some chat templates print earlier answers in another way than they were sampled: without their thought, or
without the empty thought that the generation prompt had put there. A conversation under such a template
needs a fresh prompt, and so a training row, for every turn. With an append-only history the conversation
keeps the sampled ids instead, and only the text of new messages is added.

That text cannot be read off the conversation itself, so it is read off another one: a question and an answer
of our own, then the new messages. What the template prints after our answer is what it prints after any.
Whether that is so is tested with several conversations; a template that fails has no append-only history.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

from empg_jax.text.seams import is_plain
from empg_jax.text.template import ChatTemplateError, Message

HistoryMode = Literal["template", "append"]

_ANSWER = "empganswer0x"
# What may stand before an answer; the first conversation is the plainest, and every template accepts it.
_BEFORE: tuple[tuple[str, tuple[Message, ...]], ...] = (
    ("a question", ({"role": "user", "content": "question"},)),
    (
        "a system message",
        ({"role": "system", "content": "system"}, {"role": "user", "content": "question"}),
    ),
    (
        "two questions",
        (
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
            {"role": "user", "content": "another question"},
        ),
    ),
    (
        "the answer of a tool",
        (
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "call"},
            {"role": "tool", "content": "result"},
        ),
    ),
)
_KEPT = 1024  # kinds of messages
_THOUGHT = "<think>\nreason\n</think>\n\n"


class UnstableHistory(ChatTemplateError):
    """A template that prints the same new messages differently behind different conversations."""


class SuffixFinder:
    """A finder of the text that a template prints for new messages behind an answer.

    Args:
      render: function that renders a conversation with the generation prompt.
    """

    def __init__(self, render: Callable[..., str]):
        self._render = render
        self._stable: set[Hashable] = set()  # kinds of messages whose text does not depend on what is before

    def find(
        self, new_messages: Sequence[Message], system: Message | None = None, /, **variables: Any
    ) -> str:
        """Return the text from the end of an answer to the next generation prompt.

        Args:
          new_messages: the messages after the answer.
          system: the system's message of the conversation, by which a template may choose what it prints.
          **variables: further variables of the template, for example ``tools``.

        Raises:
          UnstableHistory: the text depends on what stands before the answer.
          ChatTemplateError: the template refuses such messages after an answer.
        """
        before = [(name, _led_by(system, messages)) for name, messages in _BEFORE]
        found = self._behind(before[0][1], _ANSWER, new_messages, variables)
        if found is None:
            raise UnstableHistory("the chat template does not print an answer as it is")
        kind = (tuple(map(_kind, new_messages)), repr(system), repr(variables))
        if kind not in self._stable:
            self._check(found, before, new_messages, variables)
            if len(self._stable) >= _KEPT:  # tasks may have system messages of their own
                self._stable.clear()
            self._stable.add(kind)
        return found

    def _check(
        self,
        found: str,
        before: Sequence[tuple[str, Sequence[Message]]],
        new_messages: Sequence[Message],
        variables: Mapping[str, Any],
    ) -> None:
        """Compare the text with what is printed behind other conversations."""
        (plain, question), *others = before
        behind = [(f"{plain} and a thought", question, _THOUGHT + _ANSWER)]
        behind += [(name, messages, _ANSWER) for name, messages in others]
        for name, messages, answer in behind:
            try:
                other = self._behind(messages, answer, new_messages, variables)
            except ChatTemplateError:
                continue  # the template refuses these roles, so they cannot occur in an episode either
            if other != found:
                raise UnstableHistory(
                    f"after an answer the chat template prints {found!r} behind {plain}, but {other!r} "
                    f"behind {name}"
                )

    def _behind(
        self,
        before: Sequence[Message],
        answer: str,
        new_messages: Sequence[Message],
        variables: Mapping[str, Any],
    ) -> str | None:
        """Return what is printed after our answer; None if it is not found in the text."""
        answered = {"role": "assistant", "content": answer}
        text = self._render([*before, answered, *new_messages], **variables)
        _, found, rest = text.partition(_ANSWER)
        return rest if found else None


def _led_by(system: Message | None, messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages behind the system's, in place of their own."""
    if system is None:
        return messages
    return [system, *(message for message in messages if message["role"] != "system")]


def _kind(message: Message) -> Hashable:
    """Return what a template may treat alike: the role, the keys, and whether the content is ordinary."""
    content = message["content"]
    return message["role"], tuple(sorted(message)), isinstance(content, str) and is_plain(content)
