"""An opponent behind HTTP, in games of the real TextArena against a server of this test."""

import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from empg_envs import make_env
from empg_envs.base import EnvFault
from tests.adapters.needs import need

need("textarena")

INSTRUCTIONS = "Win."


def choose_first(messages):
    """The first cell that the game offers, with a thought that the game must not see."""
    offered = re.findall(r"'(\[\d\])'", messages[-1]["content"].rpartition("Available Moves")[2])
    return f"I see [0]. <action>{offered[0]}</action>"


@contextlib.contextmanager
def rival(say, status=200, **more):
    """The address of a server, and the bodies and tokens that it gets."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send({"data": [{"id": "frozen"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "token": self.headers.get("Authorization"), "path": self.path})
            message = {"role": "assistant", "content": say(body["messages"])}
            self.send(
                {"choices": [{"message": message, **more}]} if status == 200 else {"error": "no"}, status
            )

        def send(self, body, status=200):
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()


def make(url, **options):
    given = {"parser": "tags", "instructions": INSTRUCTIONS, **options}
    return make_env("textarena", opponent=url, opponent_options=given)


def play(env, moves, index):
    """The replies of a game, up to its end."""
    replies = [env.reset(split="train", index=index)]
    for move in moves:
        replies.append(env.step(move))
        if replies[-1][2]:
            break
    return replies


def test_the_opponent_has_a_conversation_of_its_own(monkeypatch):
    monkeypatch.setenv("EMPG_API_KEY", "secret")
    with rival(choose_first) as (url, asked):
        env = make(f"{url}/v1", temperature=0.5, max_tokens=9)
        assert env.replayable is False  # another program answers
        replies = play(env, ["[4]", "[8]"], index=1)  # the opponent begins
        first, second, _ = asked
        assert first["path"] == "/v1/chat/completions" and first["token"] == "Bearer secret"
        assert (first["model"], first["temperature"], first["max_tokens"]) == ("frozen", 0.5, 9)
        # The words that the policy reads with the same prompt options and parser.
        opening = first["messages"][0]["content"]
        assert opening.startswith(
            "Win.\nGive your action between <action> and </action>.\n\nYou are Player 0"
        )
        user, said, news = second["messages"]
        assert user == first["messages"][0]
        assert said == {"role": "assistant", "content": "I see [0]. <action>[0]</action>"}
        assert "[Player 1] [4]" in news["content"] and "You are Player" not in news["content"]
        # The policy sees the move alone.
        assert "[Player 0] [0]" in replies[0][0] and "I see" not in replies[0][0]
        play(env, ["[4]"], index=1)
        assert asked[3]["messages"] == first["messages"] and asked[3]["seed"] == first["seed"]


def test_a_thought_that_the_opponents_prompt_opened_has_no_move():
    with rival(choose_first, empg={"opens_thought": True}) as (url, _):
        *_, end = play(make(url), ["[4]"], index=0)
        assert end[1:3] == (1.0, True)  # it made no move, twice


def test_behind_such_a_thought_the_opponent_moves():
    def think(messages):
        return f"Or <action>[4]</action>.</think>{choose_first(messages)}"

    with rival(think, empg={"opens_thought": True}) as (url, asked):
        (_, reply) = play(make(url), ["[4]"], index=0)
        assert not reply[2] and len(asked) == 1


@pytest.mark.parametrize("index", [0, 1])
def test_what_the_opponent_wins_the_policy_loses(index):
    """In either seat the reward is that of the policy's own player."""
    with rival(choose_first) as (url, _):
        env = make(url)
        *_, end = play(env, ["[8]", "[7]", "[3]"], index)
        assert end[1:3] == (-1.0, True) and end[4]["outcome"] == "lost" and not end[4]["won"]
        *_, end = play(env, ["[4]", "[2]", "[6]"], index)
        assert end[1:3] == (1.0, True) and end[4]["outcome"] == "won" and end[4]["won"]


def test_an_opponent_that_breaks_the_rules_loses():
    with rival(lambda messages: "I resign") as (url, asked):
        *_, end = play(make(url), ["[4]"], index=0)
        assert end[1:3] == (1.0, True)
        assert len(asked) == 2 and asked[1]["messages"][1]["content"] == "I resign"  # told once what is wrong


def test_a_server_that_does_not_answer_discards_the_episode():
    with rival(choose_first, status=401) as (url, _):
        with pytest.raises(EnvFault, match=r"status 401.*EMPG_API_KEY.*pass_env=\[EMPG_API_KEY\]") as caught:
            play(make(url), ["[4]"], index=0)
        assert caught.value.reason == "opponent_refused"
    with pytest.raises(EnvFault, match=r"/v1/models: URLError.*refused") as caught:
        play(make(url), ["[4]"], index=0)
    assert caught.value.reason == "opponent_unreachable"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opponent": "ftp://host"}, "opponent=ftp://host: expected a server, for example http://127"),
        (
            {"opponent": "http://host", "opponent_options": {"tempo": 1}},
            "opponent_options: .*unexpected keyword argument 'tempo'",
        ),
        ({"opponent": "http://host", "opponent_options": {"parser": "tag"}}, "did you mean 'tags'"),
        ({"opponent_options": {"parser": "tags"}}, "are of an opponent at an address, not of random"),
    ],
)
def test_what_cannot_be_is_told(options, message):
    with pytest.raises(ValueError, match=message):
        make_env("textarena", **options)
