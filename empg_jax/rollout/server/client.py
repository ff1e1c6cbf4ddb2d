"""The client of a sampling server: many requests at once, each with a deadline, and attempts after failures.

An event loop in a thread of its own does the waiting. The rollout thread hands requests over, and takes what
has ended. Weights are published between requests: a response that began before a publication ended, or that
tells another version or process than the published one, is thrown away and asked for again. Where the server
was away it may have been started anew, so the weights are published again before anything else is asked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import importlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from empg_jax.rollout.server.answers import Ask, BadAnswer, Failure, Sampled, SamplerError, check_answer
from empg_jax.rollout.server.patience import Patience
from empg_jax.rollout.server.wires import Model, Wire, find_wire, read_process

if TYPE_CHECKING:
    import httpx

API_KEY = "EMPG_API_KEY"  # the variable with the bearer token, as of `empg-jax serve`
MAX_TRIES = 3  # of a request that fails while the server answers others
HEALTH_SECONDS = 10.0
WAKE_SECONDS = 0.2  # between two looks of a waiting caller at requests to stop
MAX_MESSAGE = 300  # characters of a server's message that are told

T = TypeVar("T")


class _Unavailable(Exception):
    """The server is away, busy, or failed: a later attempt may succeed."""

    def __init__(self, reason: str, *, is_away: bool = False, is_busy: bool = False) -> None:
        super().__init__(reason)
        self.is_away, self.is_busy = is_away, is_busy


@dataclasses.dataclass(frozen=True)
class _Published:
    folder: str
    version: str


class Client:
    """A connection to one server.

    Args:
      url: the server, with or without ``/v1`` at its end.
      timeout: seconds that a response, or the loading of weights, may take.
      patience: how long failures may last.
      vocab_size: number of the model's tokens.
      check: called while weights are published; it may raise to end the wait.
      transport: in place of the network.

    Attributes:
      check: the function of that name.
      wire: how the server is talked to; known after `connect`.
      model: the model that it serves.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        patience: Patience,
        vocab_size: int,
        check: Callable[[], None] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._timeout, self._patience, self._vocab_size = timeout, patience, vocab_size
        self._httpx: Any = import_httpx()
        self.check = check
        self._transport = transport
        self.wire: Wire
        self.model: Model
        self._loop = asyncio.new_event_loop()
        self._http: httpx.AsyncClient
        self._turn: asyncio.Lock  # held while weights are published
        self._published: _Published | None = None
        self._process: str | None = None  # that loaded the published weights
        self._epoch = 0  # publications so far
        self._is_lost = False  # whether the server may have other weights
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._results: queue.SimpleQueue[tuple[int, Sampled | Failure | Exception]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while not concurrent.futures.wait([future], WAKE_SECONDS).done:
                self.check()
        except BaseException:
            future.cancel()
            raise
        return future.result()

    # --------------------------------------------------------------------- the rollout thread's side

    def connect(self) -> None:
        """Ask the server what it is, once.

        Raises:
          SamplerError: it does not answer, refuses, or is of an unknown kind.
        """
        self._call(self._connect())

    def try_one(self, ask: Ask) -> Sampled:
        """Ask for one response once, whatever weights the server has.

        Raises:
          SamplerError: there is no response, or it cannot be used.
        """

        async def run() -> Sampled:
            try:
                return await self._sample(ask)
            except (BadAnswer, _Unavailable) as error:
                raise SamplerError(f"{self.url} ({self.wire.name}): {error}") from None

        return self._call(run())

    def publish(self, folder: Path, version: int) -> None:
        """Let the server load weights; return when it has.

        Raises:
          SamplerError: it refuses them, or fails for too long.
        """
        self._call(self._publish(_Published(str(folder), str(version))))

    def ask(self, ask: Ask) -> int:
        """Begin a request; return its number."""
        number = next(self._numbers)

        def begin() -> None:
            self._tasks[number] = self._loop.create_task(self._answer(number, ask))

        self._loop.call_soon_threadsafe(begin)
        return number

    def cancel(self, number: int) -> None:
        """Give up a request; its connection is closed, so that the server need not go on."""

        def end() -> None:
            if (task := self._tasks.pop(number, None)) is not None:
                task.cancel()

        self._loop.call_soon_threadsafe(end)

    def collect(self, seconds: float) -> list[tuple[int, Sampled | Failure]]:
        """Take what has ended, by number; wait up to ``seconds`` for the first.

        Raises:
          SamplerError: a request can never succeed, or failures last too long.
        """
        found: list[tuple[int, Sampled | Failure]] = []
        try:
            number, result = self._results.get(timeout=seconds)
            while True:
                if isinstance(result, Exception):
                    raise result
                found.append((number, result))
                number, result = self._results.get_nowait()
        except queue.Empty:
            return found

    def close(self) -> None:
        """Give up everything and end the thread."""

        async def end() -> None:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if hasattr(self, "_http"):
                await self._http.aclose()

        if self._thread.is_alive():
            self._call(end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    # ------------------------------------------------------------------------------ the loop's side

    async def _connect(self) -> None:
        key = os.environ.get(API_KEY)
        self._turn = asyncio.Lock()
        self._http = self._httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            # Deadlines are those of whole requests, and slots limit how many there are.
            timeout=None,
            trust_env=False,  # a proxy for the outside world knows nothing of a server beside the trainer
            limits=self._httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=self._transport,
        )
        try:
            self.wire, self.model = find_wire(await self._send("GET", "/v1/models", None, HEALTH_SECONDS))
        except (_Unavailable, BadAnswer) as error:
            raise SamplerError(
                f"rollout.url={self.url} does not answer ({error}): start the server first"
            ) from None
        except SamplerError as error:
            raise SamplerError(f"rollout.url={self.url}: {error}") from None

    async def _answer(self, number: int, ask: Ask) -> None:
        """Ask until there is an answer, and hand it over."""
        try:
            with self._patience.asking():
                self._results.put((number, await self._insist(ask)))
        except Exception as error:
            self._results.put((number, error))
        finally:
            self._tasks.pop(number, None)

    async def _insist(self, ask: Ask) -> Sampled | Failure:
        failures = 0
        while True:
            try:
                epoch = await self._ready()
                sampled = await self._sample(ask)
                if epoch != self._epoch:  # weights were published meanwhile
                    continue
                self._check_version(sampled)
                self._patience.succeed()
                return sampled
            except (_Unavailable, BadAnswer) as error:
                failures += 1
                if await self._give_up(error, failures):
                    return Failure(f"{self.url} ({self.wire.name}): {error}")

    async def _give_up(self, error: Exception, failures: int) -> bool:
        """Wait after a failure; return whether the request alone is at fault, as the server answers others.

        Raises:
          SamplerError: failures last too long.
        """
        is_busy = isinstance(error, _Unavailable) and error.is_busy
        if isinstance(error, _Unavailable) and error.is_away:
            self._is_lost = True
        self._patience.fail(str(error))
        if failures % MAX_TRIES == 0 and not is_busy and await self._is_there():
            return True
        await asyncio.sleep(self._patience.wait(failures))
        return False

    async def _is_there(self) -> bool:
        try:
            await self._send("GET", "/v1/models", None, HEALTH_SECONDS)
        except (_Unavailable, BadAnswer):  # such as a page of a load balancer while the server starts
            return False
        return True

    async def _sample(self, ask: Ask) -> Sampled:
        body = await self._send("POST", self.wire.path, self.wire.write(self.model.name, ask), self._timeout)
        sampled = self.wire.read(body)
        check_answer(sampled, ask, self._vocab_size)
        return sampled

    def _check_version(self, sampled: Sampled) -> None:
        wanted = self._published
        if wanted is None:
            return
        if sampled.version in (None, wanted.version) and sampled.process == self._process:
            return
        self._is_lost = True
        raise BadAnswer(
            f"a response of other weights than the published ones (version {sampled.version}, published "
            f"{wanted.version}): the server was started anew, or another program publishes to it"
        )

    # --------------------------------------------------------------------------------- publication

    async def _publish(self, wanted: _Published) -> None:
        with self._patience.asking():
            async with self._turn:
                self._published = wanted
                await self._load(wanted)

    async def _ready(self) -> int:
        """Wait until the server has the published weights; return the number of publications."""
        async with self._turn:
            if self._is_lost and self._published is not None:
                await self._load(self._published)
            return self._epoch

    async def _load(self, wanted: _Published) -> None:
        # What began before is not used, whatever becomes of this publication.
        self._epoch += 1
        failures = 0
        while True:
            try:
                for path, body in self.wire.reload(wanted.folder, wanted.version):
                    answer = await self._send("POST", path, body, self._timeout)
                    self._check_done(path, answer)
                    self._process = read_process(answer)
                self._is_lost = False
                return
            except (_Unavailable, BadAnswer) as error:
                failures += 1
                if await self._give_up(error, failures):
                    raise SamplerError(
                        f"{self.url} ({self.wire.name}) does not load the weights of {wanted.folder}: {error}"
                    ) from None

    def _check_done(self, path: str, answer: Any) -> None:
        """Check that a control route did what it was asked, where it tells.

        vLLM keeps the old weights' prefixes while a response holds them, and answers with status 200.

        Raises:
          _Unavailable: it did not.
        """
        if isinstance(answer, Mapping) and answer.get("success") is False:
            told = answer.get("message") or "not while responses are in progress"
            raise _Unavailable(f"POST {path}: success is false, {told}", is_busy=True)

    # ----------------------------------------------------------------------------------- one request

    async def _send(self, method: str, path: str, body: Any, seconds: float) -> Any:
        """Send one request and read its JSON, all within a deadline.

        Raises:
          _Unavailable: the server is away, busy or failed, or the deadline passed.
          BadAnswer: the answer is not JSON.
          SamplerError: the server refuses the request; it always will.
        """
        try:
            async with asyncio.timeout(seconds):
                answer = await self._http.request(method, path, json=body)
        except TimeoutError:
            raise _Unavailable(f"{method} {path}: no answer within {seconds:g} s") from None
        except self._httpx.HTTPError as error:
            what = f"{type(error).__name__}: {error}"
            raise _Unavailable(f"{method} {path}: {what}", is_away=True) from None
        if answer.status_code >= 500 or answer.status_code in (408, 409, 425, 429):
            told = f"{method} {path}: status {answer.status_code}, {_message(answer)}"
            raise _Unavailable(told, is_busy=answer.status_code == 429)
        if answer.status_code >= 400:
            raise SamplerError(self._refusal(method, path, answer))
        if not answer.content:  # vLLM's control routes
            return {}
        try:
            return answer.json()
        except ValueError:
            raise BadAnswer(f"{method} {path}: an answer that is not JSON: {_message(answer)}") from None

    def _refusal(self, method: str, path: str, answer: httpx.Response) -> str:
        told = f"{self.url} refuses {method} {path}: status {answer.status_code}, {_message(answer)}"
        if answer.status_code in (401, 403):
            return f"{told}; the bearer token comes from {API_KEY} in the environment"
        is_route = answer.status_code in (404, 405) and hasattr(self, "wire") and path != self.wire.path
        return f"{told}; {self.wire.hint}" if is_route else told


def _message(answer: httpx.Response) -> str:
    """Return what a server says of an error, in short."""
    try:
        body = answer.json()
        error = body.get("error", body)
        text = error if isinstance(error, str) else error.get("message") or error.get("detail") or str(error)
    except (ValueError, AttributeError):
        text = answer.text
    return " ".join(str(text).split())[:MAX_MESSAGE] or "without a message"


def import_httpx() -> Any:
    """Import httpx.

    Raises:
      SamplerError: it is not installed.
    """
    try:
        return importlib.import_module("httpx")
    except ModuleNotFoundError:
        raise SamplerError(
            "rollout.engine=openai needs httpx, which comes with: pip install -e '.[sampler]'"
        ) from None
