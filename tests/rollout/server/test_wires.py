"""Requests and answers of the servers, spelled as their sources spell them."""

import json

import numpy as np
import pytest

from empg_jax.models.filtering import TokenFilter
from empg_jax.rollout.server.answers import Ask, BadAnswer, Sampled, SamplerError, check_answer
from empg_jax.rollout.server.wires import WIRES, find_wire

ASK = Ask(
    prompt=np.array([5, 6, 7], np.int32),
    max_tokens=4,
    ids=(0, 12, 3, 1),
    seed=2**61 + 5,
    temperature=0.5,
    token_filter=TokenFilter(top_p=0.9, top_k=20),
    stops=("\n",),
    stop_ids=(2, 3),
)
# vllm/entrypoints/openai/completion/protocol.py, CompletionResponse.
VLLM = {
    "id": "cmpl-b0f1",
    "object": "text_completion",
    "created": 1764200000,
    "model": "policy",
    "choices": [
        {
            "index": 0,
            "text": " go to desk 1",
            "logprobs": {
                "text_offset": [0, 3, 6],
                "token_logprobs": [-0.25, -1.5, -0.125],
                "tokens": ["token_id:11", "token_id:12", "token_id:2"],
                "top_logprobs": [{"token_id:11": -0.25}, {"token_id:9": -0.5}, {"token_id:2": -0.125}],
            },
            "finish_reason": "stop",
            "stop_reason": None,
            "token_ids": [11, 12, 2],
            "prompt_logprobs": None,
            "prompt_token_ids": [5, 6, 7],
            "routed_experts": None,
        }
    ],
    "service_tier": None,
    "system_fingerprint": None,
    "usage": {
        "prompt_tokens": 3,
        "total_tokens": 6,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 2},
    },
    "kv_transfer_params": None,
}
# The answer of SGLang's /generate with return_logprob.
SGLANG = {
    "text": " go to desk 1",
    "output_ids": [11, 12, 2],
    "meta_info": {
        "id": "8a1c",
        "finish_reason": {"type": "stop", "matched": 2},
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "cached_tokens": 2,
        "weight_version": "7",
        "input_token_logprobs": [[None, 7, None]],
        "output_token_logprobs": [[-0.25, 11, None], [-1.5, 12, None], [-0.125, 2, None]],
        "e2e_latency": 0.02,
    },
}
OWN = {
    **VLLM,
    "choices": [
        {
            **VLLM["choices"][0],
            "logprobs": {**VLLM["choices"][0]["logprobs"], "tokens": [" go", " to", "<|end|>"]},
            "empg": {
                "version": 3,
                "process": "a1",
                "entropies": [0.5, 1.0, 0.25],
                "versions": [7, 7, 7],
                "logprobs": [-0.3, -1.6, -0.2],
                "sampling_logprobs": [-0.25, -1.5, -0.125],
            },
        }
    ],
}


def changed(body, **fields):
    """The answer with other fields in its choice."""
    return {**body, "choices": [{**body["choices"][0], **fields}]}


@pytest.mark.parametrize(("kind", "body"), [("vllm", VLLM), ("sglang", SGLANG), ("empg-jax", OWN)])
def test_answers_are_read(kind, body):
    sampled = WIRES[kind].read(json.loads(json.dumps(body)))
    assert sampled.tokens.tolist() == [11, 12, 2] and sampled.tokens.dtype == np.int32
    assert sampled.logprobs.tolist() == [-0.25, -1.5, -0.125] and sampled.logprobs.dtype == np.float32
    assert (sampled.finish_reason, sampled.cached) == ("stop", 2)
    assert sampled.version == (None if kind == "vllm" else "7")
    assert sampled.process == ("a1" if kind == "empg-jax" else None)
    assert (sampled.entropies is None) == (kind != "empg-jax")
    check_answer(sampled, ASK, 32)


