"""Tool servers that are written with the real `mcp` package."""

import json
from pathlib import Path

import pytest

from empg_envs import make_env
from empg_envs.base import EnvFault
from tests.adapters.needs import need

need("mcp")

SERVER = Path(__file__).with_name("mcp_package_server.py")


@pytest.fixture(scope="module")
def env():
    tasks = str(SERVER.with_name("drawers.jsonl"))
    tools = {"setup_tool": "prepare", "reward_tool": "judge"}
    env = make_env(
        "mcp", command=f"python {SERVER}", tasks=tasks, call_timeout=60, start_timeout=120, **tools
    )
    yield env
    env.close()


def call(name, **arguments):
    return json.dumps({"name": name, "arguments": arguments})


def test_an_episode_with_calls_that_fit_and_calls_that_do_not(env):
    observation, info = env.reset(split="train", index=3)
    assert observation == "Which word is in drawer 3?"
    tools = {tool["function"]["name"]: tool["function"] for tool in info["tools"]}
    assert (
        tools.keys() == {"find", "count", "words"} and tools["find"]["description"] == "Look into a drawer."
    )
    assert tools["find"]["parameters"]["properties"]["drawer"]["type"] == "integer"
    assert env.step(call("find", drawer=3))[:4] == ("the word is w3", 0.0, False, False)
    for wrong in (call("find", drawer="x"), call("find"), call("find", drawer=-1)):
        assert env.step(wrong)[0].startswith("error: Error executing tool find")
    assert json.loads(env.step(call("count"))[0]) == {"drawers": 10}
    assert env.step(call("words", drawers=[1, 3]))[0] == "empty\nthe word is w3"
    _, reward, terminated, _, info = env.step("w3")
    assert (reward, terminated, info["won"]) == (1.0, True, True)
    assert info["metrics"] == {"drawer": 3.0, "calls": 6.0}


def test_a_task_that_the_server_does_not_understand_is_a_fault(env, tmp_path):
    (tmp_path / "odd.jsonl").write_text('{"prompt": "Which?", "word": "w", "drawer": "the upper one"}\n')
    odd = make_env(
        "mcp",
        command=f"python {SERVER}",
        tasks=str(tmp_path / "odd.jsonl"),
        setup_tool="prepare",
        reward_tool="judge",
        call_timeout=60,
        start_timeout=120,
    )
    with pytest.raises(EnvFault, match="setup_tool=prepare: Error executing tool prepare") as caught:
        odd.reset(split="train", index=0)
    assert caught.value.reason == "mcp_error"
    odd.close()
