"""A request that was read: what to sample, and how to answer."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np

from empg_jax.engine.engine import Response
from empg_jax.serve.answers import Body, Detail, Head
from empg_jax.serve.driver import Job, Update
from empg_jax.serve.wire import Sampling
from empg_jax.text.stops import StopSearch, first_stop


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request that can be served: its prompts and how to answer.

    Attributes:
      prompts: token ids; each is answered ``sampling.n`` times.
      sampling: how to sample.
      head: the answer's fields; None for ``/inference/v1/generate``.
      decode: maps token ids to text.
      tools: the tools that responses may call.
      has_open_thought: whether the prompt ends with the tag that opens a thought.
      has_one_call: whether an answer tells the first call of a response only; its tokens stay as sampled.
      is_streamed: whether the answer is a stream.
      has_usage: whether a stream ends with the counts of tokens.
      has_tokens: whether the answer lists token ids and their statistics.
      key: the numbers that the sampling keys are folded from; None makes them from the seed.
      request_id: the name of an answer without a head.
    """

    prompts: list[np.ndarray]
    sampling: Sampling
    head: Head | None
    decode: Callable[..., str]
    tools: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    has_open_thought: bool = False
    has_one_call: bool = False
    is_streamed: bool = False
    has_usage: bool = False
    has_tokens: bool = False
    key: tuple[int, int, int, int] | None = None
    request_id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(12))

    @property
    def num_choices(self) -> int:
        """Number of responses."""
        return len(self.prompts) * self.sampling.n

    @property
    def detail(self) -> Detail:
        """What the choices list beside their text."""
        return Detail(self.sampling.has_logprobs, self.has_tokens, self.has_open_thought)

    def describe_stop(self, response: Response) -> Body:
        """Return vLLM's ``stop_reason``, the stop string or token that was met, to a request that has any."""
        ids, stops, stop_ids = response.tokens.tolist(), self.sampling.stops, self.sampling.stop_ids
        if not stops and not stop_ids:
            return {}
        found = first_stop(self.decode(ids), stops) if response.finish_reason == "stop" else None
        return {"stop_reason": ids[-1] if found is None and ids[-1] in stop_ids else found}

    def make_job(self, index: int, notify: Callable[[Update], None]) -> Job:
        """Make the job of choice ``index``."""
        s = self.sampling
        needs_watch = bool(s.stops or s.stop_ids)
        return Job(
            prompt=self.prompts[index // s.n],
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            token_filter=s.token_filter,
            seed=s.seed,
            choice=index,
            notify=notify,
            watch=StopSearch(self.decode, s.stops, s.stop_ids) if needs_watch else None,
            is_streamed=self.is_streamed,
            key=self.key,
        )
