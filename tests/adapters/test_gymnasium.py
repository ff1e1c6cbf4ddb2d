"""Gymnasium's environments as text, with the real package."""

import pytest

from empg_envs import ENVS, make_env
from empg_jax.config import load_config
from empg_jax.rollout.episode import Attempt
from empg_jax.run import assembly, sampling
from tests.adapters.needs import need
from tests.rollout.scripted import Speaker, run

need("gymnasium")

GUESS, DIAL = "tests.adapters.games:Guess-v0", "tests.adapters.games:Dial-v0"
LAKE = {"id": "FrozenLake-v1", "describe": "render", "actions": ["Left", "down", "right", "up"]}


def play(env, *actions, index=0):
    replies = [env.reset(split="train", index=index)]
    replies += [env.step(action) for action in actions]
    return replies


def test_text_in_and_out():
    env = make_env("gymnasium", id=GUESS)
    (opening, info), wrong, nonsense, end = play(env, "no", "N\u00d6!", env.reset(index=0)[0][-3:])
    assert opening.startswith("say: ") and info == {"task": GUESS, "won": False}
    assert wrong == (opening, 0.0, False, False, info)
    assert nonsense == (f"no such action\n{opening}", 0.0, False, False, info)
    assert end[1:4] == (1.0, True, False) and end[4]["won"]
    others = {env.reset(split=split, index=index)[0] for split in env.list_splits() for index in range(5)}
    assert len(others) == 15


def test_named_actions_and_a_description_of_the_user():
    options = {"id": DIAL, "describe": "tests.adapters.games:describe", "actions": ["Down", "up"]}
    env = make_env("gymnasium", **options)
    (opening, info), *steps = play(env, " DOWN ", "up", "sideways")
    start = int(opening.removeprefix("the dial shows "))
    assert info["admissible"] == ["down", "up"]
    assert [reply[0] for reply in steps[:2]] == [f"the dial shows {n}" for n in (start - 1, start)]
    assert steps[2][0] == f"no such action\nthe dial shows {start}"
    *_, end = play(env, *["down"] * (start - 3))
    assert end[2] and end[4]["won"]
    *_, end = play(env, *["up"] * (9 - start))
    assert end[3] and not end[4]["won"]
    *_, end = play(make_env("gymnasium", **options, win_return=2), *["up"] * (9 - start))
    assert end[4]["won"] == (9 - start >= 2)
    for limit, won in ((2, True), (1, False)):  # our own limit ends an episode, too
        *_, end = play(make_env("gymnasium", **options, win_return=2, max_turns=limit), *["up"] * limit)
        assert end[3] and end[4]["won"] is won


@pytest.mark.parametrize(("win_return", "won"), [(2, True), (3, False)])
def test_the_limit_of_a_run_ends_an_episode_that_may_be_won(win_return, won):
    options = {"id": DIAL, "describe": "tests.adapters.games:describe", "win_return": win_return}
    overrides = [f"env.options.{name}={value}" for name, value in options.items()]
    limits = ["workers.num=1", "workers.step_timeout=60", "workers.reset_timeout=60", "env.max_turns=2"]
    config = load_config("quickstart", ["env.name=gymnasium", "sft.updates=0", *overrides, *limits])
    language = assembly.make_language(config)
    with sampling.make_pool(config) as pool:
        collector = sampling.make_collector(
            config, Speaker(language.tokenizer.encode("2")), pool, language, stream=0
        )
        (trajectory,) = run(collector, [Attempt("train", 0, 0, 0)]).values()
    assert trajectory.truncated and trajectory.episode_return == 2.0
    assert trajectory.is_success is won


def test_an_invalid_action_at_the_end_leaves_the_verdict():
    env = make_env("gymnasium", id=DIAL, describe="tests.adapters.games:describe", win_return=1, max_turns=2)
    *_, end = play(env, "2", "sideways")
    assert end[3] and end[4]["won"]


def test_numbers_are_names_where_there_are_none():
    env = make_env("gymnasium", id=DIAL, describe="tests.adapters.games:describe")
    assert env.reset(index=0)[1]["admissible"] == ["1", "2"]


def test_pictures_in_characters_have_no_colors():
    env = make_env("gymnasium", **LAKE, kwargs={"is_slippery": False})
    (opening, _), *_, end = play(env, "down", "down", "right", "right", "down", "right")
    assert opening == "<S>FFF\nFHFH\nFFFH\nHFFG"
    assert end[0].endswith("HFF<G>") and end[1:3] == (1.0, True) and end[4]["won"]


def test_impossible_actions_are_not_offered():
    env = make_env("gymnasium", id="Taxi-v4", describe="render", actions=list("senwpd"))
    offered = env.reset(index=0)[1]["admissible"]
    assert offered and len(offered) < 6
    assert env.step("nonsense")[4]["admissible"] == offered


def test_an_episode_ends_with_its_turns():
    env = make_env("gymnasium", id=GUESS, max_turns=2)
    *_, end = play(env, "\x00", "no")
    assert end[2:4] == (False, True)
    with pytest.raises(RuntimeError, match="has ended: call reset"):
        env.step("no")


def test_prompts_list_the_actions():
    env, prompts = make_env("gymnasium", **LAKE), ENVS["gymnasium"].prompts(instructions="Walk.")
    observation, info = env.reset(index=0)
    (message,) = prompts.start(observation, info)
    assert message["content"] == f"Walk.\n\n{observation}\nActions: down, left, right, up"
    assert "Actions" not in ENVS["gymnasium"].prompts(list_actions=False).follow(observation, info)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "env.options.id names no environment; for example"),
        ({"id": "FrozenLak-v1"}, "gymnasium cannot make 'FrozenLak-v1': .*Did you mean: `FrozenLake`"),
        ({"id": "nowhere:X-v0"}, "gymnasium cannot make 'nowhere:X-v0': No module named 'nowhere'"),
        ({"id": "FrozenLake-v1", "kwargs": {"sizes": 3}}, "cannot make 'FrozenLake-v1': .*sizes"),
        ({"id": "FrozenLake-v1"}, r"observations of FrozenLake-v1 are Discrete\(16\), no text: give env.opt"),
        (
            {"id": "MountainCarContinuous-v0", "describe": "builtins:str"},
            "are Box.*expected Text, or Discrete",
        ),
        ({**LAKE, "actions": ["a", "b"]}, "FrozenLake-v1 has 4 actions, each with a name of its own"),
        ({**LAKE, "actions": ["a", "A", "b", "c"]}, "has 4 actions, each with a name of its own"),
        (
            {**LAKE, "describe": "tests.adapters.games:tell"},
            "describe=tests.adapters.games:tell: .*expected pac",
        ),
        ({**LAKE, "tasks": 0}, "train must have 1 to"),
        ({**LAKE, "max_turns": 0}, "max_turns must be at least 1"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("gymnasium", **options)
