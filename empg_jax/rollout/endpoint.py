"""A policy behind HTTP in the place of an engine: any server that speaks OpenAI's chat completions.

A collector gives prompts as tokens. Here the tokens of a prompt are the bytes of its messages, and the
server's own template makes the real ones of them. `EndpointEngine` has what a collector and an evaluator need
of a `SamplingEngine`; each response in progress is a request in a thread of its own.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import http.client
import json
import math
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

import numpy as np

from empg_jax.config.places import split_address
from empg_jax.engine.slots import Response
from empg_jax.errors import ConfigError, RunError
from empg_jax.text.stops import first_stop
from empg_jax.text.template import Message

TRIES = 5  # of a request that the server could not answer for a passing cause, other than being busy
WAIT = 0.5  # seconds before the second try; each further wait is twice as long
LONGEST_WAIT = 30.0
POLL_SECONDS = 0.05
NO_ID = -1  # the id of a token that the server does not tell
SHOWN = 300  # characters of a server's error that a message repeats
BUSY = 429
PASSING = frozenset({408, 409, 425, BUSY, 500, 502, 503, 504})


class EndpointError(RunError):
    """The server cannot be reached, or refuses or fails to answer."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One response of the server.

    Attributes:
      text: its text.
      tokens: int32[R], its ids; `NO_ID` where the server does not tell them.
      entropies: float32[R], in nats; NaN where the server does not tell them.
      finish_reason: ``stop`` or ``length``.
      unfit: why the conversation leaves no room for a response, in the server's words; else None.
    """

    text: str
    tokens: np.ndarray
    entropies: np.ndarray
    finish_reason: str
    unfit: str | None = None


class Endpoint:
    """The requests to one server.

    Args:
      url: its address; ``/v1`` is added where there is no path.
      model: the model's name there; None takes the only one.
      key: the bearer token, or None.
      sampling: fields of every request (``temperature``, ``max_tokens``, ...).
      timeout: seconds for one answer, and for which a busy server is asked again.

    Raises:
      ConfigError: the address is none, or the server has several models and none is named.
      EndpointError: the server does not tell its models.

    Attributes:
      model: the model's name there.
      opens_thought: whether an answer told that prompts open a thought there, whose tag no text has.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        key: str | None = None,
        sampling: Mapping[str, Any],
        timeout: float,
    ) -> None:
        self._base = base_of(url)
        self._key, self._sampling, self._timeout = key, dict(sampling), timeout
        self._closed = threading.Event()
        self._asks_for_tokens = self._tells_stops = True
        self.opens_thought = False
        self.model = model or self._only_model()

    def ask(self, messages: Sequence[Message], seed: int) -> Answer:
        """Return the model's answer to a conversation, with the stop string that ended it.

        Where fewer than ``max_tokens`` tokens fit behind the conversation, the answer has those that fit. A
        conversation that leaves no room at all has an empty answer, with `Answer.unfit`.

        Raises:
          EndpointError: there is none, after `TRIES` for a passing cause, or the server is busy all the time.
        """
        body = {"model": self.model, "messages": list(messages), "seed": seed, **self._sampling}
        stops = body.get("stop", ())
        if not self._tells_stops:  # what follows a stop string is sampled for nothing
            del body["stop"]
        status, found = self._complete(body)
        if _is_too_long(status, found):
            # Most servers refuse more tokens than fit; without a number they sample up to their limit.
            status, found = self._complete({k: v for k, v in body.items() if k != "max_tokens"})
        if _is_too_long(status, found):
            none = np.full(1, NO_ID, np.int32), np.full(1, np.nan, np.float32)
            return Answer("", *none, "length", unfit=self._describe(status, found))
        if status != 200:
            raise EndpointError(self._describe(status, found))
        try:
            if "stop" in body and _hides_stop(found["choices"][0]):
                self._tells_stops = False
                return self.ask(messages, seed)
            if (found["choices"][0].get("empg") or {}).get("opens_thought"):
                self.opens_thought = True
            return read_answer(found, stops)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise EndpointError(
                f"{self._base}/chat/completions answered what is no chat completion: {_shorten(found)}"
            ) from None

    def close(self) -> None:
        """Let requests that wait for another try give up."""
        self._closed.set()

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        extra = {"return_token_ids": True} if self._asks_for_tokens else {}
        status, found = self._send("/chat/completions", body | extra)
        if status in (400, 422) and extra and not _is_too_long(status, found):
            # Some servers refuse keys that they do not know; then the texts have to do.
            status, found = self._send("/chat/completions", body)
            self._asks_for_tokens = self._asks_for_tokens and status != 200
        return status, found

    def _only_model(self) -> str:
        status, found = self._send("/models", None)
        if status != 200:
            raise EndpointError(self._describe(status, found, "/models"))
        try:
            names = [str(each["id"]) for each in found["data"]]
        except (KeyError, TypeError):
            names = []
        if len(names) == 1:
            return names[0]
        told = f"has the models {', '.join(names[:8])}" if names else "does not tell its models"
        raise ConfigError(f"{self._base} {told}: name one with --model NAME")

    def _send(self, path: str, body: Any) -> tuple[int, Any]:
        """Return status and body, as JSON where it is that; passing failures are tried again."""
        wait, failures, tries, began = WAIT, 0, 0, monotonic()
        while True:
            tries += 1
            is_busy = False
            wait = min(2 * wait, LONGEST_WAIT) if tries > 1 else wait
            try:
                with self._open(path, body) as answer:
                    return answer.status, _parse(answer.read())
            except urllib.error.HTTPError as error:
                found = _parse(_read_what_is_there(error))
                if error.code not in PASSING:
                    return error.code, found
                told, is_busy = self._describe(error.code, found, path), error.code == BUSY
                wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, ValueError, http.client.HTTPException) as error:
                # URLError, time limits, broken answers, and those that were cut off
                told = f"{self._base} does not answer: {getattr(error, 'reason', error) or error}"
            failures += not is_busy
            is_late = is_busy and monotonic() - began > self._timeout
            if is_late or failures == TRIES or self._closed.wait(wait):
                raise EndpointError(f"{told} ({tries} tries)")

    def _open(self, path: str, body: Any) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers)
        host = urllib.parse.urlsplit(self._base).hostname
        # A proxy of the environment knows no server of this machine.
        handlers = [urllib.request.ProxyHandler({})] if host in ("127.0.0.1", "localhost", "::1") else []
        return urllib.request.build_opener(*handlers).open(request, timeout=self._timeout)

    def _describe(self, status: int, found: Any, path: str = "/chat/completions") -> str:
        hint = "; EMPG_API_KEY names the key" if status in (401, 403) else ""
        return f"{self._base}{path} answered with status {status}: {_shorten(found)}{hint}"


