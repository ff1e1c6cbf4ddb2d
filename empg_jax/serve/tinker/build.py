"""The parts of the training API, put together for a policy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from empg_jax.config.places import expand
from empg_jax.errors import ConfigError, writing
from empg_jax.serve.app import More
from empg_jax.serve.driver import Driver
from empg_jax.serve.policy import Policy
from empg_jax.serve.service import Service
from empg_jax.serve.tinker.futures import Futures
from empg_jax.serve.tinker.routes import About, Api
from empg_jax.serve.tinker.rows import Limits
from empg_jax.serve.tinker.samplers import Samplers
from empg_jax.serve.tinker.store import Store
from empg_jax.serve.tinker.tenant import Patience, Tenant
from empg_jax.serve.tinker.trainer import Trainer
from empg_jax.serve.tinker.worker import Worker


def make_routes(
    policy: Policy, service: Service, driver: Driver, worker: Worker, say: Callable[[str], None]
) -> list[More]:
    """Build the training API.

    Args:
      policy: the policy, opened for training.
      service: its side of sample requests.
      driver: the engine's thread.
      worker: the thread that trains.
      say: receives messages for the user.

    Raises:
      ConfigError: ``serve.save_dir`` cannot be written.
    """
    start, settings = policy.start, policy.config.serve
    assert start is not None
    longest = policy.engine.config.max_tokens
    limits = Limits(
        vocab_size=start.model.vocab_size,
        max_tokens=longest,
        micro_tokens=max(longest, policy.config.train.micro_tokens),
        mesh=start.mesh,
    )
    trainer, futures = Trainer(start, limits), Futures()
    folder = expand(settings.save_dir, "serve.save_dir").absolute()
    store = Store(folder, policy.name, start.params)
    samplers = Samplers(
        service,
        driver,
        trainer=trainer,
        worker=worker,
        futures=futures,
        store=store,
        keep=settings.snapshots,
    )
    patience = Patience(settings.gap_timeout, settings.session_timeout)
    tenant = Tenant(trainer, worker, futures, samplers, store, patience=patience, say=say)
    about = About(
        policy.name,
        max_tokens=longest,
        tokenizer=str(_save_tokenizer(policy, folder)),
        lora_rank=0 if start.model.lora is None else start.model.lora.rank,
        max_body_bytes=settings.max_body_mb << 20,
    )
    return Api(tenant, samplers, futures, about).routes()


def _save_tokenizer(policy: Policy, folder: Path) -> Path:
    """Write the tokenizer where clients on this machine can load it."""
    # Clients cut the name of a tokenizer at its first colon.
    home = folder / "tokenizers" / re.sub(r"[^A-Za-z0-9._-]", "-", policy.name)
    with writing(f"serve.save_dir={folder}", ConfigError):
        policy.tokenizer.save(home)
    return home
