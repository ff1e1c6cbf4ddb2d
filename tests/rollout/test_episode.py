"""The rules of one episode, without environment or engine."""

import numpy as np
import pytest

from empg_envs import ParsedAction
from empg_envs.parsers import make_parser
from empg_jax.engine.engine import Response
from empg_jax.errors import RunError
from empg_jax.rollout.context import PromptDelta
from empg_jax.rollout.episode import Attempt, Episode, EpisodeRules, anchor_of
from empg_jax.types import Status, Trajectory

ATTEMPT = Attempt("train", task=7, group_id=3, member=1)


class Context:
    """Prompts are numbered; remembers what it was told."""

    def __init__(self):
        self.told = []

    def start(self, observation, info):
        self.told.append((observation, info))
        return PromptDelta([1], True)

    def follow(self, *told):
        self.told.append(told)
        return PromptDelta([2], False)


def parse(text, info):
    return ParsedAction(text.upper(), info.get("fine", True))


def make_episode(**rules):
    context = Context()
    return Episode(ATTEMPT, context, parse, EpisodeRules(**{"max_turns": 3} | rules)), context


def respond(episode, text="go", version=0, finish_reason="stop", prompt=(1,)):
    tokens = np.asarray([5, 6], np.int32)
    numbers = np.asarray([-0.5, -0.25], np.float32)
    prompt = np.asarray(prompt, np.int32)
    versions = np.asarray(np.broadcast_to(version, 2), np.int32)
    response = Response(0, prompt, tokens, numbers, -numbers, versions, finish_reason)
    return episode.on_response(response, text)


def begin(info=None, **rules):
    episode, context = make_episode(**rules)
    assert episode.on_reset("a room", info or {}).is_fresh
    return episode, context


def test_a_state_may_be_told_beside_the_observation():
    def play(**rules):
        episode, _ = make_episode(**rules)
        episode.on_reset("a room", {"state": "s0"})
        respond(episode)
        episode.on_step("a room", 0.0, False, False, {"state": "s1"})
        respond(episode)
        found = episode.on_step("a hall", 1.0, True, False, {"state": "s2"})
        return [*(turn.anchor for turn in found.turns), found.last_anchor]

    assert play() == list(map(anchor_of, ("a room", "a room", "a hall")))
    assert play(anchor="state") == list(map(anchor_of, ("s0", "s1", "s2")))
    episode, _ = make_episode(anchor="state")
    episode.on_reset("a room", {})
    respond(episode)
    with pytest.raises(
        RunError, match=r'env\.anchor=state, but the environment tells no text as info\["state"\]'
    ):
        episode.on_step("a hall", 0.0, False, False, {})


def test_half_a_character_in_an_action_is_none():
    """JSON can escape it; files, tokenizers and servers refuse it."""
    for name in ("json", "tool_call"):
        parser = make_parser(name)
        episode = Episode(ATTEMPT, Context(), parser, EpisodeRules(max_turns=1))
        episode.on_reset("a room", {})
        said = '{"action": "go \\ud83d"}'
        said = said if name == "json" else f'<tool_call>{{"name": "act", "arguments": {said}}}</tool_call>'
        assert respond(episode, said) == "go ?"
        (turn,) = episode.on_step("the end", 1.0, True, False, {}).turns
        assert turn.action == "go ?" and turn.response == said


def test_an_episode_from_reset_to_victory():
    episode, context = begin()
    assert respond(episode, "go", version=4) == "GO"
    assert isinstance(episode.on_step("a hall", 0.0, False, False, {"n": 1}), PromptDelta)
    respond(episode, "win", version=5, finish_reason="length", prompt=(1, 5, 6, 2))
    found = episode.on_step("the end", 1.0, True, False, {"won": True, "metrics": {"score": 3}})
    assert isinstance(found, Trajectory)
    assert (found.task, found.split, found.group_id, found.member) == (7, "train", 3, 1)
    assert (found.outcome.status, found.outcome.reason) == (Status.TRAINED, "won")
    assert found.is_success and found.terminated and not found.truncated
    assert found.episode_return == 1.0 and found.metrics == {"score": 3.0}
    assert found.oldest_version == 4 and found.num_tokens == 4
    first, second = found.turns
    # A turn holds the observation that it answers, not the one that it caused.
    assert (first.observation, first.response, first.reward) == ("a room", "go", 0.0)
    assert (second.observation, second.reward, second.finish_reason) == ("a hall", 1.0, "length")
    assert second.prompt_tokens.tolist() == [1, 5, 6, 2] and first.anchor != second.anchor
    assert first.prompt_tokens.tolist() == [1] and first.prompt_tokens.base is second.prompt_tokens
    assert found.last_observation == "the end" and found.last_anchor == anchor_of("the end")
    # The context is told the sampled ids, whether the turn was ended, and the action that was made of them.
    assert context.told[1] == ([5, 6], "go", True, "GO", "a hall", {"n": 1})


@pytest.mark.parametrize(
    ("flags", "info", "reason", "terminated"),
    [((True, False), {}, "ended", True), ((False, True), {}, "turn_limit", False)],
)
def test_ends_that_the_environment_names(flags, info, reason, terminated):
    episode, _ = begin()
    respond(episode)
    found = episode.on_step("x", 0.0, *flags, info)
    assert (found.outcome.reason, found.terminated, found.truncated) == (reason, terminated, not terminated)
    assert found.outcome.status is Status.TRAINED and not found.is_success