class EndpointEngine:
    """The engine's part for a policy behind HTTP.

    Args:
      endpoint: the server.
      slots: most requests at a time.
      seed: run seed; a request's own is derived from it and its place.

    Attributes:
      config: ``slots`` and ``max_tokens``, as of an engine, but endless: the server knows what fits.
    """

    @dataclasses.dataclass(frozen=True)
    class Config:
        """What a collector asks an engine's config for."""

        slots: int
        max_tokens: float = math.inf

    def __init__(self, endpoint: Endpoint, *, slots: int, seed: int) -> None:
        self.config = self.Config(slots)
        self._endpoint, self._seed = endpoint, seed
        self._places = threading.Semaphore(slots)
        self._asked: dict[int, tuple[np.ndarray, concurrent.futures.Future[Answer]]] = {}

    def __enter__(self) -> EndpointEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._endpoint.close()
        for _, future in self._asked.values():
            future.cancel()

    @property
    def has_work(self) -> bool:
        """Whether a response is in progress."""
        return bool(self._asked)

    @contextlib.contextmanager
    def lent(self, *weights: object, **sampling: object) -> Iterator[None]:
        """Do nothing: the server has weights and slots of its own."""
        yield

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return 1: only the server knows what fits."""
        return 1

    def submit(
        self, slot: int, tokens: Sequence[int], *, is_fresh: bool, ids: Sequence[int], watch: object = None
    ) -> None:
        """Ask for a response to the messages that the tokens spell (`MessageRenderer`)."""
        messages = json.loads(bytes(tokens))
        prompt = np.asarray(tokens, np.int32)
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def ask() -> None:
            with self._places:  # a slot may be released before its request has ended
                if not future.set_running_or_notify_cancel():
                    return
                try:
                    future.set_result(self._endpoint.ask(messages, derive_seed(self._seed, ids)))
                except BaseException as error:
                    future.set_exception(error)

        # No executor: at the end of the process Python would wait for its threads, and so for the server.
        threading.Thread(target=ask, name="endpoint", daemon=True).start()
        self._asked[slot] = (prompt, future)

    def step(self, *, is_eager: bool = True) -> list[Response]:
        """Return the responses that are there; wait a little for the first one.

        Raises:
          EndpointError: a request failed.
        """
        futures = [future for _, future in self._asked.values()]
        concurrent.futures.wait(futures, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED)
        ended = [slot for slot, (_, future) in self._asked.items() if future.done()]
        return [_as_response(slot, *self._asked.pop(slot)) for slot in ended]

    def release(self, slot: int) -> None:
        """Forget a slot's request."""
        if slot in self._asked:
            self._asked.pop(slot)[1].cancel()


