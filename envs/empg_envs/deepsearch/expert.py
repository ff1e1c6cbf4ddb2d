"""An expert that follows the links of an embedded world and uses only the texts shown to the agent.

It has no internal plan. Its next call is a function of the question and of the texts shown so far, so that it
continues correctly from every state, even after the actions of another policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from empg_envs.deepsearch.passages import Passage
from empg_envs.deepsearch.sources import Task
from empg_envs.deepsearch.tags import ANSWER, SEARCH, Call
from empg_envs.deepsearch.texts import Texts

# From a passage whose beginning is shown to the call that shows more of it.
ReadOn = Callable[[Passage], Call]


def choose_call(task: Task, shown: Mapping[str, str], texts: Texts, read_on: ReadOn) -> Call:
    """Return the next call of the expert.

    Args:
      task: an embedded task.
      shown: passage id -> the shown part of its text.
      texts: the style of the texts.
      read_on: the call that shows more of a passage.

    Returns:
      The answer if all links are known. Otherwise the call that leads to the first missing link: it reads on
      in a passage whose beginning is known, or searches.
    """
    puzzle = task.puzzle
    assert puzzle is not None, "only embedded questions have an expert"
    at = puzzle.start
    for relation in puzzle.relations:
        value = puzzle.pages[at][relation]
        page = next(passage for passage in task.passages if passage.title == texts.name(at))
        if texts.fact(at, relation, value) not in shown.get(page.id, ""):
            return read_on(page) if page.id in shown else Call(SEARCH, texts.name(at))
        at = value
    return Call(ANSWER, texts.name(at))


def list_calls(task: Task, shown: Mapping[str, str], read_on: ReadOn | None) -> list[Call]:
    """Return plausible calls for exploration: searches for names seen so far, and results to read on in.

    Answers are not included, because a wrong answer ends the episode.
    """
    seen = f"{task.question.text}\n" + "\n".join(shown.values())
    calls = [Call(SEARCH, passage.title) for passage in task.passages if passage.title in seen]
    if read_on is not None:
        calls += [read_on(passage) for passage in task.passages if passage.id in shown]
    return calls
