"""Seams: the fixed text that a chat template prints between messages, found once per template and cached.

A *seam* is the text around new messages: end of the assistant's turn, headers, generation prompt. Many
templates (ChatML, for example) only concatenate messages and fixed text. With such a template the seam gives
the next prompt without rendering. Probe conversations with plain and with awkward contents test whether a
template is of this kind. A template that fails a probe is rendered in full every time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from empg_jax.text.template import ChatTemplateError, Message

Render = Callable[[Sequence[Message]], str]  # renders a conversation with the generation prompt

# _AWKWARD holds contents that some templates change: they trim white space, split at reasoning tags, or
# recognize tool output.
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
_FIRST_LENGTH = 16  # number of messages of the longest conversation in the first probe


@dataclasses.dataclass(frozen=True, slots=True)
class Seam:
    """The fixed text around the messages that follow a response.

    Attributes:
      pieces: text after the response, between the new messages, and after the last one. There is one piece
        more than new messages.
      takes_any: whether the template printed every probed content unchanged, not only plain ones.
    """

    pieces: tuple[str, ...]
    takes_any: bool

    def fill(self, contents: Sequence[str]) -> str:
        """Return the text after the response, with these contents of the new messages."""
        parts = [self.pieces[0]]
        for content, piece in zip(contents, self.pieces[1:], strict=True):
            parts += (content, piece)
        return "".join(parts)


def is_plain(content: str) -> bool:
    """Return whether a content is safe from special treatment: not empty, no markup, no outer white space."""
    return "<" not in content and content == content.strip() and content != ""


class SeamFinder:
    """A finder and cache of one template's seams.

    Args:
      render: function that renders a conversation with the generation prompt.
    """

    def __init__(self, render: Render):
        self._render = render
        self._seams: dict[tuple[str, tuple[str, ...]], tuple[Seam | None, int]] = {}

    def find(self, last_role: str, new_roles: tuple[str, ...], length: int) -> Seam | None:
        """Return the seam after a response, or None if the template must be rendered in full.

        Args:
          last_role: role of the message that the response answers.
          new_roles: roles of the messages that follow the response.
          length: number of messages up to the response. Some templates drop old messages, so a seam is valid
            only up to the length of its probes. Longer conversations are probed again.
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
        """Return whether the seam predicts the template's text for probe conversations of these contents."""
        agreed = False
        for opening in openings:
            for index, (old, response) in enumerate(itertools.product(contents, repeat=2)):
                prefix = [_message(role, old) for role in opening]
                # Rotation combines every content with every other one in some position.
                new = [contents[(index + shift) % len(contents)] for shift in range(len(new_roles))]
                try:
                    before = self._render(prefix)
                    after = self._render(
                        [*prefix, _message("assistant", response), *map(_message, new_roles, new)]
                    )
                except ChatTemplateError:
                    break  # the template refuses these roles, so they cannot occur in an episode either
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
