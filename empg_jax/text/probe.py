"""The probe at a run's start: does a conversation of three turns stay one row, and if not, why?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from empg_jax.text.chat import ChatRenderer
from empg_jax.text.template import Message

TURNS = 3
_SHOWN = 40  # characters of a text in the report


@dataclasses.dataclass(frozen=True)
class Rewriting:
    """The first place where a template prints a conversation in another way than it was sampled.

    Attributes:
      kind: what the answers were like, in words; empty for plain ones.
      turn: number of the turn whose prompt does not go on with the tokens before it.
      line: line of the template that prints what differs; None where the text before it just ends there.
      was: beginning of the text as the policy has read and written it.
      became: beginning of the text in its place.
      rows: rows of the three turns.
    """

    kind: str
    turn: int
    line: int | None
    was: str
    became: str
    rows: int

    def describe(self) -> str:
        """Say in a clause what happens."""
        where = "the chat template" if self.line is None else f"line {self.line} of the chat template"
        return (
            f"at turn {self.turn}{' ' * bool(self.kind)}{self.kind} {where} prints {self.became!r} where the "
            f"policy had {self.was!r}"
        )


def find_rewriting(renderer: ChatRenderer) -> Rewriting | None:
    """Play three turns and find where the template itself would begin a new row; None where it does not."""
    for kind, said in _kinds(renderer).items():
        found = _play(renderer, kind, [said.format(turn, turn) for turn in range(1, TURNS + 1)])
        if found is not None:
            return found
    return None


def describe_rows(renderer: ChatRenderer) -> str:
    """Say in a line how many rows an episode of a growing transcript has, and why."""
    found = find_rewriting(renderer)
    if found is None:
        return "rows per episode: 1"
    if renderer.history == "append":
        return f"rows per episode: 1 (env.history_mode=append; with template {found.rows} in {TURNS} turns)"
    return (
        f"rows per episode: {found.rows} in {TURNS} turns, because {found.describe()}; "
        "env.history_mode=append keeps answers as sampled: rows per episode: 1"
    )


def _kinds(renderer: ChatRenderer) -> dict[str, str]:
    """Return what a policy may say: an answer alone, or with a thought, as the prompt leaves it to say."""
    plain, thought = "answer {}", "reason {}\n</think>\n\nanswer {}"
    if renderer.opens_thought:
        return {"": thought}
    if renderer.render([{"role": "user", "content": "question"}]).rstrip().endswith("</think>"):
        return {"": plain}
    return {"": plain, "with a thought": f"<think>\n{thought}"}


def _play(renderer: ChatRenderer, kind: str, answers: Sequence[str]) -> Rewriting | None:
    messages: list[Message] = [{"role": "user", "content": "question 1"}]
    first, rows = None, 1
    for turn, answer in enumerate(answers[:-1], start=2):
        before = renderer.render(messages) + renderer.lead + answer
        messages += [
            {"role": "assistant", "content": renderer.lead + answer},
            {"role": "user", "content": f"question {turn}"},
        ]
        after = renderer.render(messages)
        if after.startswith(before):
            continue
        rows += 1
        if first is None:
            place = _first_difference(before, after)
            line = _line_at(renderer, messages, place)
            first = (turn, line, before[place : place + _SHOWN], after[place : place + _SHOWN])
    return None if first is None else Rewriting(kind, *first, rows)


def _first_difference(before: str, after: str) -> int:
    for place, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            return place
    return min(len(before), len(after))


def _line_at(renderer: ChatRenderer, messages: Sequence[Message], place: int) -> int | None:
    """Return the line of the template that prints the character at a place of a conversation's text."""
    end = 0
    for piece, line in renderer.trace(messages):
        end += len(piece)
        if end > place:
            return line
    return None
