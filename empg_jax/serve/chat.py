"""The command ``empg-jax chat``: a conversation with a policy in the terminal, without a server."""

from __future__ import annotations

import queue
import sys
from collections.abc import Callable, Sequence
from typing import Any

from empg_jax.engine.engine import Response
from empg_jax.errors import RunError
from empg_jax.run.terminal import Say, plain, read_line
from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Driver, EngineFailed, Job, QueueFull, Update
from empg_jax.serve.policy import Policy, open_policy
from empg_jax.serve.server import ending
from empg_jax.serve.service import Service, make_service
from empg_jax.serve.text import TextStream
from empg_jax.serve.wire import ApiError

ANEW = "/new"  # a line that begins another conversation
BASE_TOKENS = 64  # of an answer without a chat template, which nothing ends, where --max-tokens does not say
NUM_WAITING = 1


def chat_with(
    source: str,
    overrides: Sequence[str],
    *,
    options: dict[str, Any],
    system: str | None,
    has_entropy: bool,
    say: Say,
    write: Say,
) -> None:
    """Talk to a policy until the end of the input.

    Args:
      source: see `empg_jax.serve.policy.open_policy`.
      overrides: dotted overrides of the configuration.
      options: of the sampling, by their names on the wire (``temperature``, ``max_tokens``, ``seed``).
      system: the system's message; None has none.
      has_entropy: whether each answer is followed by its mean entropy.
      say: receives messages for the user.
      write: receives the answers' text, piece by piece.

    Raises:
      ConfigError: the policy cannot be used.
      RunError: the engine failed.
    """
    # One conversation needs one slot, and programs are compiled when they are first needed.
    policy = open_policy(source, ["serve.slots=1", *overrides], say)
    service = make_service(policy)
    say(f"{policy.name}: {_describe(policy)}")
    say(f"Ctrl-D ends, Ctrl-C cuts an answer off, {ANEW} begins anew")
    with Driver(policy.engine, max_waiting=NUM_WAITING) as driver, ending([driver]):
        chat = Chat(service, driver, options, system, has_template=policy.renderer is not None)
        while (line := read_line("> ")) is not None:
            if not sys.stdin.isatty():
                write(f"> {plain(line)}\n")
            if line.strip() == ANEW:
                chat.forget()
            elif line.strip():
                _tell(chat, line, write, has_entropy)


def _describe(policy: Policy) -> str:
    length = f"a conversation has at most {policy.engine.config.max_tokens} tokens (serve.max_tokens)"
    if policy.renderer is None:
        return f"there is no chat template, so it goes on with your text; {length}"
    return length


def _tell(chat: Chat, line: str, write: Callable[[str], None], has_entropy: bool) -> None:
    """Print the answer to a line, or why there is none."""
    try:
        response = chat.ask(line, lambda piece: write(plain(piece)))
    except ApiError as error:
        write(f"[{error}; {ANEW} begins a new conversation]\n")
        return
    write("\n")
    if response is None:
        write("[cut off]\n")
    elif has_entropy and len(response.tokens):
        mean = float(response.entropies.mean())
        write(f"[{len(response.tokens)} tokens, mean entropy {mean:.3f} nats, {response.finish_reason}]\n")


class Chat:
    """A conversation: the messages so far or, without a chat template, the text so far.

    Args:
      service: makes requests of them.
      driver: answers.
      options: of every request.
      system: the system's message; None has none.
      has_template: whether there is a chat template.
    """

    def __init__(
        self,
        service: Service,
        driver: Driver,
        options: dict[str, Any],
        system: str | None,
        *,
        has_template: bool,
    ) -> None:
        self._service, self._driver, self._options = service, driver, options
        self._system, self._has_template = system, has_template
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._text = "" if self._system is None else f"{self._system}\n"

    def ask(self, line: str, write: Callable[[str], None]) -> Response | None:
        """Return the answer, after its text was written in pieces; None if Ctrl-C cut it off.

        Raises:
          ApiError: the conversation is too long, its template refuses it, or the engine is still busy. The
            conversation stays as it was.
          RunError: the engine failed.
        """
        messages, text = [*self._messages, {"role": "user", "content": line}], f"{self._text}{line}"
        if self._has_template:
            asked = self._service.read_chat({"messages": messages, "stream": True, **self._options})
        else:
            limit = {"max_tokens": BASE_TOKENS}
            asked = self._service.read_completion({"prompt": text, "stream": True, **limit, **self._options})
        said: list[str] = []

        def take(piece: str) -> None:
            said.append(piece)
            write(piece)

        response = self._sample(asked, take)
        answer = "".join(said)
        self._messages = [*messages, {"role": "assistant", "content": answer}]
        self._text = f"{text}{answer}\n"
        return response

    def _sample(self, asked: Asked, take: Callable[[str], None]) -> Response | None:
        news: queue.Queue[Update] = queue.Queue()
        job: Job = asked.make_job(0, news.put)
        stream = TextStream(asked.decode, asked.sampling.stops)
        try:
            self._driver.submit([job])
        except QueueFull:
            raise ApiError(429, "the engine is busy with lines that were cut off: try again") from None
        except EngineFailed as error:
            raise RunError(f"the engine failed: {error}") from None
        try:
            while True:
                update = news.get()
                if update.response is None:
                    raise RunError(update.error)
                take(stream.feed(update.response.tokens, is_final=update.is_final))
                if update.is_final:
                    return update.response
        except KeyboardInterrupt:
            self._driver.cancel([job])
            return None
