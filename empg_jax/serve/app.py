"""The routes of the server, and the way of a request through them.

A handler reads and checks a body, hands its jobs to the `Driver`, and answers from their updates. A client
that goes away gives up its jobs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Driver, EngineFailed, Job, QueueFull, Update
from empg_jax.serve.exchange import Exchange, Inbox, News
from empg_jax.serve.server import has_key
from empg_jax.serve.service import Service
from empg_jax.serve.wire import ApiError, reading, refuse

Handler = Callable[[Request, Any], Awaitable[Response]]
Guard = Callable[..., Callable[[Request], Awaitable[Response]]]


@dataclasses.dataclass(frozen=True)
class More:
    """A further route; its handler gets the body as JSON, else as bytes. Those of GET get None."""

    method: str
    path: str
    handler: Handler
    is_json: bool = True


def make_app(
    service: Service,
    driver: Driver,
    *,
    api_key: str | None,
    max_body_bytes: int,
    more: Sequence[More] = (),
) -> Starlette:
    """Build the application.

    Args:
      service: the policy's side of requests.
      driver: the engine's thread.
      api_key: the bearer token that every request needs, except for its health; None needs none.
      max_body_bytes: longest body that is read.
      more: routes of the training API.
    """
    guarded = _guard(api_key, max_body_bytes)

    async def health(request: Request) -> Response:
        is_well = driver.failure is None
        fields = {"status": "ok" if is_well else driver.failure, "model": service.name, **driver.describe()}
        return JSONResponse(fields, status_code=200 if is_well else 503)

    async def models(request: Request, body: Any) -> Response:
        return JSONResponse(service.describe_models())

    async def model(request: Request, body: Any) -> Response:
        return JSONResponse(service.describe_model(request.path_params["name"]))

    exchange = Exchange(driver)

    def answering(read: Callable[[Any], Asked]) -> Handler:
        async def answer(request: Request, body: Any) -> Response:
            with reading():
                asked = read(body)
            return await _serve(request, _Updates(exchange, driver, asked), service, asked)

        return answer

    posts = {
        "/v1/chat/completions": answering(service.read_chat),
        "/v1/completions": answering(service.read_completion),
        "/inference/v1/generate": answering(service.read_generate),
    }
    return Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/v1/models", guarded(models, has_body=False), methods=["GET"]),
            Route("/v1/models/{name:path}", guarded(model, has_body=False), methods=["GET"]),
            *(Route(path, guarded(run, has_body=True), methods=["POST"]) for path, run in posts.items()),
            *(_route(route, guarded) for route in more),
        ],
        exception_handlers={HTTPException: _tell_http},
    )


def _guard(api_key: str | None, max_body_bytes: int) -> Guard:
    """Make the wrapper of handlers that checks the token, reads the body and tells refusals."""

    def guarded(
        handler: Handler, *, has_body: bool, is_json: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        async def run(request: Request) -> Response:
            try:
                _authorize(request, api_key)
                body: Any = await _read_body(request, max_body_bytes) if has_body else None
                return await handler(request, parse_json(body) if has_body and is_json else body)
            except ApiError as error:
                return _answer_error(error)
            except ClientDisconnect:
                return Response(status_code=499)  # nobody reads it

        return run

    return guarded


def _route(route: More, guarded: Guard) -> Route:
    has_body = route.method == "POST"
    handler = guarded(route.handler, has_body=has_body, is_json=route.is_json)
    return Route(route.path, handler, methods=[route.method])


# ------------------------------------------------------------------------------------- the request


def _authorize(request: Request, api_key: str | None) -> None:
    # The Tinker client sends its key in a header of its own.
    named = f"Bearer {request.headers.get('x-api-key', '')}"
    if not has_key(request.headers.get("authorization", named), api_key):
        raise ApiError(401, "wrong or missing bearer token", code="invalid_api_key")


async def _read_body(request: Request, limit: int) -> bytes:
    body, has_more = bytearray(), True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > limit:
            raise ApiError(413, f"the body is longer than {limit >> 20} MiB (serve.max_body_mb)")
        has_more = message.get("more_body", False)
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Read a body as JSON.

    Raises:
      ApiError: it is not JSON.
    """
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


# -------------------------------------------------------------------------------------- the answer


class _Updates:
    """The updates of some jobs, handed from the engine's thread to the event loop."""

    def __init__(self, exchange: Exchange, driver: Driver, asked: Asked) -> None:
        self._exchange, self._driver, self._over = exchange, driver, 0
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox()
        self.jobs: list[Job] = [
            asked.make_job(index, self._receiver(index)) for index in range(asked.num_choices)
        ]
        try:
            exchange.submit(self.jobs)
        except QueueFull:
            raise ApiError(
                429, "the server is busy (serve.max_waiting): try again later", code="rate_limit_exceeded"
            ) from None
        except EngineFailed as error:
            raise ApiError(503, f"the engine has stopped: {error}") from None

    def _receiver(self, index: int) -> Callable[[Update], None]:
        return functools.partial(self._exchange.tell, self._loop, self._inbox, index)

    @property
    def has_more(self) -> bool:
        """Whether a job is not over."""
        return self._over < len(self.jobs)

    async def next(self) -> News:
        """Wait for the next update.

        Raises:
          ClientDisconnect: `leave` was called.
          ApiError: there is no response.
        """
        item = await self._inbox.get()
        if item is None:  # the client is gone
            raise ClientDisconnect
        _, update = item
        if update.error is not None:
            raise ApiError(503, update.error)
        self._over += update.is_final
        return item

    def leave(self) -> None:
        """Let the reader know that the client has gone away."""
        self._inbox.leave()

    def give_up(self) -> None:
        """Free the slots of the jobs that are not over."""
        if self.has_more:
            self._driver.cancel(self.jobs)


async def _serve(request: Request, updates: _Updates, service: Service, asked: Asked) -> Response:
    if asked.is_streamed:
        return StreamingResponse(_stream(updates, service, asked), media_type="text/event-stream")
    leaving = asyncio.ensure_future(_tell_when_gone(request, updates))
    try:
        return _answer(service.answer(asked, await _collect(updates)))
    finally:
        leaving.cancel()
        updates.give_up()


async def _collect(updates: _Updates) -> list[Update]:
    found: dict[int, Update] = {}
    while updates.has_more:
        index, update = await updates.next()
        found[index] = update
    return [found[index] for index in sorted(found)]


async def _tell_when_gone(request: Request, updates: _Updates) -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    updates.leave()


async def _stream(updates: _Updates, service: Service, asked: Asked) -> AsyncIterator[bytes]:
    try:
        writer = service.open_stream(asked)
        while updates.has_more:
            for chunk in writer.write(*await updates.next()):
                yield _event(chunk)
        for chunk in writer.close():
            yield _event(chunk)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        updates.give_up()


def _event(body: Mapping[str, Any]) -> bytes:
    return f"data: {_encode(body)}\n\n".encode()


def _answer_error(error: ApiError) -> Response:
    return _answer(error.body(), error.status, {"Retry-After": "1"} if error.status == 429 else None)


def _answer(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(body), status, headers, media_type="application/json")


def _encode(body: Mapping[str, Any]) -> str:
    # In ASCII: a message or a tool call may hold half a surrogate pair, which no UTF-8 can hold.
    return json.dumps(body, separators=(",", ":"), allow_nan=False)


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer_error(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))
