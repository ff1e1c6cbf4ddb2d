"""An expert that follows the links of an embedded world, knowing only what it has been shown.

It keeps no plan: its next call is a function of the question and of the texts on the agent's screen so far,
so it goes on correctly from any state, whoever brought it there.
"""

from __future__ import annotations

from collections.abc import Mapping

from empg_envs.deepsearch.sources import Task
from empg_envs.deepsearch.tags import ANSWER, OPEN, SEARCH, Call
from empg_envs.deepsearch.texts import Texts


def choose_call(task: Task, shown: Mapping[str, str], texts: Texts) -> Call:
    """Return the next call of the expert.

    Args:
      task: an embedded task.
      shown: passage id -> as much of its text as has been shown.
      texts: the style that the texts are written in.

    Returns:
      The answer if the chain is known to its end; else the way to the first missing link: the rest of a
      passage of which the beginning is known, or a search.
    """
    puzzle = task.puzzle
    assert puzzle is not None, "only embedded questions have an expert"
    at = puzzle.start
    for relation in puzzle.relations:
        value = puzzle.pages[at][relation]
        page = next(passage for passage in task.passages if passage.title == texts.name(at))
        if texts.fact(at, relation, value) not in shown.get(page.id, ""):
            return Call(OPEN, page.id) if page.id in shown else Call(SEARCH, texts.name(at))
        at = value
    return Call(ANSWER, texts.name(at))


def list_calls(task: Task, shown: Mapping[str, str], with_open: bool) -> list[Call]:
    """Call that a curious agent may try: searches for names seen so far, results that can be opened.

    Answers are not among them, because a wrong one ends the episode.
    """
    seen = f"{task.question.text}\n" + "\n".join(shown.values())
    calls = [Call(SEARCH, passage.title) for passage in task.passages if passage.title in seen]
    if with_open:
        calls += [Call(OPEN, key) for key in shown]
    return calls
