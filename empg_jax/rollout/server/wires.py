"""The wires of the servers that can sample for a run: what they want to be asked, and where their answer is.

Pure functions from and to JSON. A server names its kind in ``GET /v1/models`` (``owned_by``):

* ``vllm``: ``/v1/completions`` with token ids as prompt and ``return_token_ids`` (vLLM 0.10.2 and later);
  weights by ``/collective_rpc`` with ``reload_weights``, which exists with ``VLLM_SERVER_DEV_MODE=1``.
* ``sglang``: its own ``/generate`` with ``input_ids``, because its completions tell no token ids; weights by
  ``/update_weights_from_disk``.
* ``empg-jax``: our ``/v1/completions``, whose field ``empg`` tells entropies, versions and the process and
  takes the numbers of the sampling keys; weights by the route of SGLang's name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from empg_jax.rollout.server.answers import Ask, BadAnswer, Sampled, SamplerError

Body = dict[str, Any]
TOKEN = "token_id:"


@dataclasses.dataclass(frozen=True)
class Wire:
    """How to talk to one kind of server.

    Attributes:
      name: the server, for messages.
      path: route of a response.
      write: from the model's name and what is asked to the body.
      read: from the answer to the response; raises `BadAnswer`.
      reload: from a folder of weights and their version to the routes, with their bodies, that load them.
      hint: what a server without such a route lacks.
    """

    name: str
    path: str
    write: Callable[[str, Ask], Body]
    read: Callable[[Any], Sampled]
    reload: Callable[[str, str], Sequence[tuple[str, Body]]]
    hint: str


@dataclasses.dataclass(frozen=True)
class Model:
    """The model that a server serves: its name, and its longest conversation if told."""

    name: str
    max_tokens: int | None


def find_wire(body: Any) -> tuple[Wire, Model]:
    """Read ``GET /v1/models``.

    Raises:
      SamplerError: it lists no model, or the server is of an unknown kind.
    """
    models = body.get("data") if isinstance(body, Mapping) else None
    # Adapters that vLLM serves beside the model name it as their parent.
    whole = [m for m in models or [] if isinstance(m, Mapping) and m.get("id") and not m.get("parent")]
    if not whole:
        raise SamplerError("GET /v1/models lists no model")
    kind, longest = whole[0].get("owned_by"), whole[0].get("max_model_len")
    if kind not in WIRES:
        raise SamplerError(
            f"GET /v1/models names {kind!r} as the owner of its model; this run can talk to the servers of "
            f"{', '.join(WIRES)}"
        )
    return WIRES[kind], Model(str(whole[0]["id"]), longest if isinstance(longest, int) else None)


# ------------------------------------------------------------------------------------- completions


def _completion(model: str, ask: Ask) -> Body:
    # Everything is said: a server fills gaps from the model's generation_config.json.
    return {
        "model": model,
        "prompt": ask.prompt.tolist(),
        "max_tokens": ask.max_tokens,
        "temperature": ask.temperature,
        **ask.token_filter._asdict(),
        "repetition_penalty": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "seed": ask.seed,
        "stop": list(ask.stops),
        "stop_token_ids": list(ask.stop_ids),
        "logprobs": 1,
        "return_token_ids": True,
    }


def _read_completion(body: Any) -> tuple[Sampled, Mapping[str, Any]]:
    choice = _only(_get(body, "choices"))
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping) or logprobs.get("token_logprobs") is None:
        raise BadAnswer("an answer without log-probabilities (choices[0].logprobs.token_logprobs)")
    words, tokens = logprobs.get("tokens") or [], choice.get("token_ids")
    spelled = [word for word in words if isinstance(word, str) and word.startswith(TOKEN)]
    if len(spelled) == len(words) and words:
        said = [int(word.removeprefix(TOKEN)) for word in spelled]
        if tokens is not None and list(tokens) != said:
            raise BadAnswer("token_ids and logprobs.tokens of the answer are different tokens")
        tokens = said
    if tokens is None:
        raise BadAnswer("an answer without token ids (choices[0].token_ids); vLLM has them since 0.10.2")
    usage = body.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
    sampled = Sampled(
        _integers(tokens),
        _numbers(logprobs["token_logprobs"]),
        str(choice.get("finish_reason")),
        cached=_count(details, "cached_tokens"),
    )
    return sampled, choice


# -------------------------------------------------------------------------------------------- vLLM


def _write_vllm(model: str, ask: Ask) -> Body:
    more = ("return_tokens_as_token_ids", "include_stop_str_in_output")
    return _completion(model, ask) | {"skip_special_tokens": False, **dict.fromkeys(more, True)}


def _read_vllm(body: Any) -> Sampled:
    return _read_completion(body)[0]


def _reload_vllm(folder: str, version: str) -> Sequence[tuple[str, Body]]:
    # Prefixes that the old weights computed must go, too.
    reload = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
    return (("/collective_rpc", reload), ("/reset_prefix_cache", {}))


# ---------------------------------------------------------------------------------------- empg-jax


def _write_own(model: str, ask: Ask) -> Body:
    return _completion(model, ask) | {"empg": {"ids": list(ask.ids)}}


def _read_own(body: Any) -> Sampled:
    sampled, choice = _read_completion(body)
    told = choice.get("empg")
    if not isinstance(told, Mapping):
        raise BadAnswer("an answer without the field choices[0].empg")
    versions = set(_get(told, "versions"))
    if len(versions) != 1:
        raise BadAnswer(f"a response of the versions {sorted(versions)}, where one was expected")
    return dataclasses.replace(
        sampled,
        entropies=_numbers(_get(told, "entropies")),
        version=str(versions.pop()),
        process=read_process(choice),
    )


def read_process(body: Any) -> str | None:
    """Return the server's process, as our own tells it in a choice and with weights that are loaded."""
    told = body.get("empg") if isinstance(body, Mapping) else None
    return told.get("process") if isinstance(told, Mapping) else None


