"""OpenEnv's client side, with a stand-in that speaks its WebSocket messages."""

import json
import threading
import time

import pytest

from empg_envs import make_env
from empg_envs.base import EnvFault
from empg_envs.conformance import CHECKS, Subject
from tests.adapters.needs import need

need("websockets")


def serve_session(socket):
    """One session: say the number that the observation shows; a few words do what they say."""
    secret, steps = 0, 0
    for line in socket:
        message = json.loads(line)
        data, kind = message.get("data"), message["type"]
        if kind == "close":
            return
        if kind == "reset":
            secret, steps = data["seed"] % 1000, 0
            reply = {"observation": {"say": str(secret)}, "reward": None, "done": False}
        elif set(data) != {"message"}:
            error = {"message": "Invalid message", "code": "VALIDATION_ERROR"}
            socket.send(json.dumps({"type": "error", "data": error}))
            continue
        elif data["message"] == "break":
            error = {"message": "broken", "code": "EXECUTION_ERROR"}
            socket.send(json.dumps({"type": "error", "data": error}))
            continue
        elif data["message"] == "leave":
            return
        elif data["message"] == "sleep":
            time.sleep(3)
            continue
        else:
            steps += 1
            right = data["message"] == str(secret)
            reply = {
                "observation": {"say": str(secret), "steps": steps},
                "reward": float(right),
                "done": right,
            }
        socket.send(json.dumps({"type": "observation", "data": reply}))


@pytest.fixture(scope="module")
def url():
    from websockets.sync.server import serve

    with serve(serve_session, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/"
        server.shutdown()
        thread.join()


def test_a_server_that_is_full_says_so():
    from websockets.sync.server import serve

    def refuse(socket):
        error = {"message": "full", "code": "CAPACITY_REACHED"}
        socket.send(json.dumps({"type": "error", "data": error}))

    with serve(refuse, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        env = make_env("openenv", url=f"http://127.0.0.1:{server.socket.getsockname()[1]}", timeout=60)
        for _ in range(3):  # whether or not it has closed before the first message
            with pytest.raises(EnvFault, match=r"reset: full \(CAPACITY_REACHED\)"):
                env.reset(index=0)
        env.close()
        server.shutdown()
        thread.join()


def shout(observation):
    return observation["say"] + "!"


def test_an_episode(url):
    env = make_env("openenv", url=url, observe="say", task="Say the number.")
    observation, info = env.reset(split="train", index=7)
    assert observation == "Say the number.\n\n7" and info == {"task": "Say the number.", "won": False}
    assert env.step("8")[:4] == ("7", 0.0, False, False)
    observation, reward, terminated, _, info = env.step("7")
    assert (reward, terminated, info["won"]) == (1.0, True, True)
    assert env.reset(split="test", index=7)[0] != env.reset(split="valid", index=7)[0]  # of other seeds
    env.close()
    env.close()


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_it_is_an_environment_like_the_others(url, check):
    check.run(Subject("openenv", {"url": url, "tasks": 50, "held_out": 50}, episodes=1))


@pytest.mark.parametrize("limit", [1, 50])  # ours, or one of the caller's
@pytest.mark.parametrize("action", ['{"message": "8"}', '{"massage": "8"}', "8"])
@pytest.mark.parametrize(("win_return", "won"), [(0.0, True), (1.0, False), (None, False)])
def test_an_episode_that_a_limit_ends_may_be_won(url, win_return, won, action, limit):
    env = make_env("openenv", url=url, action="json", max_turns=limit, win_return=win_return)
    env.reset(index=7)
    *_, terminated, truncated, info = env.step(action)
    assert (terminated, truncated, info["won"]) == (False, limit == 1, won)
    env.close()


def test_observations_as_json_and_by_a_function(url):
    env = make_env("openenv", url=url)
    assert env.reset(index=3)[0] == '{"say": "3"}' and env.step("4")[0] == '{"say": "3", "steps": 1}'
    env.close()
    env = make_env("openenv", url=url, observe="tests.adapters.test_openenv:shout")
    assert env.reset(index=3)[0] == "3!"
    env.close()


def test_actions_as_json_and_what_does_not_fit(url):
    env = make_env("openenv", url=url, action="json", max_turns=4)
    env.reset(index=3)
    assert env.step("3")[0] == "error: an action is a JSON object"
    assert env.step('{"massage": "3"}')[0] == "error: Invalid message"
    assert env.step('{"message": "3"}')[1:3] == (1.0, True)
    env.close()


@pytest.mark.parametrize(
    ("action", "reason", "message"),
    [
        ("break", "openenv_error", r"step: broken \(EXECUTION_ERROR\)"),
        ("leave", "openenv_error", "step: ConnectionClosed"),
        ("sleep", "openenv_timeout", "no answer to step in 1 s"),
    ],
)
def test_faults_have_names(url, action, reason, message):
    env = make_env("openenv", url=url, timeout=1 if action == "sleep" else 60)
    env.reset(index=0)
    with pytest.raises(EnvFault, match=message) as caught:
        env.step(action)
    assert caught.value.reason == reason
    env.close()


def test_what_cannot_be_is_told(url):
    for wrong in ("", "127.0.0.1:8000", "ftp://x"):
        with pytest.raises(ValueError, match=r"expected a server, for example http"):
            make_env("openenv", url=wrong)
    with pytest.raises(EnvFault, match=r"ws://127\.0\.0\.1:1/ws: ConnectionRefusedError") as caught:
        make_env("openenv", url="http://127.0.0.1:1").reset(index=0)
    assert caught.value.reason == "openenv_unreachable"
    env = make_env("openenv", url=url, observe="word")
    with pytest.raises(EnvFault, match="the observation has no field 'word'"):
        env.reset(index=0)
    env.close()
