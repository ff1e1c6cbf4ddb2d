"""`empg-jax eval http://...`: policies behind servers; what fails is a message (ours: test_eval_command)."""

import contextlib
import http.server
import itertools
import json
import math
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.errors import ConfigError
from empg_jax.rollout import endpoint
from empg_jax.rollout.endpoint import NO_ID, Endpoint, EndpointError, base_of, read_answer
from tests import runs

SETTINGS = [*runs.TINY, *runs.HOUSE]
ASKED = ["--config", "quickstart", "--tasks", "4", "--attempts", "2"]


class Fake:
    """A server of chat completions; ``reply(number, body)`` returns status and body of each request."""

    def __init__(self, reply, models=("fake",)):
        self.reply, self.models = reply, models
        self.bodies, self.keys = [], []
        self._lock = threading.Lock()

    def answer(self, handler, body):
        with self._lock:
            self.bodies.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            return self.reply(len(self.bodies), body)


@contextlib.contextmanager
def faking(reply, **options):
    fake = Fake(reply, **options)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            names = [{"id": name} for name in fake.models]
            self.send(200, {"data": names} if self.path == "/v1/models" else {})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send(*(fake.answer(self, body) if self.path == "/v1/chat/completions" else (404, "")))

        def send(self, status, body, headers=()):
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def said(text, **more):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": "stop", **more}]}


def by_seed(number, body):
    """A policy of few words, which its seed chooses."""
    return said(f"go to desk {body['seed'] % 5}")


