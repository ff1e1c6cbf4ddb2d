"""Answers of the wire: JSON bodies of finished responses, and chunks of those in progress.

Beside OpenAI's fields a choice may have vLLM's ``token_ids`` and our own ``empg``, which no other wire
carries. They come with ``return_token_ids``, and always from ``/inference/v1/generate``::

    "empg": {"version": 3, "process": "...", "entropies": [...], "versions": [...], "logprobs": [...],
             "sampling_logprobs": [...]}

One number per token of ``token_ids``: the entropy of the whole distribution in nats and the log-probability
of the token, both at the request's temperature (at 1 for greedy sampling), without any truncation; the
version of the weights that sampled it; and the log-probability in the distribution that it was drawn from,
which top-p, top-k and min-p have cut. ``version`` counts changes of this format. ``process`` is another one
after a restart, which brings back the first weights. OpenAI's own ``logprobs`` are those of the distribution
that was drawn from, too: a trainer's ratios need them.

A chat whose prompt ends with the tag that opens a thought has ``"opens_thought": true`` in ``empg``, whatever
was asked for: the text lacks that tag, and without an end of the thought it is no answer.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from empg_jax.engine.engine import Response
from empg_jax.serve.text import TextPlaces

STATISTICS_VERSION = 3
PROCESS = secrets.token_hex(8)

Body = dict[str, Any]
Spell = Callable[[int], tuple[str, bytes | None]]  # a token's text, and its bytes where they are known


@dataclasses.dataclass(frozen=True)
class Head:
    """The fields that all chunks of an answer share."""

    kind: str  # chat.completion or text_completion
    model: str
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        """Whether choices hold messages."""
        return self.kind == "chat.completion"

    def body(self, choices: list[Body], **fields: Any) -> Body:
        """Return a whole answer."""
        return self._fields(self.kind) | {"choices": choices} | fields

    def chunk(self, choices: list[Body], **fields: Any) -> Body:
        """Return one chunk of a stream."""
        return self._fields("chat.completion.chunk" if self.is_chat else self.kind) | {
            "choices": choices,
            **fields,
        }

    def _fields(self, kind: str) -> Body:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


@dataclasses.dataclass(frozen=True)
class Detail:
    """What the choices of an answer list beside their text."""

    has_logprobs: bool
    has_tokens: bool
    opens_thought: bool


def describe_tokens(
    response: Response,
    start: int,
    head: Head,
    detail: Detail,
    spell: Spell,
    places: TextPlaces,
) -> Body:
    """List the fields of a choice about its tokens from token ``start`` on; ``places`` took those before."""
    fields: Body = {}
    tokens = response.tokens[start:].tolist()
    if detail.has_logprobs:
        logprobs = as_floats(response.logprobs[start:])
        words = [spell(token) for token in tokens]
        fields["logprobs"] = (
            _chat_logprobs(words, logprobs)
            if head.is_chat
            else _logprobs([word for word, _ in words], logprobs, places.take(tokens))
        )
    if detail.has_tokens:
        fields |= {"token_ids": tokens, "empg": describe_statistics(response, start)}
    if detail.opens_thought and not start:
        fields["empg"] = fields.get("empg", {}) | {"opens_thought": True}
    return fields


def describe_statistics(response: Response, start: int = 0) -> Body:
    """Return the extra field with one number of each kind per token."""
    full = response.logprobs if response.full_logprobs is None else response.full_logprobs
    return {
        "version": STATISTICS_VERSION,
        "process": PROCESS,
        "entropies": as_floats(response.entropies[start:]),
        "versions": response.versions[start:].tolist(),
        "logprobs": as_floats(full[start:]),
        "sampling_logprobs": as_floats(response.logprobs[start:]),
    }


def describe_usage(prompts: Sequence[int], responses: Iterable[Response], cached: int) -> Body:
    """Count the tokens of an answer; ``cached`` prompt tokens were in the cache already."""
    prompt, sampled = sum(prompts), sum(len(response.tokens) for response in responses)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def describe_generated(responses: Sequence[Response], request_id: str) -> Body:
    """Return the answer of ``/inference/v1/generate``, as vLLM gives it and verifiers reads it."""
    return {
        "request_id": request_id,
        "choices": [
            {
                "index": index,
                "token_ids": response.tokens.tolist(),
                "finish_reason": response.finish_reason,
                "logprobs": _chat_logprobs(
                    [(word, word.encode()) for word in map("token_id:{}".format, response.tokens.tolist())],
                    as_floats(response.logprobs),
                ),
                "empg": describe_statistics(response),
            }
            for index, response in enumerate(responses)
        ],
        "prompt_logprobs": None,
        "kv_transfer_params": None,
    }


def as_delta(message: Mapping[str, Any], *, is_first: bool) -> Body:
    """Turn a message, or a piece of one, into a stream's ``delta``."""
    delta = {key: value for key, value in message.items() if key != "role"}
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
    return {"role": "assistant", **delta} if is_first else delta


def as_floats(values: np.ndarray) -> list[float]:
    """Convert float32 numbers to JSON: the shortest decimals that give the same number."""
    return [float(str(value)) for value in np.asarray(values, np.float32)]


def _chat_logprobs(words: Sequence[tuple[str, bytes | None]], logprobs: Sequence[float]) -> Body:
    return {
        "content": [
            {
                "token": word,
                "logprob": logprob,
                "bytes": None if raw is None else list(raw),
                "top_logprobs": [],
            }
            for (word, raw), logprob in zip(words, logprobs, strict=True)
        ]
    }


def _logprobs(words: Sequence[str], logprobs: Sequence[float], places: Sequence[int]) -> Body:
    return {
        "tokens": list(words),
        "token_logprobs": list(logprobs),
        "top_logprobs": None,
        "text_offset": list(places),
    }
