"""What every environment in the table must do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import empg_envs
from empg_envs import ENVS, EnvSpec, PlainParser, PlainPrompts, TextEnv, make_env, resolve_spec
from tests.cages import has_cages, need_cages

ROOT = Path(empg_envs.__file__).resolve().parents[2]

# Options under which an environment can be built here without any outside data.
OPTIONS: dict[str, list[dict]] = {
    "alfworld": [
        {"source": "generated", "level": "tiny"},
        {"source": "generated", "level": "rooms", "release": "2.1.1"},
    ],
    "household": [
        {"level": level, "style": style} for level in ("tiny", "hard") for style in ("terse", "alfworld")
    ],
    "deepsearch": [
        {"level": "tiny", "style": "terse"},
        {"level": "hard", "style": "search_r1", "snippet_words": 8},
    ],
    "swe": [{"tools": "functions", "max_turns": 7}, {"tools": "terse", "max_turns": 7}],
    "harness": [{"command": f"python {ROOT / 'tests' / 'harness' / 'agents.py'} steady"}],
    "webshop": [{"level": "tiny"}, {"level": "standard", "style": "page"}],
}
CASES = [(name, options) for name in ENVS for options in OPTIONS.get(name, [{}])]
IDS = [f"{name}-{'-'.join(map(str, options.values()))}" for name, options in CASES]
CAGED = {"swe"}  # environments that need a sandbox
every_env = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


@pytest.fixture(autouse=True)
def cages(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("name") in CAGED:
        need_cages()


def play(env: TextEnv, split: str, index: int, actions: int) -> list[str]:
    """An episode by a fixed rule over admissible actions; every reply as canonical JSON."""
    observation, info = env.reset(seed=0, split=split, index=index)
    log = [json.dumps([observation, info], sort_keys=True)]
    for turn in range(actions):
        admissible = info.get("admissible") or ["look"]
        reply = env.step(admissible[(7 * turn + index) % len(admissible)])
        log.append(json.dumps(reply, sort_keys=True))
        info = reply[4]
        if reply[2] or reply[3]:
            break
    return log


def check_info(info: dict) -> None:
    assert json.loads(json.dumps(info)) == info
    assert isinstance(info["task"], str) and info["task"]
    assert isinstance(info["won"], bool)
    admissible = info.get("admissible", [])
    assert admissible == sorted(set(admissible))
    assert all(isinstance(value, float) for value in info.get("metrics", {}).values())


@every_env
def test_types_of_everything_that_crosses(name: str, options: dict) -> None:
    env = make_env(name, **options)
    assert isinstance(env, TextEnv)
    splits = env.list_splits()
    assert splits and all(isinstance(split, str) for split in splits)
    for split in splits:
        assert env.num_tasks(split) > 0
        task = env.get_task(split, env.num_tasks(split) - 1)
        assert json.loads(json.dumps(task)) == task and task["content_hash"]
    observation, info = env.reset(seed=1, split=splits[0], index=0)
    assert isinstance(observation, str) and observation
    check_info(info)
    observation, reward, terminated, truncated, info = env.step("look")
    assert isinstance(observation, str) and type(reward) is float
    assert type(terminated) is bool and type(truncated) is bool
    check_info(info)
    env.close()


@every_env
def test_fresh_instances_and_processes_agree_byte_for_byte(name: str, options: dict) -> None:
    here = [play(make_env(name, **options), split, 3, 12) for split in ("train", "test")]
    assert here == [play(make_env(name, **options), split, 3, 12) for split in ("train", "test")]
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[2])\n"
        "import test_conformance as t; from empg_envs import make_env\n"
        "name, options = json.loads(sys.argv[1])\n"
        "print(json.dumps([t.play(make_env(name, **options), s, 3, 12) for s in ('train', 'test')]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps([name, options]), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT / "envs")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == here


@every_env
def test_one_instance_forgets_the_episode_before(name: str, options: dict) -> None:
    env = make_env(name, **options)
    first = play(env, "train", 0, 5)
    play(env, "train", 1, 9)
    assert play(env, "train", 0, 5) == first


@every_env
def test_reset_without_an_index_is_decided_by_the_seed(name: str, options: dict) -> None:
    one, two = make_env(name, **options), make_env(name, **options)
    assert one.reset(seed=5) == two.reset(seed=5)
    following = one.reset()
    assert following == two.reset()
    drawn = {one.reset(seed=seed)[1]["task"] + one.reset()[0] for seed in range(8)}
    assert len(drawn) > 1


@every_env
def test_tasks_do_not_repeat_between_splits(name: str, options: dict) -> None:
    env = make_env(name, **options)
    hashes = {
        split: {env.get_task(split, index)["content_hash"] for index in range(min(50, env.num_tasks(split)))}
        for split in env.list_splits()
    }
    assert sum(map(len, hashes.values())) == len(set().union(*hashes.values()))


@every_env
def test_steps_out_of_order_are_refused(name: str, options: dict) -> None:
    env = make_env(name, **options)
    with pytest.raises(RuntimeError, match="reset"):
        env.step("look")
    env.reset(split="train", index=0)
    for _ in range(10_000):
        _, _, terminated, truncated, _ = env.step("look")
        if terminated or truncated:
            break
    with pytest.raises(RuntimeError, match=r"ended.*reset"):
        env.step("look")
    env.reset(split="train", index=0)
    env.step("look")


@every_env
def test_unknown_tasks_are_refused_by_name(name: str, options: dict) -> None:
    env = make_env(name, **options)
    for call in (
        env.num_tasks,
        lambda split: env.get_task(split, 0),
        lambda split: env.reset(split=split, index=0),
    ):
        with pytest.raises(ValueError, match="nowhere") as caught:
            call("nowhere")
        assert all(split in str(caught.value) for split in env.list_splits())
    count = env.num_tasks("train")
    for index in (-1, count):
        with pytest.raises(IndexError, match=str(count)):
            env.reset(split="train", index=index)


@every_env
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(st.text(max_size=60), min_size=1, max_size=6))
def test_any_text_gets_a_defined_reply(name: str, options: dict, actions: list[str]) -> None:
    env = make_env(name, **options)
    env.reset(split="train", index=0)
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        assert isinstance(observation, str) and reward == 0.0 and not terminated
        check_info(info)
        assert not truncated


@every_env
@settings(max_examples=60, deadline=None)
@given(response=st.text(max_size=80))
def test_parsers_never_raise(name: str, options: dict, response: str) -> None:
    parsed = ENVS[name].parser()(response, {"admissible": ["look"]})
    assert isinstance(parsed.action, str) and isinstance(parsed.is_valid, bool)


@every_env
def test_prompts_for_both_contexts_end_with_a_user_message(name: str, options: dict) -> None:
    env, prompts = make_env(name, **options), ENVS[name].prompts()
    observation, info = env.reset(split="train", index=0)
    for messages in (
        prompts.start(observation, info),
        prompts.window([], observation, info, 0),
        prompts.window([(observation, "look")], observation, info, 4),
    ):
        assert messages[-1]["role"] == "user"
        assert all(set(message) == {"role", "content"} for message in messages)
    assert isinstance(prompts.follow(observation, info), str)


@every_env
def test_close_twice_is_harmless(name: str, options: dict) -> None:
    env = make_env(name, **options)
    env.close()
    env.reset(split="train", index=0)
    env.close()
    env.close()


@every_env
def test_the_expert_wins(name: str, options: dict) -> None:
    env = make_env(name, **options)
    if not hasattr(env, "expert_action"):
        pytest.skip("this environment has no expert")
    for split in env.list_splits():
        env.reset(split=split, index=0)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, info = env.step(env.expert_action())
            total += reward
            done = terminated or truncated
        assert total == 1.0 and info["won"] and terminated


def test_names_and_entry_points() -> None:
    with pytest.raises(ValueError, match="unknown environment 'houshold'; did you mean 'household'"):
        make_env("houshold")
    assert resolve_spec("empg_envs.household.env:HouseholdEnv").prompts is PlainPrompts
    assert make_env("empg_envs.household.env:HouseholdEnv", level="easy").list_splits() == [
        "train",
        "valid",
        "test",
    ]
    with pytest.raises(ValueError, match="has no attribute 'HouseholdEn'; did you mean 'HouseholdEnv'"):
        resolve_spec("empg_envs.household.env:HouseholdEn")
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        resolve_spec("no_such_module:thing")
    with pytest.raises(TypeError, match=r"envs\.household\.tables:LEVELS"):
        resolve_spec("empg_envs.household.tables:LEVELS")
    with pytest.raises(TypeError, match="max_turn"):
        make_env("household", max_turn=3)
    for name, spec in ENVS.items():
        assert isinstance(spec, EnvSpec) and spec.name == name


def test_plain_prompts_and_parser() -> None:
    prompts, parser = PlainPrompts(), PlainParser()
    assert prompts.start("o", {}) == [{"role": "user", "content": "o"}]
    assert [m["content"] for m in prompts.window([("a", "b")], "o", {}, 1)] == ["a", "b", "o"]
    assert parser("\n go \nmore", {}) == empg_envs.ParsedAction("go", True)
    assert parser(" \n", {}) == empg_envs.ParsedAction("", False)


def test_environments_load_neither_jax_nor_the_trainer() -> None:
    # A program must be named.
    runnable = [name for name in ENVS if name != "harness" and (name not in CAGED or has_cages())]
    script = (
        "import sys, empg_envs\n"
        "assert 'empg_envs.household' not in sys.modules\n"
        f"for name in {runnable}: spec = empg_envs.ENVS[name]; spec.make(), spec.prompts(), spec.parser()\n"
        "print(sorted({'jax', 'numpy', 'empg_jax'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "envs")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"
