"""What is asked of a server and what it answers, on no wire in particular, with the check of the answer."""

from __future__ import annotations

import dataclasses

import numpy as np

from empg_jax.errors import RunError
from empg_jax.models.filtering import NO_FILTER, TokenFilter

SURELY_WRONG = -1000.0  # log-probability that no sampled token has; vLLM writes -9999 for minus infinity


class SamplerError(RunError):
    """A server that cannot sample for this run."""


class BadAnswer(Exception):
    """An answer that nothing may be learned from."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One response to sample.

    Attributes:
      prompt: token ids.
      max_tokens: longest response.
      ids: the four numbers that our own engine folds its keys from.
      seed: for servers that know nothing of them.
      temperature: 0 is greedy.
      token_filter: restricts sampling to likely tokens.
      stops: stop strings.
      stop_ids: stop tokens.
    """

    prompt: np.ndarray
    max_tokens: int
    ids: tuple[int, int, int, int]
    seed: int
    temperature: float
    token_filter: TokenFilter = NO_FILTER
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One response.

    Attributes:
      tokens: int32[R].
      logprobs: float32[R], in the distribution that the tokens were drawn from.
      finish_reason: ``stop`` or ``length``, or what else the server says.
      entropies: float32[R]; None where the server tells none.
      version: of the weights, as the server tells it; None where it tells none.
      process: of the server, as it tells it; another one after a restart. None where it tells none.
      cached: prompt tokens that it did not prefill, as far as it tells.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    finish_reason: str
    entropies: np.ndarray | None = None
    version: str | None = None
    process: str | None = None
    cached: int = 0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A response that the server did not give; the reason."""

    reason: str


def check_answer(sampled: Sampled, ask: Ask, vocab_size: int) -> None:
    """Check that a response can be what was asked for.

    Raises:
      BadAnswer: it is empty, too long, cut short, of another vocabulary, or without a log-probability of
        every token.
    """
    count = len(sampled.tokens)
    if not 0 < count <= ask.max_tokens:
        raise BadAnswer(f"a response of {count} tokens, but max_tokens was {ask.max_tokens}")
    if len(sampled.logprobs) != count:
        raise BadAnswer(f"{len(sampled.logprobs)} log-probabilities of {count} tokens")
    if sampled.tokens.min() < 0 or sampled.tokens.max() >= vocab_size:
        wrong = next(int(token) for token in sampled.tokens if not 0 <= token < vocab_size)
        raise BadAnswer(f"token {wrong}, but this run's model knows {vocab_size}: another model is served")
    # Rounding may lift a log-probability a little above 0.
    if not np.all((sampled.logprobs > SURELY_WRONG) & (sampled.logprobs < 0.01)):
        raise BadAnswer("log-probabilities that no sampled token can have")
    if sampled.entropies is not None and len(sampled.entropies) != count:
        raise BadAnswer(f"{len(sampled.entropies)} entropies of {count} tokens")
    _check_end(sampled, ask)


def _check_end(sampled: Sampled, ask: Ask) -> None:
    count, last = len(sampled.tokens), int(sampled.tokens[-1])
    if sampled.finish_reason not in ("stop", "length"):
        raise BadAnswer(f"finish_reason {sampled.finish_reason!r} where stop or length was expected")
    if last in ask.stop_ids:
        return
    if sampled.finish_reason == "length" and count < ask.max_tokens:
        raise BadAnswer(
            f"a response that was cut at {count} of {ask.max_tokens} tokens: does the server hold "
            "conversations as long as rollout.max_tokens?"
        )
    # Where there are stop strings, their search decides.
    if sampled.finish_reason == "stop" and not ask.stops:
        raise BadAnswer(
            f"a response that stopped at token {last}, which is no stop token of this run's model "
            f"({', '.join(map(str, ask.stop_ids))})"
        )
