"""Our environments behind OpenEnv's messages, by the command, with our own client and with bare messages."""

import contextlib
import json
import signal

import httpx
import pytest
from serving import serving

from empg_envs import make_env
from empg_envs.base import EnvFault
from empg_jax.errors import ConfigError
from empg_jax.serve.server import check_key
from tests.adapters.needs import need
from tests.serve.servers import wait_until
from tests.serve.test_process import call
from tests.workers.pools import act, open_named, reset_all

need("websockets")
HOUSE = ["serve-env", "household", "--options", "level=tiny"]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("house"), *HOUSE, "--sessions", "2") as server:
        yield server.url


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("endings"), "serve-env", "tests.fakes:EndingEnv") as server:
        yield server.url


@contextlib.contextmanager
def connected(url, **options):
    from websockets.sync.client import connect

    with connect(f"{url.replace('http', 'ws')}/ws", proxy=None, open_timeout=60, **options) as socket:
        yield socket


def ask(socket, kind, text=None, **data):
    socket.send(json.dumps({"type": kind, "data": data}) if text is None else text)
    return json.loads(socket.recv(timeout=60))


@pytest.mark.parametrize(("split", "index"), [("train", 7), ("test", 3)])
def test_our_client_plays_the_same_episode(split, index, url):
    there = make_env("openenv", url=url, observe="text", timeout=60)
    here = make_env("household", level="tiny")
    observation, _ = there.reset(split=split, index=index)
    expected, info = here.reset(split=split, index=index)
    assert observation == expected
    for _ in range(40):
        action = here.expert_action()
        observation, reward, terminated, truncated, found = there.step(action)
        expected, *result, _, info = here.step(action)
        assert (observation, [reward, terminated]) == (expected, result) and not truncated
        if terminated:
            break
    assert terminated and found["won"] and info["won"]
    there.close()


@pytest.mark.parametrize("action", ["cut", "win"])
def test_our_client_finds_the_same_end(action, endings):
    here = make_env("tests.fakes:EndingEnv")
    there = make_env("openenv", url=endings, observe="text", timeout=60)
    for env in (here, there):
        env.reset(0, split="train", index=0)
    expected, found = here.step(action), there.step(action)
    assert found[1:4] == expected[1:4] and found[4]["won"] is expected[4]["won"]
    there.close()


def test_a_known_answer_stays_with_us(tmp_path):
    with (
        serving(tmp_path, "serve-env", "deepsearch", "--options", "level=tiny") as server,
        connected(server.url) as socket,
    ):
        observation = ask(socket, "reset", seed=0)["data"]["observation"]
    assert "task" in observation["info"] and "known_answer" not in observation["info"]


def test_sessions_are_isolated_and_limited(url):
    with connected(url) as first, connected(url) as second:
        one, two = ask(first, "reset", seed=0, episode_id="a"), ask(second, "reset", split="train", index=1)
        assert one["data"]["observation"]["text"] != two["data"]["observation"]["text"]
        assert one["data"]["reward"] is None and one["data"]["done"] is False
        ask(first, "step", message="look")
        assert ask(first, "state")["data"] == {
            "episode_id": "a", "step_count": 1, "split": "train", "index": 0,
        }  # fmt: skip
        assert ask(second, "state")["data"]["step_count"] == 0
        assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "healthy", "sessions": 2}
        with connected(url) as third:
            error = json.loads(third.recv(timeout=60))["data"]
            assert error["code"] == "CAPACITY_REACHED" and "2 sessions are open" in error["message"]
    # Closed, or gone: both places are free again.
    wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).json()["sessions"] == 0)


@pytest.mark.parametrize("max_turns", [1, 50])
def test_a_limit_on_turns_ends_the_session(url, max_turns):
    options = {"url": url, "observe": "text", "timeout": 60, "max_turns": max_turns}
    with open_named("openenv", options=options) as pool:
        for handles in ((0, 1), (2, 3)):  # two sessions are all that there are
            assert all(reply.failure is None for reply in reset_all(pool, handles).values())
            replies = act(pool, dict.fromkeys(handles, "look"))
            assert all(reply.truncated is (max_turns == 1) for reply in replies.values())
            if max_turns > 1:  # the limit is the caller's
                for handle in handles:
                    pool.release(handle)
            wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).json()["sessions"] == 0)