def call(*arguments, **options):
    """Calls the command line; returns exit code, stdout, stderr."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT", 0.001)


def test_a_server_that_tells_only_texts_is_evaluated(tmp_path):
    with faking(by_seed) as fake:
        code, out, err = call(
            "eval", fake.url, *ASKED, *SETTINGS, "--out", tmp_path, "--temperature", 0.5,
            env={"EMPG_API_KEY": "secret"},
        )  # fmt: skip
    found = json.loads(out)
    assert code == 0, err
    assert (found["source"], found["model"], found["eval_tasks"], found["attempts"]) == (
        fake.url,
        "fake",
        4,
        2,
    )
    assert "step" not in found and "eval_entropy" not in found and found["env"] == "tests.houses:HOUSE"
    assert set(fake.keys) == {"Bearer secret"}
    body = fake.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("fake", 0.5, 4)
    assert "top_p" not in body and "top_k" not in body
    # The environment's prompts arrive as messages, and the answers stand in them.
    longest = max(fake.bodies, key=lambda body: len(body["messages"]))["messages"]
    roles = [message["role"] for message in longest]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] and len(roles) > 1
    assert longest[1]["content"].startswith("go to desk ")
    assert len({body["seed"] for body in fake.bodies}) == len(fake.bodies)
    records = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    places = [(record["task"], record["member"]) for record in records]
    assert places == [(task, member) for task in range(4) for member in range(2)]
    assert np.mean([record["success"] for record in records]) == found["eval_success"]
    assert sum(len(record["turns"]) for record in records) == len(fake.bodies)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_thought_that_the_servers_prompt_opened_has_no_action(is_told):
    more = {"empg": {"opens_thought": True}} if is_told else {}
    asked = [*ASKED, *SETTINGS, "--tasks", "1", "--attempts", "1", "sft.updates=0", "env.parser=tags"]
    for text, is_valid in (
        ("Maybe <action>go to desk 1</action>, but", not is_told),
        ("Maybe.</think><action>go to desk 1</action>", True),
    ):
        with faking(lambda number, body, text=text: said(text, **more)) as fake:
            code, out, err = call("eval", fake.url, *asked)
        assert code == 0, err
        assert json.loads(out)["eval_invalid_actions"] == (0 if is_valid else 1)


def test_a_split_that_does_not_exist_makes_no_folder(tmp_path):
    with faking(by_seed) as fake:
        given = [*ASKED, *SETTINGS, "--split", "nosplit", "--out", tmp_path / "new"]
        code, out, err = call("eval", fake.url, *given)
    assert (code, out) == (2, "") and "error: env.eval_split=nosplit does not exist" in err
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_goes_on_after_the_server_failed(tmp_path):
    with faking(by_seed) as fake:
        whole = json.loads(call("eval", fake.url, *ASKED, *SETTINGS, "--out", tmp_path)[1])
    broken = threading.Event()

    def fail(number, body):
        if broken.is_set() and number > 6:
            return 500, {"error": {"message": "out of\nmemory"}}
        return by_seed(number, body)

    with faking(fail) as fake:
        # One episode at a time, so that some are finished before the failure.
        command = ["eval", fake.url, *ASKED, *SETTINGS, "rollout.slots=1", "--out", tmp_path / "new"]
        broken.set()
        code, out, err = call(*command)
        assert (code, out) == (1, "") and "Traceback" not in err
        assert f"{fake.url}/v1/chat/completions answered with status 500: out of memory (5 tries)" in err
        assert not (tmp_path / "new" / "eval.json").exists()
        (partial,) = (tmp_path / "new").glob("episodes-*.partial.jsonl")
        kept = len(partial.read_text().splitlines())
        assert 0 < kept < 8
        with partial.open("a") as file:
            file.write('{"task": 3, "tur')  # what a kill leaves
        assert "call the same empg-jax eval again" in call("compare", tmp_path, tmp_path / "new")[2]
        broken.clear()
        code, out, err = call(*command)
    assert code == 0 and f"going on: {kept} of 8 attempts were finished before" in err
    assert f"they count as those of {fake.url}: if it serves other weights now, use another --out" in err
    again = json.loads(out)
    assert (whole["eval_resumed"], again["eval_resumed"]) == (0, kept)
    assert f"- attempts that an earlier call finished: {kept}" in (tmp_path / "new" / "eval.md").read_text()
    assert {**again, "source": whole["source"], "eval_resumed": 0} == whole
    assert not partial.exists()
    code, out, err = call("compare", tmp_path, tmp_path / "new")
    assert code == 0 and json.loads(out)["gain"] == 0 and json.loads(out)["tasks"] == 4, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["http://127.0.0.1:1"], "is a server, which has no environment: add --env NAME or --config"),
        (["http://127.0.0.1:1", "--env", "household"], "http://127.0.0.1:1/v1 does not answer: "),
        (["http://", "--env", "household"], "http:// is no address"),
        (["runs/x", "--model", "m"], "--model m names one of a server's models, and runs/x is no server"),
        (["m", "--base-url", "127.0.0.1:1"], "--base-url 127.0.0.1:1 is no address: give one like http://"),
        (["http://b", "--base-url", "http://a"], "takes the name of a model there, and http://b is"),
        (["m", "--base-url", "http://a", "--model", "n"], "--model n and m both name a model of http://a"),
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_one_line(arguments, says):
    code, out, err = call("eval", *arguments)
    assert code in (1, 2) and out == "" and says in err and "Traceback" not in err


def test_several_models_are_chosen_from():
    with faking(by_seed, models=("a", "b")) as fake:
        code, _, err = call("eval", fake.url, "--env", "household")
        assert code == 2 and "has the models a, b: name one with --model NAME" in err
        assert connect(fake, model="b").ask([], 0).text == "go to desk 0"
        assert fake.bodies[0]["model"] == "b"


@pytest.mark.parametrize("with_base_url", [False, True])
def test_a_model_of_a_server_is_named_in_two_ways(with_base_url):
    with faking(by_seed, models=("a", "b")) as fake:
        named = ["b", "--base-url", fake.url] if with_base_url else [fake.url, "--model", "b"]
        code, _, err = call("eval", *named, "--config", "quickstart", "--tasks", "1", *SETTINGS)
        assert code == 0, err
        assert {body["model"] for body in fake.bodies} == {"b"}


def connect(fake, **options):
    return Endpoint(fake.url, sampling={"max_tokens": 3}, timeout=30, **options)


def test_a_server_that_refuses_unknown_keys_is_asked_without_them():
    def reply(number, body):
        return (
            (400, {"error": {"message": "return_token_ids?"}}) if "return_token_ids" in body else said("hi")
        )

    with faking(reply) as fake:
        there = connect(fake)
        assert [there.ask([], seed).text for seed in (1, 2)] == ["hi", "hi"]
    assert len(fake.bodies) == 3  # after the first refusal it is not tried again


@pytest.mark.parametrize("key", ["stop_reason", "matched_stop", None])
def test_a_text_has_the_stop_string_that_ended_it(key):
    """Parsers want the closing tag, which servers leave out, and not all tell it."""
    whole, stops = "<search>a</search> b</answer>", ["</answer>", "</search>"]

    def reply(number, body):
        if "stop" not in body:
            return said(whole, finish_reason="length")
        return said("<search>a", **({} if key is None else {key: "</search>"}))

    expected = ("<search>a</search>", "stop")

    with faking(reply) as fake:
        there = Endpoint(fake.url, sampling={"stop": stops}, timeout=30)
        found = [there.ask([], seed) for seed in (1, 2)]
        assert [(each.text, each.finish_reason) for each in found] == [expected] * 2
        assert len(fake.bodies) == (3 if key is None else 2)
    for ended in ({"stop_reason": None}, {"finish_reason": "length"}):
        with faking(lambda number, body, ended=ended: said("<search>", **ended)) as fake:
            there = Endpoint(fake.url, sampling={"stop": stops}, timeout=30)
            assert there.ask([], 0).text == "<search>" and len(fake.bodies) == 1


def test_busy_servers_are_asked_again():
    def reply(number, body):
        return (429, "slow down", [("Retry-After", "0.01")]) if number < 8 else said("at last")

    with faking(reply) as fake:
        assert connect(fake).ask([], 0).text == "at last"
    assert len(fake.bodies) == 8


def test_a_server_that_is_always_busy_is_left_after_the_time_for_an_answer(monkeypatch):
    seconds = itertools.count(0, 10)
    monkeypatch.setattr(endpoint, "monotonic", lambda: next(seconds))
    says = r"status 429: slow down \(4 tries\)"
    with faking(lambda number, body: (429, "slow down")) as fake, pytest.raises(EndpointError, match=says):
        connect(fake, model="fake").ask([], 0)


@pytest.mark.parametrize("status", [200, 500])
def test_an_answer_that_is_cut_off_is_asked_for_again(status):
    def reply(number, body):
        return (status, "half an", [("Content-Length", "1000")]) if number < 3 else said("at last")

    with faking(reply) as fake:
        assert connect(fake).ask([], 0).text == "at last"


def test_an_interrupted_evaluation_does_not_wait_for_the_server():
    is_asked, goes_on = threading.Event(), threading.Event()

    def reply(number, body):
        is_asked.set()
        goes_on.wait(60)
        return said("late")

    with faking(reply) as fake:
        with endpoint.EndpointEngine(connect(fake), slots=1, seed=0) as engine:
            for slot in range(2):  # the second waits for its place
                engine.submit(slot, list(b"[]"), is_fresh=True, ids=[slot])
            assert is_asked.wait(60)
        threads = [thread for thread in threading.enumerate() if thread.name == "endpoint"]
        assert threads and all(thread.daemon for thread in threads)  # Python does not wait for them
        goes_on.set()
        for thread in threads:
            thread.join(60)
    assert len(fake.bodies) == 1  # the second was given up


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, {"error": "who?"}, "status 401: who\\?; EMPG_API_KEY names the key"),
        (404, {"error": {"message": "no such model"}}, "status 404: no such model"),
        (200, "<html>\x1b[31mhello</html>", r"what is no chat completion: <html> \[31mhello"),
        (200, {"choices": []}, "what is no chat completion"),
        (200, {"choices": [{"message": {"content": ["parts"]}}]}, "what is no chat completion"),
        (400, {"error": {"message": "x" * 4000}}, "x{300}\\.\\.\\."),
    ],
)
def test_what_cannot_be_used_is_told(status, body, says):
    with faking(lambda number, asked: (status, body)) as fake, pytest.raises(EndpointError, match=says):
        connect(fake).ask([], 0)


def test_answers_are_read():
    told = said("hi", token_ids=[4, 5], empg={"entropies": [0.5, 1.0]})[1]
    answer = read_answer(told)
    assert answer.tokens.tolist() == [4, 5] and answer.entropies.tolist() == [0.5, 1.0]
    plain = read_answer({**said(None)[1], "usage": {"completion_tokens": 3}})
    assert plain.text == "" and plain.tokens.tolist() == [NO_ID] * 3
    assert all(math.isnan(value) for value in plain.entropies)


def test_addresses():
    assert base_of("http://127.0.0.1:8000/") == base_of("http://127.0.0.1:8000/v1")
    assert base_of("https://host/api/openai") == "https://host/api/openai"
    with pytest.raises(ConfigError, match="no address"):
        base_of("ftp://host")
