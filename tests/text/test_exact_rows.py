"""Whole episodes in transcript context: what the policy sampled is what is trained, row by row."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs import PlainParser, PlainPrompts
from empg_jax.engine.engine import Response
from empg_jax.learner.batching import merge_turns
from empg_jax.rollout.context import make_context
from empg_jax.rollout.episode import Attempt, Episode, EpisodeRules
from empg_jax.text import ChatRenderer
from tests.text.families import ALTERNATING, TEMPLATES, build_bpe

THOUGHT = "<think>\nlook first\n</think>\n\ngo to shelf 2"


class SystemPrompts(PlainPrompts):
    """Plain prompts behind a system message."""

    def start(self, observation, info):
        return [{"role": "system", "content": "Act."}, *super().start(observation, info)]


@functools.cache
def make_renderer(family, **options):
    return ChatRenderer(build_bpe(family), options=dict(options))


class Said:
    """One response of a scripted policy.

    Attributes:
      text: what it says.
      is_stopped: whether it also says the end of turn (otherwise a length limit cut it).
      is_spelled: whether it says the text letter by letter, as no tokenizer would.
    """

    def __init__(self, text, is_stopped=True, is_spelled=False):
        self.text, self.is_stopped, self.is_spelled = text, is_stopped, is_spelled

    def tokens(self, renderer):
        encode = renderer.tokenizer.encode
        ids = [i for letter in self.text for i in encode(letter)] if self.is_spelled else encode(self.text)
        return np.asarray([*ids, *[renderer.end_id] * self.is_stopped], np.int32)


def play(renderer, observations, said, has_system=False):
    """Plays an episode as a collector does; returns the trajectory and the whole conversation."""
    prompts = SystemPrompts() if has_system else PlainPrompts()
    context = make_context("transcript", prompts, renderer, history=0)()
    episode = Episode(Attempt("train", 0, 0, 0), context, PlainParser(), EpisodeRules(max_turns=len(said)))
    delta = episode.on_reset(observations[0], {})
    messages = prompts.start(observations[0], {})
    held = np.zeros(0, np.int32)
    for observation, response in zip(observations[1:], said, strict=True):
        prompt = np.asarray(delta.tokens, np.int32)
        prompt = prompt if delta.is_fresh else np.concatenate([held, prompt])
        tokens = response.tokens(renderer)
        held = np.concatenate([prompt, tokens])
        zeros = np.zeros(len(tokens), np.float32)
        reason = "stop" if response.is_stopped else "length"
        versions = np.zeros(len(tokens), np.int32)
        episode.on_response(Response(0, prompt, tokens, zeros, zeros, versions, reason), response.text)
        delta = episode.on_step(observation, 0.0, False, False, {})
        messages += [
            {"role": "assistant", "content": response.text},
            {"role": "user", "content": observation},
        ]
    return delta, messages[:-1]


def rows_of(trajectory):
    return [(row.tokens, row.loss_mask) for row in merge_turns(trajectory, 0)]


OBSERVATIONS = [f"You see a shelf {i}." for i in range(5)]


@pytest.mark.parametrize(
    ("family", "options", "count"),
    [
        ("chatml", {}, 1),
        ("headers", {}, 1),
        ("brackets", {}, 1),
        ("thinking", {}, 4),
        ("thinking", {"keep_thinking": True}, 1),
    ],
)
def test_rows_of_an_episode_that_thinks_aloud(family, options, count):
    """Reasoning stripped from history needs a row per turn; every other template one for all."""
    renderer = make_renderer(family, **options)
    trajectory, _ = play(renderer, OBSERVATIONS, [Said(THOUGHT)] * 4)
    rows = rows_of(trajectory)
    assert len(rows) == count
    assert sum(int(mask.sum()) for _, mask in rows) == 4 * len(Said(THOUGHT).tokens(renderer))
    for tokens, _ in rows:
        thoughts = renderer.tokenizer.decode(tokens.tolist()).count("look first")
        assert thoughts == 4 // count  # each row holds exactly the reasoning that was sampled in it


def test_a_turn_that_does_not_think_goes_on_in_the_row():
    renderer = make_renderer("thinking")
    said = [Said("go"), Said(THOUGHT), Said("go"), Said("take it")]
    trajectory, _ = play(renderer, OBSERVATIONS, said)
    assert [int(mask.sum()) for _, mask in rows_of(trajectory)] == [
        sum(len(response.tokens(renderer)) for response in part) for part in (said[:2], said[2:])
    ]


def test_an_answer_without_its_space_starts_a_new_row():
    renderer = make_renderer("spaced")
    for text, count in ((" go", 1), ("go", 4), (" go ", 4)):
        assert len(rows_of(play(renderer, OBSERVATIONS, [Said(text)] * 4)[0])) == count


TEXTS = st.sampled_from(
    ["go to shelf 2", " go", "", "\n\nlook", "open \n", THOUGHT, "x</think>y", "naïve 🍎", "<b>", "a\n\nb"]
)
# A sampler says one token at least.
SAID = st.builds(Said, TEXTS, st.booleans(), st.booleans()).filter(lambda said: said.text or said.is_stopped)


def extends(renderer, before, said, after):
    """Whether the template's longer conversation is the shorter one, the answer, its end, and more."""
    start = renderer.render(before) + said
    return renderer.render(after).startswith(start + renderer.end_token)


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    options=st.sampled_from([{}, {"keep_thinking": True}, {"enable_thinking": False}]),
    turns=st.lists(st.tuples(TEXTS, SAID), min_size=1, max_size=6),
    has_system=st.booleans(),
)
def test_every_row_is_the_templates_text_and_holds_the_sampled_ids(family, options, turns, has_system):
    renderer = make_renderer(family, **(options if family == "thinking" else {}))
    has_system = has_system and family not in ALTERNATING
    observations, said = [text for text, _ in turns] + ["end"], [response for _, response in turns]
    trajectory, messages = play(renderer, observations, said, has_system)
    rows = rows_of(trajectory)

    # Nothing that was sampled is lost, added or tokenized again.
    sampled = [response.tokens(renderer).tolist() for response in said]
    learned = np.concatenate([tokens[mask] for tokens, mask in rows]).tolist()
    assert learned == [token for tokens in sampled for token in tokens]

    # A new row starts exactly where the template rewrites what was there.
    first = 2 if has_system else 1
    ends = [first + 2 * index for index in range(len(said))]  # messages before each answer
    splits = [
        index + 1
        for index, (a, b) in enumerate(itertools.pairwise(ends))
        if not extends(renderer, messages[:a], said[index].text, messages[:b])
    ]
    assert len(rows) == 1 + len(splits)

    # Each row reads as the template writes the conversation up to its last answer.
    for (tokens, _), begin, stop in zip(rows, [0, *splits], [*splits, len(said)], strict=True):
        prompt, last = messages[: ends[stop - 1]], said[stop - 1]
        end = renderer.end_token if last.is_stopped else ""
        text = renderer.render(prompt) + last.text + end
        assert renderer.tokenizer.decode(tokens.tolist(), skip_special=False) == text
        assert tokens.tolist()[: len(tokens) - len(sampled[stop - 1])] == whole_ids(
            renderer, messages, ends[begin:stop], said[begin:stop], sampled[begin:stop]
        )