STEP, RESET, WRONG = '{"type": "step", "data": ', '{"type": "reset", "data": ', "VALIDATION_ERROR"
BAD = {
    "no JSON": ("{", "INVALID_JSON", "not JSON"),
    "no object": ("[]", "UNKNOWN_TYPE", "unknown type None"),
    "type": ('{"type": "stop"}', "UNKNOWN_TYPE", "unknown type 'stop'"),
    "data": (STEP + '1}', WRONG, "data must be an object"),
    "action": (STEP + '{"massage": "look"}}', WRONG, "no field 'massage'"),
    "no text": (STEP + '{"message": 1}}', WRONG, 'an action is {"message": TEXT}'),
    "too early": (STEP + '{"message": "look"}}', "EXECUTION_ERROR", "has not begun: send reset"),
    "seed": (RESET + '{"seed": -1}}', WRONG, "seed must be an integer from 0"),
    "split": (RESET + '{"split": "dev"}}', WRONG, "unknown split 'dev'"),
    "index": (RESET + '{"index": 1000000000}}', WRONG, "index must lie in 0 to"),
    "name": (RESET + '{"episode_id": 1}}', WRONG, "episode_id must be a text"),
}  # fmt: skip


def test_bad_messages_are_told_and_the_session_goes_on(url):
    with connected(url) as socket:
        for text, code, message in BAD.values():
            answer = ask(socket, "", text)
            assert (answer["type"], answer["data"]["code"]) == ("error", code), answer
            assert message in answer["data"]["message"]
        assert ask(socket, "reset", seed=2)["type"] == "observation"
        socket.send("x" * (2 << 20))
        with pytest.raises(Exception, match=r"1009|too big"):  # the only one that ends it
            socket.recv(timeout=60)


def test_pages_of_other_sites_and_requests_without_a_session(url):
    from websockets.exceptions import InvalidStatus

    with pytest.raises(InvalidStatus), connected(url, origin="http://evil.example"):
        pass
    answer = httpx.post(f"{url}/step", json={"action": {"message": "look"}}, trust_env=False)
    assert answer.status_code == 409 and "WebSocket /ws" in answer.json()["detail"]
    schema = httpx.get(f"{url}/schema", trust_env=False).json()
    assert schema.keys() == {"action", "observation", "state"}
    assert httpx.get(f"{url}/metadata", trust_env=False).json()["name"] == "household"


def test_a_key_is_needed_where_there_is_one(tmp_path, monkeypatch):
    from websockets.exceptions import InvalidStatus

    monkeypatch.delenv("OPENENV_API_KEY", raising=False)
    with serving(tmp_path, *HOUSE, "--api-key", "secret") as server:
        for headers in ({}, {"Authorization": "Bearer other"}):
            with pytest.raises(InvalidStatus, match="403"), connected(server.url, additional_headers=headers):
                pass
        env = make_env("openenv", url=server.url, observe="text", timeout=60)
        with pytest.raises(EnvFault, match=r"HTTP 403; .*workers\.pass_env=\[OPENENV_API_KEY\]"):
            env.reset(split="train", index=0)
        monkeypatch.setenv("OPENENV_API_KEY", "secret")
        assert (
            env.reset(split="train", index=0)[0]
            == make_env("household", level="tiny").reset(split="train", index=0)[0]
        )
        env.close()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([*HOUSE], "play the environment; set --api-key, or --no-key"),
        (["serve", "qwen3-0.6b", "--train"], "train the policy; set --api-key"),
    ],
)
def test_where_other_machines_reach_a_server_it_needs_a_key(command, says, monkeypatch):
    monkeypatch.delenv("EMPG_API_KEY", raising=False)
    done = call(*command[1:], "--host", "0.0.0.0", command=command[0])
    assert done.returncode == 2, done.stderr
    assert f"--host 0.0.0.0 without a key: everyone who reaches it could {says}" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "some.host", ""])
def test_only_this_machine_needs_no_key(host):
    with pytest.raises(ConfigError, match=f"--host {host} without a key: everyone who reaches it could look"):
        check_key(host, None, opens="look")
    check_key(host, None, opens=None)
    for own, key in (
        (host, "secret"),
        ("127.0.0.1", None),
        ("127.1.2.3", None),
        ("::1", None),
        ("localhost", None),
    ):
        check_key(own, key, opens="look")


def test_a_server_without_a_key_on_purpose(tmp_path):
    with serving(tmp_path, *HOUSE, "--host", "0.0.0.0", "--no-key") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "healthy"


def test_silent_sessions_end_and_so_does_the_server(tmp_path):
    with serving(tmp_path, *HOUSE, "--idle-timeout", "0.3") as server, connected(server.url) as socket:
        error = json.loads(socket.recv(timeout=60))["data"]
        assert error["code"] == "SESSION_ERROR" and "no message for 0.3 s" in error["message"]
        server.process.send_signal(signal.SIGTERM)
        out, _ = server.process.communicate(timeout=60)
        assert server.process.returncode == 143 and out == f"serving household at {server.url}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["houshold"], "did you mean 'household'"), (["household", "--options", "levle=tiny"], "levle")],
)
def test_what_cannot_be_served_is_told(arguments, message):
    done = call(*arguments, command="serve-env")
    assert done.returncode == 2 and message in done.stderr, done.stderr
