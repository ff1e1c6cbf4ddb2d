"""The prompt of each turn: a growing transcript, or a window over the last turns.

*Transcript*: the conversation only grows, so the model keeps its KV and gets the new tokens alone. Where the
chat template does not allow that, the whole conversation is given as a fresh prompt (and a new row starts).
*Window*: every turn is a fresh prompt that repeats the last ``history`` turns (as verl-agent does).

Tools that an environment declares (``info["tools"]``) are told by the model's own template where it tells
any, else in words in front of the first user message. The prompt builder gets an info with an empty list.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from empg_envs.base import PromptBuilder
from empg_envs.tool_calls import check_tools, declares_tools, describe_tools
from empg_jax.errors import RunError
from empg_jax.rollout.own_code import CheckedPrompts
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.template import Message

ContextKind = Literal["transcript", "window"]
Info = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class PromptDelta:
    """The tokens that the model reads next.

    Attributes:
      tokens: the whole prompt when ``is_fresh``, otherwise the tokens to append to the conversation.
      is_fresh: whether the conversation's KV must be dropped; a new training row then starts.
    """

    tokens: list[int]
    is_fresh: bool


class EpisodeContext(Protocol):
    """The conversation of one episode. Call `start` once, then `follow` after every response.

    Both raise `ChatTemplateError` where the chat template refuses the conversation, `PromptFault` where a
    prompt builder raises, and `RunError` where it returns no messages or no text.
    """

    def start(self, observation: str, info: Info) -> PromptDelta:
        """Return the first prompt."""
        ...

    def follow(
        self,
        response_tokens: Sequence[int],
        response_text: str,
        stopped: bool,
        action: str,
        observation: str,
        info: Info,
    ) -> PromptDelta:
        """Return the prompt, or its new part, for the next response.

        Args:
          response_tokens: the sampled ids, exactly as sampled.
          response_text: the text of these ids, without control tokens.
          stopped: whether the response ended by a stop token or a stop string (otherwise a limit cut it).
          action: the action that the parser found in the response.
          observation: the environment's answer to the action.
          info: the environment's info beside that observation.
        """
        ...


ContextFactory = Callable[[], EpisodeContext]


def make_context(
    kind: ContextKind, prompts: PromptBuilder, renderer: ChatRenderer, history: int
) -> ContextFactory:
    """Return a factory of per-episode contexts.

    Args:
      kind: ``transcript`` or ``window``.
      prompts: the environment's prompt builder.
      renderer: renders messages to tokens.
      history: number of past turns that a window repeats (0 = none); a transcript holds all turns.

    Raises:
      ValueError: for an unknown kind or a negative history.
    """
    checked = CheckedPrompts(prompts)
    if kind == "transcript":
        return lambda: _Transcript(checked, renderer)
    if kind == "window":
        if history < 0:
            raise ValueError(f"env.history={history}: a window needs a history of 0 or more turns")
        return lambda: _Window(checked, renderer, history)
    raise ValueError(f"env.context={kind!r} is unknown: use 'transcript' or 'window'")


@dataclasses.dataclass(frozen=True, slots=True)
class _Tools:
    """The tools of an episode: variables of a template that tells them, or words where it has no place.

    The role is that of calls' results.
    """

    variables: dict[str, Any]
    role: str
    words: str = ""

    def hide(self, info: Info) -> Info:
        """Return an info for the prompt builder, without the tools that are told here."""
        return {**info, "tools": []} if self.variables or self.words else info

    def tell(self, messages: list[Message]) -> list[Message]:
        """Put the words, where there are any, in front of the first user message."""
        if not self.words:
            return messages
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
        told = {**messages[first], "content": f"{self.words}\n\n{messages[first]['content']}"}
        return [*messages[:first], told, *messages[first + 1 :]]


def _find_tools(renderer: ChatRenderer, info: Info) -> _Tools:
    """Return the tools that an environment's first info declares.

    Raises:
      RunError: they are no list of functions with names.
    """
    # Bare names belong to an environment with a language of its own, which its prompt builder tells.
    if not info.get("tools") or not declares_tools(info):
        return _Tools({}, "user")
    try:
        tools = check_tools(info["tools"])
    except ValueError as error:
        raise RunError(f"the environment's info: {error}") from None
    if renderer.tells_tools:
        return _Tools({"tools": tools}, renderer.role_of_results(tools))
    return _Tools({}, "user", describe_tools(tools))


def _require_told(
    renderer: ChatRenderer, messages: Sequence[Message], variables: dict[str, Any], author: str
) -> None:
    """Refuse what the template hides from the model.

    Raises:
      RunError: it prints nothing of the tools, or of the messages of a role.
    """
    role = renderer.find_untold(messages, variables)
    if variables and not renderer.tells_tools:
        what = "calls have tools"
    elif role is not None:
        what = f"conversations have messages of the role {role}"
    else:
        return
    raise RunError(
        f"{author}'s {what}, but the chat template does not tell them to the model: set model.chat_template "
        "to one that does, such as scripts/examples/tools.jinja"
    )


class _Transcript:
    """A context that appends new messages, and starts a fresh prompt only where the template demands it."""

    def __init__(self, prompts: CheckedPrompts, renderer: ChatRenderer):
        self._prompts = prompts
        self._renderer = renderer
        self._messages: list[Message] = []
        self._tools = _Tools({}, "user")

    def start(self, observation: str, info: Info) -> PromptDelta:
        self._tools = _find_tools(self._renderer, info)
        messages = self._prompts.start(observation, self._tools.hide(info))
        self._messages = self._tools.tell(messages)
        _require_told(self._renderer, self._messages, self._tools.variables, "the environment")
        return self._whole()

    def follow(
        self,
        response_tokens: Sequence[int],
        response_text: str,
        stopped: bool,
        action: str,
        observation: str,
        info: Info,
    ) -> PromptDelta:
        content = self._prompts.follow(observation, self._tools.hide(info))
        new_messages = [{"role": self._tools.role, "content": content}]
        # Another stop token is an ordinary sampled token: the template's end of turn must still follow it.
        ended = stopped and response_tokens[-1] == self._renderer.end_id
        tokens = self._renderer.follow(
            self._messages, response_text, new_messages, stopped=ended, **self._tools.variables
        )
        self._messages += [{"role": "assistant", "content": response_text}, *new_messages]
        # The template renders earlier messages differently now, so the old tokens are no prefix any more.
        return self._whole() if tokens is None else PromptDelta(tokens, is_fresh=False)

    def _whole(self) -> PromptDelta:
        tokens = self._renderer.start(self._messages, **self._tools.variables)
        return PromptDelta(tokens, is_fresh=True)


class _Window:
    """A context that repeats the last ``history`` turns in a fresh prompt."""

    def __init__(self, prompts: CheckedPrompts, renderer: ChatRenderer, history: int):
        self._prompts = prompts
        self._renderer = renderer
        self._turns: deque[tuple[str, str]] = deque(maxlen=history)
        self._observation = ""
        self._num_turns = 0
        self._tools = _Tools({}, "user")

    def start(self, observation: str, info: Info) -> PromptDelta:
        self._turns.clear()
        self._num_turns = 0
        self._tools = _find_tools(self._renderer, info)
        return self._prompt(observation, info)

    def follow(
        self,
        response_tokens: Sequence[int],
        response_text: str,
        stopped: bool,
        action: str,
        observation: str,
        info: Info,
    ) -> PromptDelta:
        self._turns.append((self._observation, action))
        self._num_turns += 1
        return self._prompt(observation, info)

    def _prompt(self, observation: str, info: Info) -> PromptDelta:
        self._observation = observation
        shown = self._tools.hide(info)
        built = self._prompts.window(list(self._turns), observation, shown, self._num_turns)
        messages = self._tools.tell(built)
        _require_told(self._renderer, messages, self._tools.variables, "the environment")
        return PromptDelta(self._renderer.start(messages, **self._tools.variables), is_fresh=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Said:
    """A conversation that ends with a sampled response, with the exact tokens."""

    messages: list[Message]
    tools: list[Any]
    response: str
    tokens: list[int]
    has_ended: bool  # whether the last token is the template's end of turn


class CallContext:
    """The context of a program that calls the policy with whole conversations of its own.

    A call that continues an earlier conversation of the episode, message by message, appends to its exact
    tokens. Any other (a rewritten history, a sub-agent, a parallel call) starts afresh, and so a row.

    `start` and `follow` raise `RunError` where a call has tools, or messages of a role, that the chat
    template does not tell.
    """

    def __init__(self, renderer: ChatRenderer):
        self._renderer = renderer
        self._said: list[_Said] = []
        self._prompt: list[int] = []
        self._messages: list[Message] = []
        self._tools: list[Any] = []

    def start(self, observation: str, info: Info) -> PromptDelta:
        """Return the first prompt."""
        self._said.clear()
        self._require_told(info)
        return self._begin(info)

    def follow(
        self,
        response_tokens: Sequence[int],
        response_text: str,
        stopped: bool,
        action: str,
        observation: str,
        info: Info,
    ) -> PromptDelta:
        """Return the prompt of the next call."""
        self._require_told(info)
        has_ended = stopped and response_tokens[-1] == self._renderer.end_id
        tokens = [*self._prompt, *response_tokens]
        self._said.append(_Said(self._messages, self._tools, response_text, tokens, has_ended))
        for said in sorted(self._said[::-1], key=lambda said: -len(said.messages)):
            delta = self._continue(said, info)
            if delta is None:
                continue
            self._messages, self._tools = info["messages"], info["tools"]
            self._prompt = [*said.tokens, *delta]
            # The slot holds the newest conversation; any other must be read again.
            is_fresh = said is not self._said[-1]
            return PromptDelta(self._prompt if is_fresh else delta, is_fresh=is_fresh)
        return self._begin(info)

    def _require_told(self, info: Info) -> None:
        _require_told(self._renderer, info["messages"], _variables(info["tools"]), "the program")

    def _begin(self, info: Info) -> PromptDelta:
        self._messages, self._tools = info["messages"], info["tools"]
        self._prompt = self._renderer.start(self._messages, **_variables(self._tools))
        return PromptDelta(list(self._prompt), is_fresh=True)

    def _continue(self, said: _Said, info: Info) -> list[int] | None:
        """Return the tokens behind a conversation that a call continues; None if it does not."""
        messages, length = info["messages"], len(said.messages)
        if len(messages) < length + 2 or messages[:length] != said.messages or info["tools"] != said.tools:
            return None
        answer = messages[length]
        if answer != {"role": "assistant", "content": said.response}:
            return None
        return self._renderer.follow(
            said.messages,
            said.response,
            messages[length + 1 :],
            stopped=said.has_ended,
            **_variables(said.tools),
        )


def _variables(tools: list[Any]) -> dict[str, Any]:
    return {"tools": tools} if tools else {}
