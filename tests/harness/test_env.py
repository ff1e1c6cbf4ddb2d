"""The environment of a program: calls as observations, its end as the reward, and its faults by name."""

import json
import resource
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request

import pytest

from empg_envs import make_env
from empg_envs.base import EnvFault
from empg_envs.harness.env import _find_endpoint
from empg_envs.harness.server import Session
from tests.harness import agents
from tests.processes import is_running
from tests.serve.servers import wait_until
from tests.thoughts import THOUGHTS
from tests.workers.pools import act, open_named, reset_all


@pytest.fixture
def make(tmp_path):
    """Environments of `agents`, which are closed at the end."""
    opened = []

    def make(kind, **options):
        command = f"python {agents.__file__} {kind}"
        opened.append(make_env("harness", command=command, start_timeout=60, call_timeout=60, **options))
        return opened[-1]

    yield make
    for env in opened:
        env.close()


def test_a_program_that_goes_on_with_its_conversation(make):
    env = make("grow")
    observation, info = env.reset(7, split="train", index=3)
    assert (observation, info["messages"], info["tools"]) == ("a", [{"role": "user", "content": "a"}], [])
    observation, reward, terminated, truncated, info = env.step("one")
    assert (observation, reward, terminated, truncated) == ("b", 0.0, False, False)
    assert [message["content"] for message in info["messages"]] == ["a", "one", "b"]
    env.step("two")
    observation, reward, terminated, truncated, info = env.step("three")
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert info["won"] and info["metrics"] == {"number": 3.0}
    assert json.loads(info["task"])["number"] == 3


@pytest.mark.parametrize(
    ("kind", "reason", "words"),
    [
        ("crash", "agent_crashed", "ended with status 1: out of luck"),
        ("no-reward", "agent_no_reward", "its last line has none"),
        ("says '{\"reward\": NaN}'", "agent_no_reward", "no finite reward: its last line has none"),
        ('says \'{"reward": 1, "success": "false"}\'', "agent_no_reward", "no true or false as success: its"),
        (
            'says \'{"reward": 1, "metrics": {"a": NaN}}\'',
            "agent_no_reward",
            "no finite number as metrics.a: ",
        ),
    ],
)
def test_faults_have_names(kind, reason, words, make):
    env = make(kind)
    env.reset(0, split="train", index=0)
    with pytest.raises(EnvFault, match=words) as fault:
        env.step("one")
    assert fault.value.reason == reason


@pytest.mark.parametrize("warning", ["ResourceWarning: unclosed socket", '{"reward": 1.0}'])
def test_standard_error_neither_breaks_nor_fakes_a_verdict(make, warning):
    env = make(f"warns '{{\"reward\": 0.25}}' '{warning}'")
    env.reset(0, split="train", index=0)
    assert env.step("one")[1] == 0.25
    other = make(f"warns done '{warning}'")
    other.reset(0, split="train", index=0)
    with pytest.raises(EnvFault) as fault:
        other.step("one")
    assert fault.value.reason == "agent_no_reward" and str(fault.value).endswith(f"done\n{warning}")


def test_a_program_that_never_calls(make):
    with pytest.raises(EnvFault, match="made no call") as fault:
        make("never").reset(0, split="train", index=0)
    assert fault.value.reason == "agent_never_called"


def test_a_program_that_says_nothing_any_more(make):
    env = make("silent")
    env.reset(0, split="train", index=0)
    env._call_timeout = 0.3
    with pytest.raises(EnvFault, match=r"neither called nor ended within 0\.3 s") as fault:
        env.step("one")
    assert fault.value.reason == "agent_timeout"


