"""Prompts from a text of the user's, such as a published prompt, with named placeholders.

The text is the first prompt of an episode. What stands below a line ``--- later turns ---`` is the prompt of
every later turn (``env.context=window``); without that line they all have one form. A placeholder is a name
in braces, ``{task_description}``; braces that are meant are doubled. In a transcript the text opens the
conversation, and the messages that follow are those of the environment's own style.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs.base import Message, PlainPrompts, quote_turns
from empg_envs.names import suggest

LATER = "--- later turns ---"
# The names of verl-agent's published prompts.
NAMES = (
    *("task_description", "current_observation", "step_count", "current_step"),
    *("history_length", "action_history"),
)
Info = Mapping[str, Any]


def read_template(template: str) -> str:
    """Return the text of a template: a file's, or ``template`` itself if it has several lines.

    Raises:
      ValueError: the file cannot be read.
    """
    if "\n" in template:
        return template
    try:
        text = Path(os.path.expanduser(template)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ValueError(f"template={template} cannot be read: {reason}") from None
    return text if "\n" in text else f"{text}\n"  # so that it is read as a text from now on


class TemplatePrompts(PlainPrompts):
    """A prompt builder that fills a template.

    Args:
      template: see `read_template`.
      usual: the prompts of the environment's style, for the later messages of a transcript.
      offer: (placeholder, function): the name for the actions at hand, and how they are written.
      show: how an observation is written, given the info.
      limit: characters above which a later turn's prompt is that of a first turn, without the past.

    Raises:
      ValueError: the file cannot be read, or the text has an unknown or malformed placeholder.
    """

    def __init__(
        self,
        template: str,
        usual: PlainPrompts,
        offer: tuple[str, Callable[[Info], str]],
        show: Callable[[str, Info], str] = lambda observation, info: observation,
        limit: int | None = None,
    ) -> None:
        name = "the template" if "\n" in template else f"template={template}"
        first, line, later = read_template(template).removesuffix("\n").partition(f"\n{LATER}\n")
        self._first, self._later = first, later if line else first
        self._usual, self._offer, self._show, self._limit = usual, offer, show, limit
        for part in (first, later):
            _check(part, (*NAMES, offer[0]), name)

    def start(self, observation: str, info: Info) -> list[Message]:
        """Fill the template of the first turn."""
        return self._fill(self._first, [], observation, info, 0)

    def follow(self, observation: str, info: Info) -> str:
        """Return the next message of a transcript."""
        return self._usual.follow(observation, info)

    def recall(
        self, history: Sequence[tuple[str, str]], observation: str, info: Info, turn: int
    ) -> list[Message]:
        """Fill the template of the later turns."""
        filled = self._fill(self._later, history, observation, info, turn)
        if self._limit is not None and len(filled[0]["content"]) > self._limit:
            return self.start(observation, info)
        return filled

    def _fill(
        self, text: str, history: Sequence[tuple[str, str]], observation: str, info: Info, turn: int
    ) -> list[Message]:
        name, write = self._offer
        values = {
            "task_description": info["task"],
            "current_observation": self._show(observation, info),
            "step_count": turn,
            "current_step": turn + 1,
            "history_length": len(history),
            "action_history": quote_turns([(self._show(seen, info), done) for seen, done in history], turn),
            name: write(info),
        }
        return [{"role": "user", "content": text.format_map(values)}]


def _check(text: str, known: Sequence[str], source: str) -> None:
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{source}: {error}; a brace that is meant is doubled: {{{{ or }}}}") from None
    for _, name, form, conversion in parsed:
        if name is not None and (name not in known or form or conversion):
            wrong = f"{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}"
            raise ValueError(
                f"{source} has the placeholder {{{wrong}}}{suggest(name, known) or '.'} Known: "
                f"{', '.join(known)}; a brace that is meant is doubled: {{{{ or }}}}"
            )
