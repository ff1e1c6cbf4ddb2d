"""Tool servers of the Model Context Protocol, with a stand-in that speaks the real wire."""

import json
import os
import time
from pathlib import Path

import pytest

from empg_envs import ENVS, make_env
from empg_envs.base import EnvFault
from empg_envs.parsers import ask_for
from empg_jax.config import load_config
from empg_jax.rollout.episode import Attempt
from empg_jax.run import assembly, sampling
from empg_jax.workers.pool import PoolTimeouts
from tests import runs
from tests.processes import is_running
from tests.rollout.scripted import Speaker, run
from tests.serve.servers import wait_until
from tests.text.hub import need_tokenizer
from tests.workers.pools import act, open_named, reset_all

SERVER = Path(__file__).with_name("mcp_server.py")


def score(task, answer, calls):
    return {"reward": 0.5 * (answer == task["word"]), "success": True, "metrics": {"found": len(calls)}}


@pytest.fixture
def options():
    return {
        "command": f"python {SERVER}",
        "tasks": str(SERVER.with_name("drawers.jsonl")),
        "setup_tool": "prepare",
        "reward_tool": "judge",
        "call_timeout": 60,
        "start_timeout": 60,
    }


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def test_calls_an_answer_and_the_reward_of_a_tool(options):
    env = make_env("mcp", **options)
    observation, info = env.reset(split="train", index=3)
    assert observation == "Which word is in drawer 3?" and not info["won"]
    (tool,) = info["tools"]  # what is for us is not for the policy
    assert tool["function"]["name"] == "find" and "drawer" in tool["function"]["parameters"]["properties"]
    assert env.step(call("find", drawer=9))[:4] == ("empty", 0.0, False, False)
    assert env.step(call("find"))[0] == "error: missing 'drawer'"
    assert env.step(call("find", drawer="odd"))[0] == "error: drawer: expected a number"
    # A policy could rid itself of a lost episode by a call that fails.
    assert env.step(call("find", drawer="stuck"))[:4] == ("error: the drawer is stuck", 0.0, False, False)
    assert env.step(call("fnd"))[0] == "error: there is no tool 'fnd'; did you mean 'find'?"
    assert env.step(call("judge", answer="w3"))[0].startswith("error: there is no tool 'judge'")
    assert env.step("<tool_call>{</tool_call>")[:3] == ("error: that is no well-formed call", 0.0, False)
    assert env.step(call("find", drawer=3))[0] == "the word is w3"
    observation, reward, terminated, truncated, info = env.step(" w3\n")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["won"] and info["metrics"] == {"calls": 7.0}
    env.reset(split="test", index=1)
    assert env.step("w3")[1:3] == (0.0, True)
    env.close()


def test_a_scorer_in_its_place_and_the_end_of_turns(options):
    options |= {"reward_tool": None, "scorer": "tests.adapters.test_mcp:score", "max_turns": 2}
    env = make_env("mcp", **options)
    assert len(env.reset(split="train", index=0)[1]["tools"]) == 2
    env.step(call("find", drawer=0))
    _, reward, terminated, truncated, info = env.step(call("find", drawer=0))
    assert (reward, terminated, truncated) == (0.0, False, True) and info["metrics"]["found"] == 2.0
    env.reset(split="train", index=0)
    assert env.step("w0")[1:3] == (0.5, True)
    env.reset(split="train", index=0)
    env.step(call("find", drawer=0))
    assert env.step("<tool_call>{</tool_call>")[1:4] == (0.0, False, True)
    env.close()


@pytest.mark.parametrize(
    ("trouble", "reason", "message"),
    [
        ("prepare", "mcp_timeout", r"no answer to tools/call in 1 s"),
        ("judge", "mcp_timeout", r"no answer to tools/call in 1 s"),
        ("crash", "mcp_crashed", r"the server ended at tools/call; python .*said: broken drawer"),
        ("refuse", "mcp_error", r"tools/list: .*no tools today"),
        ("prepare-fails", "mcp_error", r"setup_tool=prepare: the drawer is stuck"),
        ("judge-fails", "mcp_error", r"reward_tool=judge: the drawer is stuck"),
        ("no_reward", "mcp_no_reward", r"no finite reward from the reward_tool=judge: None"),
    ],
)
def test_faults_have_names(options, trouble, reason, message):
    options |= {"command": f"python {SERVER} {trouble}", "call_timeout": 1 if reason == "mcp_timeout" else 60}
    env = make_env("mcp", **options)
    with pytest.raises(EnvFault, match=message) as caught:
        env.reset(split="train", index=0)
        env.step("w0" if trouble in ("no_reward", "judge", "judge-fails") else call("find", drawer=0))
    assert caught.value.reason == reason
    env.close()


