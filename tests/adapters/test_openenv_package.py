"""OpenEnv's own server with our client, and OpenEnv's own client with our server."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import serving

from empg_envs import make_env
from empg_envs.base import EnvFault
from tests.adapters.needs import need

need("openenv", install="pip install openenv, best in an environment of its own")

SERVER = Path(__file__).with_name("openenv_package_server.py")


@pytest.fixture(scope="module")
def url():
    server = subprocess.Popen([sys.executable, SERVER], stdout=subprocess.PIPE, text=True)
    yield server.stdout.readline().strip()
    server.kill()
    server.communicate()


def test_our_client_plays_with_its_server(url):
    env = make_env("openenv", url=url, observe="say", task="Say the number.", timeout=120)
    observation, info = env.reset(split="train", index=7)
    assert observation == "Say the number.\n\n7" and not info["won"]
    assert env.step("8")[:4] == ("7", 0.0, False, False)
    observation, reward, terminated, _, info = env.step("7")
    assert (observation, reward, terminated, info["won"]) == ("7", 1.0, True, True)
    assert env.reset(split="test", index=7)[0] != env.reset(split="valid", index=7)[0]
    env.close()


def test_refusals_and_faults_of_its_server_have_names(url):
    env = make_env("openenv", url=url, observe="say", action="json", timeout=120)
    env.reset(index=3)
    assert env.step('{"massage": "3"}')[0].startswith("error: ")  # the policy's fault, and it goes on
    assert env.step('{"message": "3"}')[1:3] == (1.0, True)
    env.reset(index=3)
    with pytest.raises(EnvFault, match=r"step: broken \(EXECUTION_ERROR\)") as caught:
        env.step('{"message": "break"}')
    assert caught.value.reason == "openenv_error"
    env.close()
    busy = [make_env("openenv", url=url, timeout=120) for _ in range(3)]
    with pytest.raises(EnvFault, match="CAPACITY_REACHED") as caught:
        for each in busy:
            each.reset(index=0)
    assert caught.value.reason == "openenv_error"
    for each in busy:
        each.close()


def test_its_client_plays_with_our_server(tmp_path):
    from openenv.core.generic_client import GenericEnvClient

    here = make_env("household", level="tiny")
    expected, _ = here.reset(split="train", index=5)

    async def play(url):
        async with GenericEnvClient(base_url=url, connect_timeout_s=120) as client:
            result = await client.reset(seed=5, episode_id="five")
            assert result.observation["text"] == expected and not result.done and result.reward is None
            with pytest.raises(RuntimeError, match="VALIDATION_ERROR"):
                await client.step({"massage": "look"})
            rewards = []
            while not result.done:
                action = here.expert_action()
                result = await client.step({"message": action, "metadata": {}})
                text, reward, *_ = here.step(action)
                assert (result.observation["text"], result.reward) == (text, reward)
                rewards.append(reward)
            state = await client.state()
            assert (state["episode_id"], state["step_count"]) == ("five", len(rewards))
            assert result.observation["info"]["won"] and sum(rewards) == 1.0
            return json.dumps(state)

    with serving(tmp_path, "serve-env", "household", "--options", "level=tiny") as server:
        assert '"split": "train"' in asyncio.run(play(server.url))
