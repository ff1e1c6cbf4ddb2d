"""The routes below ``/api/v1``: bodies are read and checked, work is begun, results are waited for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from empg_jax.serve.app import Handler, More, parse_json
from empg_jax.serve.tinker import codec
from empg_jax.serve.tinker.futures import Futures, Pending
from empg_jax.serve.tinker.samplers import Samplers
from empg_jax.serve.tinker.tenant import Tenant
from empg_jax.serve.tinker.trainer import AdamParams
from empg_jax.serve.wire import ApiError, is_number, reading, refuse

POLL_SECONDS = 20.0  # the official client gives up a poll after 45
MAX_DATUMS = 1_000_000  # of a request: credit sees one request, so clients should not split a batch
PROTOBUF = "application/x-protobuf"
_BODY_SHARE = 0.7  # clients count payloads only, without names and lengths

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class About:
    """What the server tells of itself.

    Attributes:
      name: the base model's name.
      max_tokens: longest conversation.
      tokenizer: folder of the tokenizer's files.
      lora_rank: rank of the adapters in training; 0 trains all weights.
      max_body_bytes: longest body that is read.
    """

    name: str
    max_tokens: int
    tokenizer: str
    lora_rank: int
    max_body_bytes: int


class Api:
    """The handlers.

    Args:
      tenant: the training side.
      samplers: the sampling side.
      futures: where results are.
      about: what the server tells of itself.
    """

    def __init__(self, tenant: Tenant, samplers: Samplers, futures: Futures, about: About) -> None:
        self._tenant, self._samplers, self._futures, self._about = tenant, samplers, futures, about

    def routes(self) -> list[More]:
        """List the routes."""
        plain: dict[str, Callable[[Body], Body]] = {
            "client/config": self._client_config,
            "client/dynamic_config": lambda body: {"sample_cancel_enabled": True},
            "create_session": self._create_session,
            "session_heartbeat": self._heartbeat,
            "telemetry": lambda body: {"status": "accepted"},
            "get_info": self._get_info,
            "cancel_future": self._cancel,
            "asample": self._sample,
        }
        begun: dict[str, Callable[[Body], Pending]] = {
            "create_model": self._create_model,
            "unload_model": lambda body: self._tenant.unload(body.get("model_id")),
            "optim_step": self._step,
            "save_weights": self._save,
            "save_weights_for_sampler": self._save_for_sampler,
            "load_weights": self._load,
        }
        posts: dict[str, Handler] = {
            **{path: _answering(call) for path, call in plain.items()},
            **{path: _answering(_promising(call)) for path, call in begun.items()},
            "create_sampling_session": self._create_sampling_session,
            "sessions/{session_id}/finish": self._finish_session,
            "retrieve_future": self._retrieve,
        }
        gets: dict[str, Handler] = {
            "healthz": self._health,
            "get_server_capabilities": self._capabilities,
            "samplers/{sampler_id}": self._describe_sampler,
        }
        batch = More("POST", "/api/v1/forward_backward", self._run_batch, is_json=False)
        return [
            batch,
            *(More("POST", f"/api/v1/{path}", handler) for path, handler in posts.items()),
            *(More("GET", f"/api/v1/{path}", handler) for path, handler in gets.items()),
        ]

    # ---------------------------------------------------------------------------- server and session

    def _client_config(self, body: Body) -> Body:
        return {
            "pjwt_auth_enabled": False,
            "proto_compress_fwdbwd": False,
            "parallel_fwdbwd_chunks": True,
            "fwdbwd_max_chunk_len": MAX_DATUMS,
            "fwdbwd_max_chunk_bytes_count": int(_BODY_SHARE * self._about.max_body_bytes),
        }

    async def _health(self, request: Request, body: Any) -> Response:
        return JSONResponse({"status": "ok"})

    async def _capabilities(self, request: Request, body: Any) -> Response:
        model = {"model_name": self._about.name, "max_context_length": self._about.max_tokens}
        return JSONResponse({"supported_models": [{**model, "trainable": True, "sampleable": True}]})

    def _create_session(self, body: Body) -> Body:
        return {"type": "create_session", "session_id": self._tenant.create_session()}

    def _heartbeat(self, body: Body) -> Body:
        self._tenant.touch(body.get("session_id"))
        return {"type": "session_heartbeat"}

    async def _finish_session(self, request: Request, body: Any) -> Response:
        self._tenant.finish_session(request.path_params["session_id"])
        return JSONResponse({})

    # --------------------------------------------------------------------------------------- training

    def _create_model(self, body: Body) -> Pending:
        self._samplers.check_base(body.get("base_model"))
        _check_optimizer(body.get("optimizer_config"))
        lora = body.get("lora_config") or {}
        rank = lora.get("rank") if isinstance(lora, dict) else None
        if rank is not None and type(rank) is not int:
            raise refuse(f"lora_config.rank={rank!r} must be an integer", "lora_config")
        return self._tenant.create_model(body.get("session_id"), body.get("model_seq_id"), rank)

    def _get_info(self, body: Body) -> Body:
        model, about = self._tenant.find(body.get("model_id")), self._about
        rank = about.lora_rank
        return {
            "type": "get_info",
            "model_id": model.id,
            "model_name": about.name,
            "model_data": {"arch": "decoder", "model_name": about.name, "tokenizer_id": about.tokenizer},
            "is_lora": rank > 0,
            "lora_rank": rank or None,
            "optimizer_config": {"type": "adamw"},
        }

    async def _run_batch(self, request: Request, body: Any) -> Response:
        if (encoding := request.headers.get("content-encoding", "identity")) != "identity":
            raise ApiError(415, f"Content-Encoding {encoding} is not supported; send the body as it is")
        is_proto = PROTOBUF in request.headers.get("content-type", "")
        with reading():
            envelope = codec.read_proto(body) if is_proto else codec.read_json(parse_json(body))
        return _promise(self._tenant.run_batch(envelope), envelope.model_id)

    def _step(self, body: Body) -> Pending:
        model_id, seq_id = codec.read_address(body)
        # Read in its turn: a refusal must not leave a gap in the line.
        return self._tenant.step(model_id, seq_id, lambda: _read_adam(body))

    def _save(self, body: Body) -> Pending:
        model_id, seq_id = codec.read_address(body)
        overwrite = body.get("overwrite") is True
        return self._tenant.save(model_id, seq_id, body.get("path"), overwrite=overwrite)

    def _save_for_sampler(self, body: Body) -> Pending:
        model_id, seq_id = codec.read_address(body)
        kind = body.get("kind", "snapshot")
        return self._tenant.save_for_sampler(model_id, seq_id, body.get("path"), kind)

    def _load(self, body: Body) -> Pending:
        path, with_optimizer = body.get("path"), body.get("optimizer") is True
        if "session_id" in body:  # the model's first request, in place of create_model
            load = (path, with_optimizer)
            return self._tenant.create_model(body["session_id"], body.get("model_seq_id"), None, load)
        model_id, seq_id = codec.read_address(body)
        return self._tenant.load(model_id, seq_id, path, with_optimizer=with_optimizer)

    # --------------------------------------------------------------------------------------- sampling

    async def _create_sampling_session(self, request: Request, body: Any) -> Response:
        given = _object(body)
        self._tenant.touch(given.get("session_id"))
        sampler_id = await self._samplers.open_for(
            given["session_id"], given.get("base_model"), given.get("model_path")
        )
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": sampler_id})

    async def _describe_sampler(self, request: Request, body: Any) -> Response:
        sampler_id = request.path_params["sampler_id"]
        sampler = self._samplers.find(sampler_id)
        found = {"sampler_id": sampler_id, "base_model": self._about.name, "model_path": sampler.path}
        return JSONResponse(found)

    def _sample(self, body: Body) -> Body:
        pending, count = self._samplers.sample(body)
        self._tenant.notice(pending.id)
        names = [f"{pending.id}:{index}" for index in range(count)]
        return {"request_id": pending.id, "sample_sequence_ids": names}

    # ---------------------------------------------------------------------------------------- results

    async def _retrieve(self, request: Request, body: Any) -> Response:
        pending = self._futures.find(str(_object(body).get("request_id")))
        self._tenant.notice(pending.id)
        if not await self._futures.wait(pending, POLL_SECONDS):
            waiting = {"type": "try_again", "request_id": pending.id, "queue_state": "active"}
            return JSONResponse(waiting, status_code=408)
        self._futures.note_told(pending)
        if pending.error is not None:
            category = "user" if pending.error.status < 500 else "server"
            told = {"error": pending.error.message, "category": category}
            return Response(json.dumps(told), media_type="application/json")  # in ASCII, as other errors
        return _answer(pending.result, wants_proto=PROTOBUF in request.headers.get("accept", ""))

    def _cancel(self, body: Body) -> Body:
        pending = self._futures.find(str(body.get("request_id")))
        if pending.give_up is not None:
            pending.give_up()
            self._futures.fail(pending, ApiError(400, f"request {pending.id} was canceled"))
        return {}


def _answering(call: Callable[[Body], Body]) -> Handler:
    async def handle(request: Request, body: Any) -> Response:
        with reading():
            found = call(_object(body))
        return JSONResponse(found)

    return handle


def _promising(call: Callable[[Body], Pending]) -> Callable[[Body], Body]:
    def answer(body: Body) -> Body:
        return {"request_id": call(body).id, "model_id": body.get("model_id")}

    return answer


def _promise(pending: Pending, model_id: str) -> Response:
    return JSONResponse({"request_id": pending.id, "model_id": model_id})


def _answer(result: Any, *, wants_proto: bool) -> Response:
    if isinstance(result, codec.BatchResult):
        encode: Any = codec.encode_batch
        describe: Any = codec.describe_batch
    elif isinstance(result, codec.SampleResult):
        encode, describe = codec.encode_samples, codec.describe_samples
    else:
        return JSONResponse(result)
    if wants_proto:
        return Response(encode(result), media_type=PROTOBUF)
    return JSONResponse(describe(result))


# ------------------------------------------------------------------------------------------- reading


def _object(body: Any) -> Body:
    if not isinstance(body, dict):
        raise refuse("the body must be a JSON object")
    return body


def _check_optimizer(config: Any) -> None:
    kind = config.get("type", "adamw") if isinstance(config, dict) else "adamw"
    if kind != "adamw":
        raise refuse(f"optimizer_config.type={kind!r} is not supported; use adamw", "optimizer_config")


def _read_adam(body: Mapping[str, Any]) -> AdamParams:
    given = body.get("adam_params")
    if not isinstance(given, dict):
        raise refuse("adam_params is missing; AdamW is the optimizer here", "adam_params")
    names = [field.name for field in dataclasses.fields(AdamParams)]
    for name, value in given.items():
        if name not in names:
            raise refuse(f"adam_params.{name} is not known; there are {', '.join(names)}", "adam_params")
        if not is_number(value) or value < 0 or (name.startswith("beta") and value >= 1):
            low = "a number in [0, 1)" if name.startswith("beta") else "a number from 0"
            raise refuse(f"adam_params.{name}={value!r:.80} must be {low}", "adam_params")
    return AdamParams(**given)