def test_tokens_come_from_their_spelling_where_there_is_no_list():
    assert WIRES["vllm"].read(changed(VLLM, token_ids=None)).tokens.tolist() == [11, 12, 2]


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("vllm", changed(VLLM, logprobs=None), "without log-probabilities"),
        ("vllm", changed(OWN, token_ids=None), "without token ids"),
        ("vllm", changed(VLLM, token_ids=[11, 12, 3]), "different tokens"),
        ("vllm", {**VLLM, "choices": []}, "one choice"),
        ("vllm", {"object": "error"}, "without choices"),
        ("vllm", [], "without choices"),
        ("empg-jax", VLLM, "without the field"),
        ("empg-jax", changed(OWN, empg={"versions": [7, 8, 8], "entropies": [0, 0, 0]}), "versions"),
        ("sglang", {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "OOM"}}}, "OOM"),
        ("sglang", {"meta_info": {"finish_reason": {"type": "stop"}}}, "without log-probabilities"),
    ],
)
def test_answers_without_what_is_needed_are_refused(kind, body, why):
    with pytest.raises(BadAnswer, match=why):
        WIRES[kind].read(body)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"tokens": [11] * 5, "logprobs": [-1.0] * 5}, "5 tokens, but max_tokens was 4"),
        ({"tokens": [], "logprobs": []}, "0 tokens"),
        ({"tokens": [11, 2], "logprobs": [-1.0]}, "1 log-probabilities of 2"),
        ({"tokens": [40, 2], "logprobs": [-1.0, -1.0]}, "token 40, but this run's model knows 32"),
        ({"tokens": [11, 2], "logprobs": [-1.0, -9999.0]}, "no sampled token"),
        ({"tokens": [11, 2], "logprobs": [-1.0, float("nan")]}, "no sampled token"),
        ({"tokens": [11, 2], "logprobs": [-1.0, 0.5]}, "no sampled token"),
        ({"tokens": [11], "logprobs": [-1.0], "finish_reason": "length"}, "cut at 1 of 4"),
        ({"tokens": [11], "logprobs": [-1.0], "finish_reason": "abort"}, "finish_reason 'abort'"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_refused(fields, why):
    fields = {"finish_reason": "stop"} | fields
    arrays = {"tokens": np.array(fields["tokens"], np.int32), "logprobs": np.array(fields["logprobs"])}
    with pytest.raises(BadAnswer, match=why):
        check_answer(Sampled(**{**fields, **arrays}), ASK, 32)


def test_a_stop_token_that_the_server_cut_off_is_missed():
    sampled = Sampled(np.array([11], np.int32), np.array([-1.0], np.float32), "stop")
    check_answer(sampled, ASK, 32)  # it may have been a stop string
    with pytest.raises(BadAnswer, match="stopped at token 11, which is no stop token"):
        check_answer(sampled, Ask(ASK.prompt, 4, ASK.ids, 1, 1.0, stop_ids=(2,)), 32)


def test_requests_say_everything():
    body = WIRES["vllm"].write("policy", ASK)
    assert body == {
        **{"model": "policy", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.5},
        **{"top_p": 0.9, "top_k": 20, "min_p": 0.0, "repetition_penalty": 1, "presence_penalty": 0},
        **{"frequency_penalty": 0, "seed": 2**61 + 5, "stop": ["\n"], "stop_token_ids": [2, 3]},
        **{"skip_special_tokens": False, "logprobs": 1, "return_token_ids": True},
        **{"return_tokens_as_token_ids": True, "include_stop_str_in_output": True},
    }
    assert WIRES["empg-jax"].write("policy", ASK)["empg"] == {"ids": [0, 12, 3, 1]}
    body = WIRES["sglang"].write("policy", Ask(ASK.prompt, 4, ASK.ids, 2**61 + 5, 1.0))
    assert body["input_ids"] == [5, 6, 7] and body["return_logprob"] is True
    options = body["sampling_params"]
    assert (options["max_new_tokens"], options["top_k"], options["sampling_seed"]) == (4, -1, 5)
    assert options["no_stop_trim"] is True


def test_weights_are_loaded_by_each_server_s_own_route():
    assert WIRES["vllm"].reload("/w/1", "3") == (
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/w/1"}}),
        ("/reset_prefix_cache", {}),
    )
    for kind in ("sglang", "empg-jax"):
        ((path, body),) = WIRES[kind].reload("/w/1", "3")
        assert path == "/update_weights_from_disk"
        assert (body["model_path"], body["weight_version"]) == ("/w/1", "3")


def test_a_server_names_its_kind():
    adapter = {"id": "adapter", "owned_by": "vllm", "parent": "policy", "max_model_len": None}
    base = {
        "id": "policy",
        "owned_by": "vllm",
        "root": "Qwen/Qwen3-0.6B",
        "parent": None,
        "max_model_len": 4096,
    }
    wire, model = find_wire({"object": "list", "data": [adapter, base]})
    assert (wire.name, model.name, model.max_tokens) == ("vLLM", "policy", 4096)
    for body in ({"data": []}, {}, [], {"data": [adapter]}):
        with pytest.raises(SamplerError, match="lists no model"):
            find_wire(body)
    with pytest.raises(SamplerError, match=r"'llamacpp' as the owner.*vllm, sglang, empg-jax"):
        find_wire({"data": [{"id": "m", "owned_by": "llamacpp"}]})