def whole_ids(renderer, messages, ends, said, sampled):
    """Ids of a row before its last answer: the text around the answers, tokenized piece by piece."""
    ids, shown = [], ""
    for stop, response, tokens in zip(ends, said, sampled, strict=True):
        text = renderer.render(messages[:stop])
        before = renderer.tokenizer.encode(text[len(shown) :])
        ids += [*before, *tokens]
        shown = text + response.text + renderer.end_token * response.is_stopped
    return ids[: len(ids) - len(sampled[-1])]


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(["chatml", "headers", "brackets", "spaced"]),
    words=st.lists(st.sampled_from(["go", "look", "a\n\nb", "naïve 🍎", "<b>"]), min_size=2, max_size=8),
    are_stopped=st.lists(st.booleans(), min_size=8, max_size=8),
)
def test_incremental_ids_are_those_of_the_whole_conversation(family, words, are_stopped):
    """Where answers are spelled as the tokenizer spells them, the row is one tokenization of one text."""
    renderer = make_renderer(family)
    lead = " " if family == "spaced" else ""
    said = [Said(lead + word, stop) for word, stop in zip(words, are_stopped, strict=False)]
    trajectory, messages = play(renderer, [*words, "end"], said)
    ((tokens, _),) = rows_of(trajectory)
    end = renderer.end_token if said[-1].is_stopped else ""
    assert tokens.tolist() == renderer.tokenizer.encode(renderer.render(messages[:-1]) + said[-1].text + end)
