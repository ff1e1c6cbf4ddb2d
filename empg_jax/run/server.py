"""The server that samples a run (``rollout.engine=openai``): its check at the start, and its engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from empg_jax.config.places import expand
from empg_jax.engine.interface import SamplingEngine
from empg_jax.engine.sizes import EngineConfig
from empg_jax.errors import ConfigError
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.rollout.server.answers import Ask, SamplerError
from empg_jax.rollout.server.client import Client
from empg_jax.rollout.server.engine import ServerEngine
from empg_jax.rollout.server.folders import Folders, check_writable
from empg_jax.rollout.server.patience import Patience
from empg_jax.types import Params
from empg_jax.workers.faults import Tell, tell_nobody

if TYPE_CHECKING:
    from empg_jax.config import Config

SAME = 1e-3  # nats between log-probabilities that count as equal


def open_server(
    config: Config,
    model: DecoderConfig,
    sizes: EngineConfig,
    base: Params | None,
    *,
    tell: Tell = tell_nobody,
    check: Callable[[], None] = lambda: None,
) -> ServerEngine:
    """Connect to the server and build the engine on it; `make_sampler` says what the arguments are.

    Raises:
      ConfigError: as `check_server`; or weights cannot be published.
    """
    r, client = config.rollout, _connect(config, model, tell, check)
    home = None if r.weights_dir is None else expand(r.weights_dir, "rollout.weights_dir").absolute()
    try:
        folders = Folders(model, home)
    except SamplerError as error:
        client.close()
        raise ConfigError(str(error)) from None
    engine = ServerEngine(
        model,
        sizes,
        client,
        folders,
        seed=config.seed,
        temperature=r.temperature,
        token_filter=TokenFilter(r.top_p, r.top_k, r.min_p),
        stops=r.stop,
    )
    if base is not None:
        engine.base = base
    return engine


def check_server(config: Config, model: DecoderConfig) -> None:
    """Ask the server for a token, and check that what it answers can be trained on.

    Raises:
      ConfigError: it does not answer, is of an unknown kind, or cannot sample for this run.
    """
    _connect(config, model).close()


@contextlib.contextmanager
def closing_sampler(engine: SamplingEngine) -> Iterator[None]:
    """End the connection to a server after the block, and delete the published weights."""
    try:
        yield
    finally:
        if isinstance(engine, ServerEngine):
            engine.close()


def _connect(
    config: Config,
    model: DecoderConfig,
    tell: Tell = tell_nobody,
    check: Callable[[], None] = lambda: None,
) -> Client:
    """Connect to the server and check it."""
    client = None
    try:
        check_writable(model)
        client = _make_client(config, model.vocab_size, tell, check)
        client.connect()
        _check_length(client, config.rollout.max_tokens)
        _check_meaning(client, config)
    except SamplerError as error:
        if client is not None:
            client.close()
        raise ConfigError(str(error)) from None
    return client


def _make_client(config: Config, vocab_size: int, tell: Tell, check: Callable[[], None]) -> Client:
    faults = config.faults
    patience = Patience(faults.patience, backoff=faults.backoff, backoff_max=faults.backoff_max, tell=tell)
    assert config.rollout.url is not None  # a check of the configuration refuses this engine without
    return Client(
        config.rollout.url,
        timeout=config.rollout.request_timeout,
        patience=patience,
        vocab_size=vocab_size,
        check=check,
    )


def _check_length(client: Client, max_tokens: int) -> None:
    longest = client.model.max_tokens
    if longest is not None and longest < max_tokens:
        raise SamplerError(
            f"{client.url} serves {client.model.name} with conversations of at most {longest} tokens, but "
            f"rollout.max_tokens={max_tokens}"
        )


def _check_meaning(client: Client, config: Config) -> None:
    """Check what the server's log-probabilities are of: ratios need those of the distribution drawn from.

    The most likely token tells. With ``top_k=1`` it is certain, in that distribution; another temperature
    changes it, in the distribution before any filter; and nothing changes the model's own.
    """
    r = config.rollout
    token_filter = TokenFilter(r.top_p, r.top_k, r.min_p)
    if r.temperature == 1 and token_filter.is_off:
        _measure(client, 1.0, NO_FILTER)
        return
    cold, hot = (_measure(client, heat, TokenFilter(top_k=1)) for heat in (1.0, 2.0))  # vLLM takes no more
    if cold > -SAME and hot > -SAME:
        return
    if not token_filter.is_off:
        raise SamplerError(
            f"the log-probabilities of {client.url} ({client.wire.name}) are not those of the filtered "
            "distribution, which rollout.top_p, rollout.top_k and rollout.min_p need: start vLLM with "
            "--logprobs-mode processed_logprobs; SGLang has no such log-probabilities"
        )
    if abs(cold - hot) < SAME:
        raise SamplerError(
            f"the log-probabilities of {client.url} ({client.wire.name}) are those of temperature 1, but "
            f"rollout.temperature={r.temperature:g}: start vLLM with --logprobs-mode processed_logprobs, "
            "SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )


def _measure(client: Client, temperature: float, token_filter: TokenFilter) -> float:
    """Return the log-probability of one token."""
    ask = Ask(
        prompt=np.ones(1, np.int32),
        max_tokens=1,
        ids=(0, 0, 0, 0),
        seed=0,
        temperature=temperature,
        token_filter=token_filter,
    )
    return float(client.try_one(ask).logprobs[0])