@pytest.mark.parametrize(
    ("info", "group"),
    [
        ({}, ""),
        ({"group": None}, ""),
        ({"group": "2 hops"}, "2 hops"),
    ],
)
def test_the_group_is_the_environments_however_the_episode_ends(info, group):
    episode, _ = make_episode()
    episode.on_reset("a room", info)
    respond(episode)
    assert episode.on_context_limit().group == group
    episode, _ = make_episode()
    episode.on_reset("a room", info)
    respond(episode)
    assert episode.on_step("the end", 1.0, True, False, {"won": True, **info}).group == group


def test_the_turn_limit_truncates():
    episode, _ = begin(max_turns=2)
    respond(episode)
    episode.on_step("x", 0.5, False, False, {})
    respond(episode)
    found = episode.on_step("x", 0.25, False, False, {})
    assert found.outcome.reason == "turn_limit" and found.truncated and not found.terminated
    assert found.episode_return == 0.75 and len(found.turns) == 2


def test_an_invalid_response_is_marked_and_its_reward_is_the_environments_own():
    episode, _ = begin()
    respond(episode)
    episode.on_step("x", 0.0, False, False, {"fine": False})
    respond(episode)
    found = episode.on_step("y", 1.0, True, False, {"won": True})
    assert [turn.is_valid for turn in found.turns] == [True, False]
    assert [turn.reward for turn in found.turns] == [0.0, 1.0]
    assert found.episode_return == 1.0


def test_a_full_context_is_scored_zero_by_name():
    episode, _ = begin()
    respond(episode)
    episode.on_step("x", 5.0, False, False, {})
    found = episode.on_context_limit()
    assert (found.outcome.status, found.outcome.reason) == (Status.SCORED_ZERO, "context_limit")
    assert found.outcome.is_trained and len(found.turns) == 1
    assert found.last_anchor == anchor_of("x")  # seen, but never answered
    assert found.episode_return == 5.0  # what was paid; what it is worth is the algorithm's business


@pytest.mark.parametrize("reason", ["env_error", "worker_died", "timeout"])
def test_a_failure_is_never_learned_from(reason):
    episode, _ = begin()
    respond(episode)
    found = episode.on_failure(reason, "why")
    assert found.outcome.status is Status.DISCARDED and not found.outcome.is_trained
    assert (found.outcome.reason, found.outcome.detail) == (reason, "why")


def test_an_overrun_may_be_scored_zero_if_there_is_a_turn():
    for turns, reason, status in [
        (0, "timeout", Status.DISCARDED),
        (1, "timeout", Status.SCORED_ZERO),
        (1, "env_error", Status.DISCARDED),
    ]:
        episode, _ = begin(timeout_outcome="zero")
        for _ in range(turns):
            respond(episode)
            episode.on_step("x", 1.0, False, False, {})
        found = episode.on_failure(reason, "")
        assert found.outcome.status is status and found.episode_return == float(turns)


def test_an_overrun_by_the_first_action_is_scored_zero_too():
    episode, _ = begin(timeout_outcome="zero")
    respond(episode)  # the environment is at it, and does not answer in time
    found = episode.on_failure("timeout", "longer than 10 s")
    assert (found.outcome.status, found.outcome.reason) == (Status.SCORED_ZERO, "timeout")
    assert [turn.reward for turn in found.turns] == [0.0] and found.num_tokens > 0
    assert found.last_anchor is None


def test_an_environment_may_name_an_outcome_of_its_own():
    episode, _ = begin()
    respond(episode)
    info = {"outcome": "suspect", "detail": "a canary passed", "metrics": {"suspect": 1.0}}
    found = episode.on_step("x", 0.0, True, False, info)
    assert (found.outcome.status, found.outcome.reason) == (Status.TRAINED, "suspect")
    assert found.outcome.detail == "a canary passed" and found.metrics == {"suspect": 1.0}
    assert not found.is_success and found.terminated


def test_equal_observations_have_equal_anchors():
    def anchors(*observations):
        episode, _ = begin(max_turns=9)
        for observation in observations:
            respond(episode)
            episode.on_step(observation, 0.0, False, False, {})
        return [turn.anchor for turn in episode.on_context_limit().turns]

    first, second, third, fourth = anchors("a hall", "a room", "a hall", "")
    assert first == third != second == fourth
    assert anchors("x")[0] == first  # a function of the text alone


def test_a_response_that_two_versions_sampled_is_as_old_as_the_older_one():
    episode, _ = begin()
    respond(episode, version=(3, 4))
    episode.on_step("a hall", 0.0, False, False, {})
    respond(episode, "win", version=5)
    turns = episode.on_step("won", 1.0, True, False, {"won": True}).turns
    assert [turn.version for turn in turns] == [3, 5]
    assert turns[0].versions.tolist() == [3, 4] and turns[1].versions is None


def test_an_episode_keeps_the_known_answer_that_its_first_info_tells():
    episode, _ = begin(info={"known_answer": ["<answer>", "7"]})
    respond(episode, "take it")
    assert episode.on_step("the end", 0.0, True, False, {}).answer == ("<answer>", "7")
    episode, _ = begin()
    respond(episode, "take it")
    assert episode.on_step("the end", 0.0, True, False, {"known_answer": ["", "8"]}).answer is None


def test_a_turn_holds_the_executed_action_and_whether_it_reached_a_milestone():
    episode, _ = begin()
    respond(episode, "take it")
    episode.on_step("a hall", 0.0, False, False, {"milestone": True})
    respond(episode, "")
    found = episode.on_step("the end", 0.0, True, False, {"won": True})
    assert [(turn.action, turn.milestone) for turn in found.turns] == [("TAKE IT", True), ("", False)]