class MessageRenderer:
    """A chat renderer whose tokens are the bytes of the messages; every prompt is a whole conversation."""

    end_id = NO_ID
    tells_tools = False

    def start(self, messages: Sequence[Message], **variables: object) -> list[int]:
        """Spell a conversation."""
        return list(json.dumps(messages).encode())

    def follow(self, *messages: object, **options: object) -> None:
        """Return None: nothing is appended to what was sent."""

    def find_untold(self, messages: Sequence[Message], variables: Mapping[str, object]) -> None:
        """Return None: nobody here knows the server's template."""


def base_of(url: str) -> str:
    """Return the address that paths such as ``/models`` are appended to.

    Raises:
      ConfigError: it is no address of a server.
    """
    try:
        parts = split_address(url)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return parts._replace(path=parts.path.rstrip("/") or "/v1", query="", fragment="").geturl()


def derive_seed(seed: int, ids: Sequence[int]) -> int:
    """Return a request's seed: equal places of equal runs have equal ones."""
    digest = hashlib.blake2b(repr((seed, *map(int, ids))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 33  # 31 bits, which every server takes


def read_answer(body: Mapping[str, Any], stops: Sequence[str] = ()) -> Answer:
    """Read a chat completion: its text and, where the server tells them, token ids and entropies.

    Args:
      body: the completion.
      stops: stop strings; the text ends behind the first one, which servers leave out.
    """
    choice = body["choices"][0]
    text = choice["message"].get("content") or ""
    told = choice.get("stop_reason", choice.get("matched_stop"))
    stop = told if told in stops else first_stop(text, stops)
    text = text if stop is None else text.partition(stop)[0] + stop
    ids = choice.get("token_ids")
    count = len(ids) if ids else max(1, int((body.get("usage") or {}).get("completion_tokens") or 1))
    tokens = np.asarray(ids, np.int32) if ids else np.full(count, NO_ID, np.int32)
    told = (choice.get("empg") or {}).get("entropies")
    entropies = np.asarray(told if ids and told else [np.nan] * count, np.float32)
    if not isinstance(text, str) or entropies.shape != (count,):
        raise ValueError
    is_cut = stop is None and choice.get("finish_reason") == "length"
    return Answer(text, tokens, entropies, "length" if is_cut else "stop")


def _hides_stop(choice: Mapping[str, Any]) -> bool:
    """Return whether a choice does not tell whether a stop string ended it; vLLM and SGLang tell."""
    return choice.get("finish_reason") == "stop" and not {"stop_reason", "matched_stop"} & choice.keys()


def _as_response(slot: int, prompt: np.ndarray, future: concurrent.futures.Future[Answer]) -> Response:
    answer = future.result()
    unknown = np.full(len(answer.tokens), np.nan, np.float32)
    return Response(
        slot=slot,
        prompt_tokens=prompt,
        tokens=answer.tokens,
        logprobs=unknown,
        entropies=answer.entropies,
        versions=np.zeros(len(answer.tokens), np.int32),
        finish_reason=answer.finish_reason,
        text=answer.text,
        unfit=answer.unfit,
    )


def _is_too_long(status: int, found: Any) -> bool:
    """Tell whether a server refuses a request for its length, in the words of OpenAI, vLLM or SGLang."""
    text = str(found)
    return status == 400 and ("context_length_exceeded" in text or "context length" in text)


def _read_what_is_there(error: urllib.error.HTTPError) -> bytes:
    """Read an error's text, which a server may cut off, too."""
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _parse(raw: bytes) -> Any:
    text = raw.decode("utf-8", "replace")
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shorten(found: Any) -> str:
    error = found.get("error", found) if isinstance(found, dict) else found
    text = error.get("message", error) if isinstance(error, dict) else error
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return shown[:SHOWN] + "..." * (len(shown) > SHOWN) if shown else "(nothing more)"


def _seconds(header: str | None) -> float:
    """Read the seconds that a server asks to wait."""
    try:
        return min(float(header or 0), LONGEST_WAIT)
    except ValueError:
        return 0.0