def test_a_slow_call_of_the_policys_is_no_fault(options):
    """It would have a lost episode discarded."""
    env = make_env("mcp", **{**options, "command": f"python {SERVER} hang", "call_timeout": 1})
    env.reset(split="train", index=0)
    assert env.step(call("find", drawer=0))[:4] == ("error: no answer in 1 s", 0.0, False, False)
    assert env.step("w0")[1:4] == (0.0, True, False)  # the judge has to wait for it
    env.close()


def test_a_slow_call_at_the_end_of_turns_costs_no_worker(options):
    """Call and reward are one step, which took twice ``call_timeout``: the pool ended the worker."""
    options |= {"command": f"python {SERVER} hang", "max_turns": 1, "call_timeout": 2}
    with open_named("mcp", options=options, timeouts=PoolTimeouts(start=60, reset=60, step=3.2)) as pool:
        reset_all(pool, [0, 1])
        slow = act(pool, {0: call("find", drawer=0)})[0]
        assert (slow.failure, slow.reward, slow.terminated, slow.truncated) == (None, 0.0, False, True)
        assert act(pool, {1: "w1"})[1].reward == 1.0  # its neighbour in the worker


def test_half_a_character_is_no_character(options):
    env = make_env("mcp", **options)
    env.reset(split="train", index=0)
    assert env.step(call("fnd\ud83d"))[0].startswith("error: there is no tool 'fnd?'")
    assert env.step(call("find", drawer="\ud83d"))[0] == "empty"
    env.close()


def test_the_end_takes_what_the_server_started(options):
    env = make_env("mcp", **{**options, "command": f"python {SERVER} helper"})
    env.reset(split="train", index=0)
    pid = int(env.step(call("find", drawer=0))[0])
    assert is_running(pid)
    env.close()
    wait_until(lambda: not is_running(pid))


def test_a_server_that_cannot_be_started(options):
    with pytest.raises(EnvFault, match="no-such-program cannot be started"):
        make_env("mcp", **{**options, "command": "no-such-program"}).reset(split="train", index=0)
    env = make_env("mcp", **{**options, "setup_tool": "prepair"})
    with pytest.raises(EnvFault, match="setup_tool=prepair: the server has find, prepare, judge"):
        env.reset(split="train", index=0)


def test_servers_end_with_their_episodes(options):
    def servers():
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) != os.getpid():
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if mark.encode() in words:
                    found.append(folder.name)
        return found

    mark = f"mark-{time.monotonic_ns()}"
    env = make_env("mcp", **{**options, "command": f"python {SERVER} {mark}"})
    for _ in range(2):
        env.reset(split="train", index=0)
        assert len(servers()) == 1
    env.step("w0")
    assert not servers()
    env.reset(split="train", index=0)
    env.close()
    assert not servers()


def test_the_policy_reads_the_tools_and_its_call_arrives(options):
    """From the configuration to the server and back, through a worker."""
    overrides = [f"env.options.{key}={json.dumps(value)}" for key, value in options.items()]
    limits = ["workers.num=1", "workers.step_timeout=150", "workers.reset_timeout=150", "env.max_turns=2"]
    config = load_config("quickstart", ["env.name=mcp", "sft.updates=0", *overrides, *limits])
    language = assembly.make_language(config)
    said = '<think>drawer 0</think><tool_call>{"name": "find", "arguments": {"drawer": 0}}</tool_call>'
    with sampling.make_pool(config) as pool:
        engine = Speaker(language.tokenizer.encode(said))
        collector = sampling.make_collector(config, engine, pool, language, stream=0)
        (trajectory,) = run(collector, [Attempt("train", 0, 0, 0)]).values()
    first, second = trajectory.turns
    assert first.is_valid and second.observation == "the word is w0"
    prompt = language.tokenizer.decode(engine.prompts[0])
    assert prompt.count('{"name": "find", "description": "find it"') == 1
    assert "Which word is in drawer 0?" in prompt


