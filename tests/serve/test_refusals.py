"""Bad input: a status, a message that names it, and nothing else suffers."""

import json
import socket

import httpx
import pytest

from tests.serve.servers import wait_until

CHAT, COMPLETION, GENERATE = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
HELLO = [{"role": "user", "content": "red"}]

REFUSED = {
    "unknown option": (COMPLETION, {"prompt": "red", "temprature": 1}, 400, "did you mean temperature"),
    "option without meaning here": (COMPLETION, {"prompt": "red", "best_of": 2}, 400, "best_of=2 is not"),
    "top_p of no precision": (COMPLETION, {"prompt": "red", "top_p": 1e-45}, 400, "lie in [1.17549e-38, 1]"),
    "top_p": (COMPLETION, {"prompt": "red", "top_p": 0}, 400, "top_p=0 must lie in (0, 1]"),
    "top_k": (COMPLETION, {"prompt": "red", "top_k": -2}, 400, "top_k=-2 must lie in [0, "),
    "top_k beyond the vocabulary": (COMPLETION, {"prompt": "red", "top_k": 9999}, 400, "of the vocabulary"),
    "min_p": (COMPLETION, {"prompt": "red", "min_p": 1}, 400, "min_p=1 must lie in [0, 1)"),
    "other log-probs": (CHAT, {"messages": HELLO, "top_logprobs": 3}, 400, "top_logprobs=3"),
    "echo": (COMPLETION, {"prompt": "red", "echo": True}, 400, "echo=True"),
    "no text": (CHAT, {"messages": HELLO, "detokenize": False}, 400, "detokenize=False is not supported"),
    "control tokens": (COMPLETION, {"prompt": "red", "skip_special_tokens": 0}, 400, "must be true or false"),
    "unknown option of a stream": (
        CHAT,
        {"messages": HELLO, "stream": True, "stream_options": {"include_usge": True}},
        400,
        "stream_options.include_usge is not supported (did you mean include_usage?)",
    ),
    "stream options of no kind": (COMPLETION, {"prompt": "red", "stream_options": 1}, 400, "must be a JSON"),
    "unknown stop token": (
        GENERATE,
        {"token_ids": [5], "sampling_params": {"stop_token_ids": [999999]}},
        400,
        "stop_token_ids: 999999 is no token id",
    ),
    "unknown option inside": (
        GENERATE,
        {"token_ids": [5], "sampling_params": {"beam_width": 3}},
        400,
        "sampling_params.beam_width is not supported",
    ),
    "no messages": (CHAT, {}, 400, "messages is missing"),
    "empty messages": (CHAT, {"messages": []}, 400, "at least one message"),
    "message without a role": (CHAT, {"messages": [{"content": "red"}]}, 400, "messages[0] must be an"),
    "image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text parts"),
    "tools of no kind": (CHAT, {"messages": HELLO, "tools": [{"name": "add"}]}, 400, "tools[0] must be"),
    "forced tool": (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "tool_choice='required'"),
    "unknown model": (CHAT, {"model": "gpt", "messages": HELLO}, 404, "this server has 'talker'"),
    "no object": (COMPLETION, [1], 400, "must be a JSON object"),
    "empty prompt": (COMPLETION, {"prompt": ""}, 400, "the prompt is empty"),
    "no prompt": (COMPLETION, {}, 400, "prompt must be"),
    "unknown token": (COMPLETION, {"prompt": [5, 99999]}, 400, "99999 is no token id"),
    "tokens of no kind": (GENERATE, {"token_ids": "red"}, 400, "token_ids must be a list"),
    "long prompt": (COMPLETION, {"prompt": [15] * 1024}, 400, "the prompt has 1024 tokens"),
    "temperature": (COMPLETION, {"prompt": "red", "temperature": -1}, 400, "must lie in"),
    "seed": (COMPLETION, {"prompt": "red", "seed": 1.5}, 400, "seed=1.5 must be an integer"),
    "no tokens": (COMPLETION, {"prompt": "red", "max_tokens": 0}, 400, "max_tokens=0"),
    "stop": (COMPLETION, {"prompt": "red", "stop": [""]}, 400, "stop must be"),
    "flag": (COMPLETION, {"prompt": "red", "stream": "yes"}, 400, "stream must be true or false"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_a_reason(name, http):
    route, body, status, message = REFUSED[name]
    answer = http.post(route, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert message in error["message"] and error["type"] == "invalid_request_error"


def test_codes_that_clients_look_at(http):
    long = http.post(COMPLETION, json={"prompt": [15] * 1500}).json()["error"]
    assert long["code"] == "context_length_exceeded"
    unknown = http.post(COMPLETION, json={"prompt": "red", "best": 1}).json()["error"]
    assert (unknown["code"], unknown["param"]) == ("unsupported_parameter", "best")


@pytest.mark.parametrize("body", [b"{", b"", b"\xff", b'{"temperature": NaN}', b"[" * 100_000])
def test_malformed_json(body, http):
    answer = http.post(CHAT, content=body)
    assert answer.status_code == 400 and "the body is not JSON" in answer.json()["error"]["message"]


def test_a_long_body(http):
    answer = http.post(CHAT, content=b" " * (1 << 20) + b"{}")
    assert answer.status_code == 413 and "serve.max_body_mb" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}]
)
def test_a_wrong_or_missing_token(headers, server):
    with httpx.Client(base_url=server.url, trust_env=False, headers=headers) as stranger:
        for answer in (stranger.get("/v1/models"), stranger.post(CHAT, json={"messages": HELLO})):
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get("/health").status_code == 200  # for those who only watch


def test_unknown_routes(http):
    assert http.get("/v2").status_code == 404 and http.get(CHAT).status_code == 405
    assert "GET /v2" in http.get("/v2").json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slots(stream, server, http):
    before = http.get("/health").json()["responses"]
    # As many responses as may be asked for at once, which do not end.
    body = {"prompt": "north", "n": 12, "temperature": 0, "max_tokens": 1000, "stream": stream}
    text = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {COMPLETION} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer secret\r\n"
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(head.encode() + f"Content-Length: {len(text)}\r\n\r\n".encode() + text)
            wait_until(lambda: in_work(http))
        wait_until(lambda: not in_work(http))
    assert http.get("/health").json()["responses"] - before < 36  # the others were given up
    answer = http.post(COMPLETION, json={"prompt": "red", "max_tokens": 2})
    assert answer.status_code == 200


def in_work(http):
    health = http.get("/health").json()
    return health["busy"] + health["waiting"]
