"""An opponent that is a policy behind HTTP, asked as the policy in training is.

The opponent's seat is a conversation of its own: what it writes never gets into the policy's rows, so nothing
is learned from its tokens. Where the server is the one that samples the run, a game is self-play.
"""

from __future__ import annotations

import json
import os
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from empg_envs.adapters.messages import take_new
from empg_envs.base import ActionParser, EnvFault, Message, PromptBuilder
from empg_envs.guided import GuidedPrompts
from empg_envs.parsers import OpenThought, WholeParser, ask_for, make_parser

API_KEY = "EMPG_API_KEY"  # the variable with the bearer token; workers.pass_env hands it on
MAX_BYTES = 8 << 20
SHOWN = 300  # characters of a server's refusal that a message repeats

T = TypeVar("T")


class Rival:
    """An opponent at an OpenAI endpoint.

    Args:
      url: the server, with or without ``/v1`` at its end.
      model: its name there; None takes the first.
      parser: name of the action parser, as of ``env.parser``; None takes the whole answer.
      instructions: words in front of the first observation; as of ``env.prompt_options``.
      temperature: of its sampling.
      max_tokens: longest answer.
      timeout: seconds for an answer; keep it below ``workers.step_timeout``.

    Raises:
      ValueError: the address is none, or no parser has that name.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        parser: str | None = None,
        instructions: str = "",
        temperature: float = 1.0,
        max_tokens: int = 256,
        timeout: float = 8.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"opponent={url}: expected a server, for example http://127.0.0.1:8000")
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        # The words that the policy reads with the same `env.parser`.
        prompts = GuidedPrompts(instructions)
        self._parse: ActionParser = WholeParser() if parser is None else make_parser(parser)
        self._prompts: PromptBuilder = prompts if parser is None else ask_for(parser, prompts)
        self._model, self._timeout = model, timeout
        self._sampling = {"temperature": temperature, "max_tokens": max_tokens}
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._game: Any = None
        self._messages: list[Message] = []

    def __call__(self, game: Any, dice: random.Random) -> str:
        """Return a move of the player on turn; another game begins a new conversation.

        Raises:
          EnvFault: the server cannot be reached, refuses, or does not answer with a text.
        """
        observation = take_new(game, game.state.current_player_id)
        if game is not self._game:
            self._game, self._messages = game, self._prompts.start(observation, {})
        else:
            self._messages.append({"role": "user", "content": self._prompts.follow(observation, {})})
        said, opens_thought = self._ask(dice.getrandbits(31))
        self._messages.append({"role": "assistant", "content": said})
        parse = OpenThought(self._parse) if opens_thought else self._parse
        return parse(said, {}).action

    def _ask(self, seed: int) -> tuple[str, bool]:
        """Return the answer, and whether the server tells that the prompt opened a thought (ours does)."""
        if self._model is None:
            self._model = self._read("/models", None, lambda found: str(found["data"][0]["id"]))
        body = {"model": self._model, "messages": self._messages, "seed": seed, **self._sampling}
        return self._read("/chat/completions", body, _read_choice)

    def _read(self, path: str, body: Mapping[str, Any] | None, read: Callable[[Any], T]) -> T:
        """Send a request, and return what ``read`` finds in the answer."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self._url}{path}", data, headers)
        try:
            with self._open(request, timeout=self._timeout) as answer:
                return read(json.loads(answer.read(MAX_BYTES)))
        except urllib.error.HTTPError as error:
            told = error.read(SHOWN).decode(errors="replace")
            hint = f"; its token comes from {API_KEY} (workers.pass_env=[{API_KEY}])"
            raise EnvFault(
                "opponent_refused",
                f"{self._url}{path}: status {error.code}, {told}{hint if error.code in (401, 403) else ''}",
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise EnvFault(
                "opponent_unreachable", f"{self._url}{path}: {type(error).__name__}: {error}"
            ) from None


def _read_choice(found: Any) -> tuple[str, bool]:
    choice = found["choices"][0]
    return str(choice["message"]["content"] or ""), "opens_thought" in (choice.get("empg") or ())