@pytest.mark.parametrize(
    "model",
    [
        f"model.chat_template={runs.ROOT / 'scripts' / 'examples' / 'tools.jinja'}",
        pytest.param("qwen3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("history_mode", ["template", "append"])
def test_the_models_own_template_tells_the_tools_and_the_results(options, model, history_mode):
    """Where the template has a place for tools, they stand there and nowhere else."""
    is_real = model == "qwen3"
    overrides = [f"env.options.{key}={json.dumps(value)}" for key, value in options.items()]
    overrides += [f"model.tokenizer={need_tokenizer(model)}" if is_real else model]
    limits = ["workers.num=1", "workers.step_timeout=150", "workers.reset_timeout=150", "env.max_turns=2"]
    overrides += [f"env.history_mode={history_mode}"]
    config = load_config("quickstart", ["env.name=mcp", "sft.updates=0", *overrides, *limits])
    language = assembly.make_language(config)
    said = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "find", "arguments": {"drawer": 0}}\n</tool_call>'
    with sampling.make_pool(config) as pool:
        engine = Speaker([*language.tokenizer.encode(said), language.renderer.end_id])
        collector = sampling.make_collector(config, engine, pool, language, stream=0)
        (trajectory,) = run(collector, [Attempt("train", 0, 0, 0)]).values()
    assert [turn.is_valid for turn in trajectory.turns] == [True, True]
    assert trajectory.turns[1].observation == "the word is w0"
    first, second = (language.tokenizer.decode(prompt, skip_special=False) for prompt in engine.prompts)
    declared = '{"type": "function", "function": {"name": "find", "description": "find it"'
    assert first.count(declared) == 1 and "You have these tools" not in first
    assert first.index(declared) < first.index("Which word is in drawer 0?")
    result = (
        "<tool_response>\nthe word is w0\n</tool_response>" if is_real else "<tool_response>the word is w0"
    )
    assert result in second and "find" not in second  # an answer's end, the result, the next prompt


def test_prompts_and_parser():
    prompts, parser = (
        ENVS["mcp"].prompts(instructions="Be brief."),
        ENVS["mcp"].parser(instructions="Be brief."),
    )
    info = {"task": "Which word?", "tools": [{"function": {"name": "find"}}]}
    (message,) = prompts.window([("empty", call("find", drawer=1))], "empty", info, 2)
    for part in (
        "A response without a call is your answer",
        "Be brief.\n\nWhich word?",
        "Observation 2: 'empty'",
        "The last result: empty",
    ):
        assert part in message["content"]
    (asked,) = ask_for("tool_call", prompts).start("Which word?", info)  # with env.parser=tool_call
    assert "Be brief." in asked["content"] and '"act"' not in asked["content"]
    assert parser("w3", info).is_valid and not parser("", info).is_valid
    assert not parser("<tool_call>{</tool_call>", info).is_valid
    other = parser('<tool_call>{"name": "drop", "arguments": {}}</tool_call>', info)
    assert other.is_valid and json.loads(other.action)["name"] == "drop"  # the environment says what there is
    parsed = parser('<tool_call>{"name": "find", "arguments": {"action": "x"}}</tool_call>', info)
    assert json.loads(parsed.action) == {"name": "find", "arguments": {"action": "x"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": ""}, r'env.options.command="python server.py" is missing'),
        ({"tasks": ""}, "env.options.tasks=FILE.jsonl is missing"),
        ({"tasks": "nowhere.jsonl"}, "tasks=nowhere.jsonl: "),
        ({"reward_tool": None}, "give one of env.options.reward_tool and env.options.scorer"),
        (
            {"scorer": "tests.adapters.test_mcp:score"},
            "give one of env.options.reward_tool and env.options.scorer",
        ),
        (
            {"reward_tool": None, "scorer": "nowhere:f"},
            "scorer=nowhere:f: .*expected package.module:function",
        ),
    ],
)
def test_what_cannot_be_is_told(options, change, message):
    with pytest.raises(ValueError, match=message):
        make_env("mcp", **(options | change))


def test_tasks_without_a_prompt_are_told(options, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a"}\n{"word": "b"}\n')
    with pytest.raises(ValueError, match='task 1 of train has no "prompt"'):
        make_env("mcp", **{**options, "tasks": str(tmp_path / "odd.jsonl")})
