"""Made-up episodes that fill their rows, for measurements without environments."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from empg_jax.engine.engine import Engine
from empg_jax.types import Outcome, Status, Trajectory, Turn

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Form:
    """The size of the made-up episodes.

    Attributes:
      groups: groups of an update.
      members: episodes of a group.
      turns: turns of an episode.
      prompt: new prompt tokens of a turn.
      response: sampled tokens of a turn.
      is_window: every turn has a row of its own, with a fresh prompt.
    """

    groups: int
    members: int
    turns: int
    prompt: int
    response: int
    is_window: bool

    @property
    def episodes(self) -> int:
        """Episodes of an update."""
        return self.groups * self.members


def choose_form(config: Config) -> Form:
    """Choose episodes that fill a row: ``env.max_turns`` turns that share ``rollout.max_tokens`` alike.

    A response takes as much of its turn as ``rollout.max_response_tokens`` allows, but half at most.
    """
    r, is_window = config.rollout, config.env.context == "window"
    turns = config.env.max_turns if is_window else min(config.env.max_turns, r.max_tokens // 2)
    share = r.max_tokens if is_window else r.max_tokens // turns
    response = min(r.max_response_tokens, share // 2)
    return Form(r.tasks_per_update, r.group_size, turns, share - response, response, is_window)


def make_prompt(form: Form, vocab: int, group: int, member: int, turn: int) -> np.ndarray:
    """Make up a turn's prompt, int32[P]; the first one is common to a group."""
    key = (group, turn) if turn == 0 else (group, turn, member)
    return np.random.default_rng(key).integers(0, vocab, form.prompt, dtype=np.int32)


def play(engine: Engine, form: Form, answer_logprob: float | None = None) -> list[Trajectory]:
    """Sample all episodes, as many at a time as there are slots; environments would answer at once.

    Args:
      engine: an engine with weights.
      form: size of the episodes.
      answer_logprob: what every turn tells of its known answer, for algorithms that use it.

    Returns:
      The episodes in order; every second one of a group is won.
    """
    turns: list[list[Turn]] = [[] for _ in range(form.episodes)]
    waiting, playing = iter(range(form.episodes)), dict[int, int]()

    def ask(slot: int) -> None:
        group, member = divmod(playing[slot], form.members)
        number = len(turns[playing[slot]])
        tokens = make_prompt(form, engine.model.vocab_size, group, member, number)
        is_fresh = form.is_window or number == 0
        ids = (0, group, member, number)
        engine.submit(slot, tokens, is_fresh=is_fresh, ids=ids, max_response=form.response)

    for slot, episode in zip(range(engine.config.slots), waiting, strict=False):
        playing[slot] = episode
        ask(slot)
    while engine.has_work:
        for response in engine.step():
            done = turns[playing[response.slot]]
            is_last = len(done) + 1 == form.turns
            is_won = is_last and playing[response.slot] % 2 == 0
            done.append(
                Turn(
                    prompt_tokens=response.prompt_tokens,
                    response_tokens=response.tokens,
                    behavior_logprobs=response.logprobs,
                    entropies=response.entropies,
                    reward=float(is_won),
                    version=int(response.versions.min()),
                    anchor=len(done),
                    is_valid=True,
                    finish_reason=response.finish_reason,
                    answer_logprob=answer_logprob,
                )
            )
            if is_last:
                engine.release(response.slot)
                following = next(waiting, None)
                if following is None:
                    continue
                playing[response.slot] = following
            ask(response.slot)
    return [_finish(form, episode, tuple(done)) for episode, done in enumerate(turns)]


def _finish(form: Form, episode: int, turns: tuple[Turn, ...]) -> Trajectory:
    group, member = divmod(episode, form.members)
    is_won = turns[-1].reward > 0
    return Trajectory(
        task=group,
        split="train",
        group_id=group,
        member=member,
        turns=turns,
        outcome=Outcome(Status.TRAINED, "won" if is_won else "turn_limit"),
        episode_return=turns[-1].reward,
        is_success=is_won,
        terminated=is_won,
        truncated=not is_won,
    )
