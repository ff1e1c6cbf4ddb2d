"""What vLLM 0.32.0 really answered (on CPU, 27 November 2026), read and acted upon by this side."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from empg_jax.rollout.server.answers import Ask, BadAnswer, SamplerError, check_answer
from empg_jax.rollout.server.wires import find_wire
from tests.rollout.server.standin import StandIn, collect, connected, make_ask

RECORDED = json.loads((Path(__file__).parent / "vllm_0.32.0.json").read_text())
VOCABULARY = 71


def body(name):
    return RECORDED[name]["body"]


def read(name, **asked):
    """The response of a recorded answer, checked against what was asked for."""
    asked = {"prompt": np.array([4, 5, 6], np.int32), "max_tokens": 4, "stop_ids": (1,)} | asked
    ask = Ask(ids=(0, 0, 0, 0), seed=2**61 + 5, temperature=1.0, **asked)
    sampled = find_wire(body("models"))[0].read(body(name))
    check_answer(sampled, ask, VOCABULARY)
    return sampled


def test_the_model():
    wire, model = find_wire(body("models"))
    assert (wire.name, model.name, model.max_tokens) == ("vLLM", "/models/policy", 256)


def test_a_response_of_full_length():
    sampled = read("length")
    assert sampled.tokens.tolist() == [23, 68, 11, 50] and sampled.finish_reason == "length"
    assert sampled.logprobs.dtype == np.float32 and np.isclose(sampled.logprobs[0], -4.014245)
    assert sampled.entropies is None and sampled.version is None and sampled.cached == 0


def test_ends():
    token = read("stop_token", stop_ids=tuple(range(1, 71)))
    assert (token.tokens.tolist(), token.finish_reason) == ([23], "stop")
    # The text ends within the token that completes the stop string; the token is whole.
    string = read("stop_string", stops=("e",), max_tokens=20)
    assert (string.tokens.tolist(), string.finish_reason) == ([23], "stop")
    assert body("stop_string")["choices"][0]["text"] == "cle"


def test_cached_prompts_are_counted():
    assert read("cached", prompt=np.arange(200, dtype=np.int32) % 60).cached == 128


def test_a_response_cut_by_the_server_s_own_limit_is_refused():
    with pytest.raises(BadAnswer, match="cut at 6 of 10 tokens: does the server hold conversations as long"):
        read("cut", prompt=np.arange(250, dtype=np.int32) % 60, max_tokens=10)


class Recorded(StandIn):
    """Answers routes with what was recorded, by name and in order; the last again and again."""

    def __init__(self, **answers):
        super().__init__("vllm")
        self.answers, self.paths = answers, []

    async def handle(self, request):
        self.paths.append(request.url.path)
        waiting = self.answers.get(request.url.path.strip("/"))
        if waiting:
            said = RECORDED[waiting.pop(0) if len(waiting) > 1 else waiting[0]]
            return httpx.Response(said["status"], json=said["body"])
        return await super().handle(request)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_long", "maximum context length is 256 tokens"),
        ("foreign_token", "Token id 999 is out of vocabulary"),
        ("too_hot", r"temperature must be in \[0, 2\], got 4"),
    ],
)
def test_refusals_are_told_in_the_server_s_words(name, said):
    with connected(Recorded(**{"v1/completions": [name]})) as client:
        number = client.ask(make_ask())
        with pytest.raises(SamplerError, match=rf"refuses POST /v1/completions: status 400, .*{said}"):
            collect(client, number)


def test_weights_count_as_loaded_when_the_old_prefixes_are_gone():
    """With a response in progress vLLM keeps them, and answers with status 200."""
    server = Recorded(collective_rpc=["reload"], reset_prefix_cache=["reset_busy", "reset_busy", "reset"])
    with connected(server) as client:
        client.publish("/w/1", 1)
    assert server.paths.count("/reset_prefix_cache") == 3


def test_a_folder_that_the_server_does_not_see_is_told_first():
    """It ends vLLM's engine, so that later failures say nothing of the cause."""
    server = Recorded(collective_rpc=["reload_of_no_folder", "after_that"])
    with (
        connected(server) as client,
        pytest.raises(SamplerError, match="does not load the weights of /models/nowhere"),
    ):
        client.publish("/models/nowhere", 1)
    server = Recorded(collective_rpc=["reload_of_no_folder", "after_that"])
    with (
        connected(server, patience=0) as client,
        pytest.raises(
            SamplerError, match=r"first failure: .*/models/nowhere.*; the last failure: .*EngineCore"
        ),
    ):
        client.publish("/models/nowhere", 1)