def test_the_client_of_openai_finds_the_model(make):
    openai = pytest.importorskip("openai")
    env = make("silent")
    env.reset(0, split="train", index=0)
    url = _find_endpoint().url_of(env._session)
    with openai.OpenAI(base_url=url, api_key=env._session.key, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["policy"]
        assert client.models.retrieve("policy").id == "policy"
        with pytest.raises(openai.NotFoundError, match="model 'gpt' does not exist") as missing:
            client.models.retrieve("gpt")
    assert missing.value.code == "model_not_found"


def test_calls_after_the_end_are_refused(make):
    env = make("silent")
    env.reset(0, split="train", index=0)
    session = env._session
    url = _find_endpoint().url_of(session)
    headers = {"Authorization": f"Bearer {session.key}"}

    def call(route="chat/completions", body=b'{"messages": [{"role": "user", "content": "a"}]}', **more):
        request = urllib.request.Request(f"{url}/{route}", data=body, headers={**headers, **more})
        with pytest.raises(urllib.error.HTTPError) as error, urllib.request.urlopen(request, timeout=60):
            pass
        return error.value.code, json.load(error.value)["error"]["message"]

    assert call(body=b"{")[0] == call(body=b"[]")[0] == call(body=b'{"messages": []}')[0] == 400
    assert call(body=b'{"messages": [{"role": "user"}], "n": 2}') == (
        400,
        "n=2: a call in training has one choice",
    )
    assert call("embeddings")[0] == 404
    assert call(Authorization="Bearer other")[0] == 401
    for length in ("-1", "abc", "9" * 5000):
        assert call(**{"Content-Length": length}) == (
            400,
            "Content-Length must be a number of bytes up to 8388608 (8 MiB)",
        )
    env.close()
    assert call() == (401, "no episode has this key: it is wrong, or the episode has ended")


def test_a_body_in_chunks_is_refused_and_not_taken_for_a_request(make):
    env = make("silent")
    env.reset(0, split="train", index=0)
    url = urllib.parse.urlsplit(_find_endpoint().url_of(env._session))
    head = f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: a\r\n"
    head += f"Authorization: Bearer {env._session.key}\r\n"
    with socket.create_connection((url.hostname, url.port), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n".encode())
        answer = connection.makefile("rb").read().decode()  # to the end: the connection is closed
    assert answer.startswith("HTTP/1.1 411 Length Required\r\n") and answer.count("HTTP/1.1") == 1
    assert "Connection: close" in answer and "send the body whole, with its Content-Length" in answer


@pytest.mark.parametrize(("body", "count"), [({}, 2), ({"parallel_tool_calls": False}, 1)])
def test_a_call_without_parallel_calls_gets_the_first(body, count):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    question = {"role": "user", "content": "a"}
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>' * 2
    session = Session()
    call = session.add({"messages": [question], "tools": tools, **body})
    session.answer(call, text)
    message = call.wait()
    assert len(message["tool_calls"]) == count
    # In the next call the policy's words are as sampled, with what the program was not told.
    later = session.add({"messages": [question, {"role": "assistant", **message}], "tools": tools})
    assert later.messages[1] == {"role": "assistant", "content": text}


def test_half_a_character_in_a_call_is_none():
    """A program that says it again would have the episode discarded."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    question, session = {"role": "user", "content": "a"}, Session()
    call = session.add({"messages": [question], "tools": tools})
    text = '<tool_call>{"name": "f", "arguments": {"x": "\\ud83d"}}</tool_call>'
    session.answer(call, text)
    message = call.wait()
    assert message["tool_calls"][0]["function"]["arguments"] == '{"x": "?"}'
    later = session.add({"messages": [question, {"role": "assistant", **message}], "tools": tools})
    assert later.messages[1]["content"] == text  # as it was sampled


def test_a_question_that_is_asked_again_is_one_turn(make, tmp_path):
    file = tmp_path / "left"
    env = make(f"impatient {file}")
    assert env.reset(0, split="train", index=0)[0] == "a"
    file.touch()  # the program gives the call up while the policy answers it
    wait_until(lambda: env._session.calls.qsize() == 2)
    observation, *_, info = env.step("one")
    assert observation == "b" and [m["content"] for m in info["messages"]] == ["a", "one", "b"]
    assert env.step("two")[2]


def test_a_question_that_is_asked_again_behind_another_is_one_turn(make, tmp_path):
    """Its answer was thrown away and yet stayed a turn, because another call waited before it."""
    first, second = tmp_path / "b asks", tmp_path / "a asks again"
    env = make(f"impatient-pair '{first}' '{second}'")
    assert env.reset(0, split="train", index=0)[0] == "a"
    calls = env._session.calls
    for number, file in enumerate((first, second), 1):
        file.touch()
        wait_until(lambda number=number: calls.qsize() == number)
    assert env.step("1")[0] == "b"
    _, _, terminated, _, info = env.step("2")
    assert terminated and info["metrics"] == {"number": 1.0}  # the answer that the program read for a


def test_a_question_that_is_asked_again_does_not_double_the_time_of_a_step(make, tmp_path):
    """The pool takes a step beyond ``workers.step_timeout`` for a hang, and replaces the worker."""
    file = tmp_path / "left"
    env = make(f"impatient-slow {file}")
    env.reset(0, split="train", index=0)
    env._call_timeout = 1.0
    file.touch()
    wait_until(lambda: env._call.has_left())
    with pytest.raises(EnvFault, match="neither called nor ended within 1 s") as fault:
        env.step("one")
    assert fault.value.reason == "agent_timeout"


@pytest.mark.parametrize(("text", "content"), THOUGHTS)
def test_a_tool_call_that_a_thought_mentions_is_not_made(text, content):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    session = Session()
    call = session.add({"messages": [{"role": "user", "content": "a"}], "tools": tools})
    session.answer(call, text)
    message = call.wait()
    calls = [json.loads(made["function"]["arguments"]) for made in message.get("tool_calls", ())]
    assert message["content"] == content
    assert calls == ([{"a": 1}] if "</think>" in text else [])


def test_a_call_that_follows_at_once_finds_the_sampled_text():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    question, said = {"role": "user", "content": "a"}, '<tool_call>{"name":"add"}</tool_call>'
    session, later = Session(), []
    call = session.add({"messages": [question], "tools": tools})

    class Program:
        """It reads its answer in the moment that it is woken, and calls again."""

        def set(self):
            messages = [question, call._answer, {"role": "user", "content": "b"}]
            later.append(session.add({"messages": messages, "tools": tools}))

    call._answered = Program()
    session.answer(call, said)
    assert later[0].messages[1] == {"role": "assistant", "content": said}


def test_a_caller_that_ends_the_episode_ends_the_program():
    options = {"command": f"python {agents.__file__} tells", "start_timeout": 60, "call_timeout": 60}
    with open_named("harness", options=options) as pool:
        first = int(reset_all(pool, [0])[0].observation.split()[0])
        act(pool, {0: "one"})
        pool.release(0)
        second = int(reset_all(pool, [0])[0].observation.split()[0])  # right after it
        assert first != second and not is_running(first)
        pool.release(0)
        wait_until(lambda: not is_running(second))  # without another call of the pool


def test_a_program_does_not_inherit_the_limit_of_its_worker():
    options = {"command": f"python {agents.__file__} tells", "start_timeout": 60}
    with open_named("harness", options=options, memory_limit_mb=1024) as pool:
        space = int(reset_all(pool, [0])[0].observation.split()[1])
    assert space == resource.getrlimit(resource.RLIMIT_AS)[0]


def test_the_end_takes_what_the_program_started(make, tmp_path):
    file = tmp_path / "pids"
    env = make(f"children {file}")
    env.reset(0, split="train", index=0)
    assert env.step("one")[2]
    pids = [int(pid) for pid in file.read_text().split()]
    wait_until(lambda: not any(map(is_running, pids)))
    with pytest.raises(RuntimeError, match="the episode has ended"):
        env.step("two")


def test_a_scorer_and_a_file_of_tasks(make, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"number": i}) + "\n" for i in range(10)))
    env = make("grow", tasks=str(file), scorer="tests.harness.agents:score")
    assert {split: env.num_tasks(split) for split in env.list_splits()} == {"train": 8, "test": 2}
    assert env.get_task("test", 1)["number"] == 9
    env.reset(0, split="test", index=0)
    for answer in ("one", "two"):
        env.step(answer)
    assert env.step("three")[1] == 0.5
    for options, message in (
        ({"tasks": str(tmp_path / "none")}, "No such file"),
        ({"scorer": "tests.harness.agents:scores"}, "expected package.module:function"),
    ):
        with pytest.raises(ValueError, match=message):
            make("grow", **options)


def test_the_same_task_in_both_panels_has_one_hash(make, tmp_path):
    file = tmp_path / "tasks.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": "hi", "split": split}) + "\n" for split in ("train", "test"))
    )
    env = make("grow", tasks=str(file))
    train, test = env.get_task("train", 0), env.get_task("test", 0)
    assert train["content_hash"] == test["content_hash"] and (train["split"], test["split"]) == (
        "train",
        "test",
    )


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": "10.0.0.1,.inside"}, "10.0.0.1,.inside,127.0.0.1"),
        ({"NO_PROXY": "a", "no_proxy": "b"}, "a,b,127.0.0.1"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_a_large_task_is_on_standard_input_alone_and_hosts_without_proxy_stay(
    given, made, make, tmp_path, monkeypatch
):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"http_proxy": "http://127.0.0.1:9", "EMPG_TASK": "{}", **given}.items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "tasks.jsonl"
    file.write_text(json.dumps({"number": 0, "text": "é" * 100_000}) + "\n")
    observation, _ = make("large", tasks=str(file)).reset(0, split="train", index=0)
    assert observation == f"100000 False {made}"


def test_the_python_of_the_command_is_this_one(make):
    assert make("grow")._command[0] == sys.executable
