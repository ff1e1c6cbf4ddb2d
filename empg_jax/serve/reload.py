"""New weights from a folder while the server runs: ``/update_weights_from_disk``, as SGLang has it.

A trainer elsewhere publishes by it (``rollout.engine=openai``). Requests that arrive after the answer are
sampled from the new weights; those in progress end with the old ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from empg_jax.engine.engine import Engine
from empg_jax.hf.config import config_from_hf, read_hf_config
from empg_jax.hf.hub import find_folder
from empg_jax.hf.load import load_hf
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.serve.answers import PROCESS
from empg_jax.serve.app import More
from empg_jax.serve.driver import MEMORY_ERRORS, Driver, Weights, lacks_memory
from empg_jax.serve.wire import ApiError, check_keys, refuse
from empg_jax.types import Params

# What a model computes by beside its weights' shapes.
_SAME = (
    *("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_scaling", "norm_eps"),
    *("tie_embeddings", "qkv_bias", "qk_norm", "moe"),
)

KEYS = frozenset({"model_path", "weight_version", "load_format", "abort_all_requests", "flush_cache"})


def make_reload(engine: Engine, driver: Driver, *, has_key: bool) -> More:
    """Make the route.

    Args:
      engine: takes the weights, on its own thread.
      driver: that thread.
      has_key: whether requests need a bearer token; without one nobody may change the weights.
    """
    turn = asyncio.Lock()  # one set of weights at a time is read into memory

    async def reload(request: Request, body: Any) -> Response:
        if not has_key:
            raise ApiError(403, "weights can be changed only where a token is needed: start with --api-key")
        if engine.base:
            raise refuse("this policy has adapters: serve a whole model to change its weights")
        given = check_keys(body, KEYS)
        path, version = given.get("model_path"), _read_version(given)
        # Not `Path.is_dir`, which raises where a path is too long.
        if not isinstance(path, str) or not os.path.isdir(path):
            raise refuse(f"model_path={path!r:.200} must be a folder that this server sees", "model_path")
        async with turn:
            params = await asyncio.to_thread(_load, engine, path)
            number = driver.version + 1 if version is None else version
            driver.publish(Weights(number, [params].pop))
        message = f"requests from now on are sampled from weights of version {number}"
        told = {"success": True, "message": message, "num_paused_requests": 0}
        return JSONResponse(told | {"empg": {"process": PROCESS}})

    return More("POST", "/update_weights_from_disk", reload)


def _read_version(given: dict[str, Any]) -> int | None:
    version = given.get("weight_version")
    if version is None:
        return None
    if not str(version).isdecimal() or int(version) >= 2**31:
        raise refuse(f"weight_version={version!r} must be a number in [0, 2**31)", "weight_version")
    return int(version)


def _load(engine: Engine, path: str) -> Params:
    """Read the weights to the host: beside the live ones, a device has room for the engine's copy alone."""
    # A critic's head is no part of what is published.
    model = dataclasses.replace(engine.model, value_head=False)
    try:
        folder = find_folder(path, ("config.json",), "model")
        _check_same(config_from_hf(read_hf_config(folder), max_length=engine.config.max_tokens), model)
        return load_hf(path, model, shardings=_host_shardings(model))[1]
    except (OSError, ValueError) as error:
        raise refuse(f"model_path={path}: {error}", "model_path") from None
    except MEMORY_ERRORS as error:
        if not lacks_memory(error):
            raise
        raise ApiError(503, f"model_path={path}: no memory for the weights: {error}") from None


def _check_same(given: DecoderConfig, served: DecoderConfig) -> None:
    """Refuse weights of a model that computes something else with them.

    Raises:
      ValueError: naming what differs.
    """
    pairs = {name: (getattr(given, name), getattr(served, name)) for name in _SAME}
    differing = [f"{name} is {a}, here {b}" for name, (a, b) in pairs.items() if a != b]
    if differing:
        raise ValueError("its config.json describes another model: " + "; ".join(differing))


def _host_shardings(model: DecoderConfig) -> Params | None:
    """Place every parameter on the host; None, for the default device, where JAX_PLATFORMS lacks it."""
    try:
        host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return None
    return jax.tree.map(lambda _: host, jax.eval_shape(lambda: init_params(jax.random.key(0), model)))