def _reload_own(folder: str, version: str) -> Sequence[tuple[str, Body]]:
    return (("/update_weights_from_disk", {"model_path": folder, "weight_version": version}),)


# ------------------------------------------------------------------------------------------ SGLang


def _write_sglang(model: str, ask: Ask) -> Body:
    kept = ask.token_filter
    return {
        "input_ids": ask.prompt.tolist(),
        "sampling_params": {
            "max_new_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "top_p": kept.top_p,
            "top_k": kept.top_k or -1,
            "min_p": kept.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "sampling_seed": ask.seed & 0x7FFFFFFF,
            "stop": list(ask.stops),
            "stop_token_ids": list(ask.stop_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
        },
        "return_logprob": True,
    }


def _read_sglang(body: Any) -> Sampled:
    meta = _get(body, "meta_info")
    reason = _get(meta, "finish_reason")
    kind = reason.get("type") if isinstance(reason, Mapping) else reason
    if kind == "abort":
        raise BadAnswer(f"the server gave the response up: {reason.get('message', 'no reason told')}")
    entries = meta.get("output_token_logprobs")
    if not entries:
        raise BadAnswer("an answer without log-probabilities (meta_info.output_token_logprobs)")
    if not all(isinstance(entry, Sequence) and len(entry) >= 2 for entry in entries):
        raise BadAnswer("meta_info.output_token_logprobs are no pairs of log-probability and token id")
    version = meta.get("weight_version")
    return Sampled(
        _integers([entry[1] for entry in entries]),
        _numbers([entry[0] for entry in entries]),
        str(kind),
        version=None if version is None else str(version),
        cached=_count(meta, "cached_tokens"),
    )


def _reload_sglang(folder: str, version: str) -> Sequence[tuple[str, Body]]:
    return (
        ("/update_weights_from_disk", {"model_path": folder, "weight_version": version, "flush_cache": True}),
    )


# ------------------------------------------------------------------------------------- JSON's parts


def _get(body: Any, key: str) -> Any:
    if not isinstance(body, Mapping) or body.get(key) is None:
        raise BadAnswer(f"an answer without {key}")
    return body[key]


def _only(choices: Any) -> Mapping[str, Any]:
    if not isinstance(choices, Sequence) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise BadAnswer("an answer that does not have one choice")
    return choices[0]


def _integers(values: Any) -> np.ndarray:
    if not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise BadAnswer("token ids that are no such integers")
    return np.asarray(values, np.int32)


def _numbers(values: Any) -> np.ndarray:
    if not all(isinstance(value, int | float) for value in values):
        raise BadAnswer("a token without a number, where its log-probability or entropy should be")
    return np.asarray(values, np.float32)


def _count(counts: Any, key: str) -> int:
    value = counts.get(key) if isinstance(counts, Mapping) else None
    return value if isinstance(value, int) else 0


WIRES = {
    "vllm": Wire(
        "vLLM",
        "/v1/completions",
        _write_vllm,
        _read_vllm,
        _reload_vllm,
        "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment",
    ),
    "sglang": Wire(
        "SGLang",
        "/generate",
        _write_sglang,
        _read_sglang,
        _reload_sglang,
        "start a server of SGLang itself, not a router in front of it",
    ),
    "empg-jax": Wire(
        "empg-jax serve",
        "/v1/completions",
        _write_own,
        _read_own,
        _reload_own,
        "start empg-jax serve without --train",
    ),
}
