"""What a chat template prints between two messages, found once per template and remembered.

A *seam* is the fixed text around new messages: end of the assistant's turn, headers, generation prompt. For
templates that only concatenate (ChatML and its like) the seam is all there is to know, and the next prompt
costs no rendering. That a template is of this kind is tested by rendering probe conversations, with ordinary
and with awkward contents; a template that fails a probe is rendered in full every time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from empg_jax.text.template import ChatTemplateError, Message

Render = Callable[[Sequence[Message]], str]  # whole conversation with the generation prompt

# Contents that templates are known to treat specially: trimmed, split at reasoning tags, seen as tool output.
_PLAIN = ("alpha", "beta 2, gamma.\ndelta")
_AWKWARD = (
    "",
    "  padded \n",
    "\n\nlines\n",
    "<think>\nreason\n</think>\n\nact",
    "<think>\n\n</think>\n\nact",
    "reason</think>act",
    "<tool_response>\nresult\n</tool_response>",
    '<tool_call>\n{"name": "act"}\n</tool_call>',
)
_ANCHOR = "empgseam{}x"
_FIRST_LENGTH = 16  # messages of the longest conversation of the first probe


@dataclasses.dataclass(frozen=True, slots=True)
class Seam:
    """The fixed text around the messages that follow a response.

    Attributes:
      pieces: text after the response, between the new messages, and after the last (one more than messages).
      takes_any: contents of every kind were shown to be printed as they are; otherwise only plain ones.
    """

    pieces: tuple[str, ...]
    takes_any: bool

    def fill(self, contents: Sequence[str]) -> str:
        """Return the text after the response with the contents in place."""
        parts = [self.pieces[0]]
        for content, piece in zip(contents, self.pieces[1:], strict=True):
            parts += (content, piece)
        return "".join(parts)


def is_plain(content: str) -> bool:
    """Return whether a content has nothing that templates treat specially: markup, outer white space, no
    text.
    """
    return "<" not in content and content == content.strip() and content != ""


class SeamFinder:
    """Finds and remembers the seams of one template.

    Args:
      render: the template, with the generation prompt.
    """

    def __init__(self, render: Render):
        self._render = render
        self._seams: dict[tuple[str, tuple[str, ...]], tuple[Seam | None, int]] = {}

    def find(self, last_role: str, new_roles: tuple[str, ...], length: int) -> Seam | None:
        """Return the seam after a response, or None when the template must be rendered in full.

        Args:
          last_role: role of the message that the response answers.
          new_roles: roles of the messages that follow the response.
          length: number of messages up to the response. Some templates drop what is old, so a seam is
            trusted only up to the length that it was probed with, and probed again beyond.
        """
        seam, probed = self._seams.get((last_role, new_roles), (None, 0))
        if length > probed:
            probed = max(2 * length, _FIRST_LENGTH)
            seam = self._probe(last_role, new_roles, probed)
            self._seams[last_role, new_roles] = seam, probed
        return seam

    def _probe(self, last_role: str, new_roles: tuple[str, ...], length: int) -> Seam | None:
        pieces = self._read_pieces(last_role, new_roles)
        if pieces is None:
            return None
        seam = Seam(pieces, takes_any=True)
        openings = _openings(last_role, length)
        if not self._holds(seam, openings, new_roles, _PLAIN):
            return None
        return dataclasses.replace(seam, takes_any=self._holds(seam, openings, new_roles, _AWKWARD))

    def _read_pieces(self, last_role: str, new_roles: tuple[str, ...]) -> tuple[str, ...] | None:
        anchors = [_ANCHOR.format(index) for index in range(len(new_roles) + 1)]
        messages = [_message(last_role, "alpha"), _message("assistant", anchors[0])]
        messages += map(_message, new_roles, anchors[1:])
        try:
            text = self._render(messages)
        except ChatTemplateError:
            return None
        pieces = []
        for anchor in anchors:
            before, found, text = text.partition(anchor)
            if not found:
                return None
            pieces.append(before)
        return (*pieces[1:], text)

    def _holds(
        self,
        seam: Seam,
        openings: Sequence[tuple[str, ...]],
        new_roles: tuple[str, ...],
        contents: Sequence[str],
    ) -> bool:
        """Return whether the seam predicts the template's text for probe conversations made of these
        contents.
        """
        agreed = False
        for opening in openings:
            for index, (old, response) in enumerate(itertools.product(contents, repeat=2)):
                prefix = [_message(role, old) for role in opening]
                # Rotating pairs every content with every other in some position.
                new = [contents[(index + shift) % len(contents)] for shift in range(len(new_roles))]
                try:
                    before = self._render(prefix)
                    after = self._render(
                        [*prefix, _message("assistant", response), *map(_message, new_roles, new)]
                    )
                except ChatTemplateError:
                    break  # not allowed (no system role, alternation), so it cannot come up either
                if after != before + response + seam.fill(new):
                    return False
                agreed = True
        return agreed


def _openings(last_role: str, length: int) -> list[tuple[str, ...]]:
    once = ("user", "assistant")
    tools = ("user", "assistant", "tool", "assistant")
    many = (last_role, "assistant") * (length // 2)
    return [
        (last_role,),
        ("system", last_role),
        (*once, last_role),
        ("system", *once, last_role),
        (*once, *once, last_role),
        (*tools, last_role),
        (*many, last_role),
        ("system", *many, last_role),
    ]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
