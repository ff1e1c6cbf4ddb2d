"""The chat renderer: it turns new messages into a *token delta*, the ids to append to a conversation.

A conversation is tokenized once and only grows. Sampled ids are never tokenized again, and a new message adds
only its own tokens. Not every chat template allows this, so the renderer checks it: the template's text with
the new messages must start with the text before them plus the response. If it does not (a template may strip
reasoning from history or trim white space), `ChatRenderer.follow` returns None, and the caller starts a new
row from a full rendering. With an append-only history it goes on with what was sampled (see `history`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from empg_jax.text.continuation import Continuation
from empg_jax.text.history import HistoryMode, SuffixFinder, UnstableHistory
from empg_jax.text.seams import Seam, SeamFinder, is_plain
from empg_jax.text.template import ChatTemplateError, Message
from empg_jax.text.tokenizer import Tokenizer

_TOOL = "empgtool0x"
_KEPT = 1024  # system messages whose seams are known
_CACHED = 4096  # characters of the longest text whose ids are kept: thousands must not fill the memory


class ChatRenderer:
    """A renderer of growing conversations as token deltas.

    Args:
      tokenizer: a tokenizer with a chat template.
      options: variables for the template, for example ``{"enable_thinking": False}``.
      history: ``template`` prints earlier answers as the template does, ``append`` keeps them as sampled.
      cache_size: number of short encoded texts to keep.

    Raises:
      ChatTemplateError: there is no template, or it does not end an assistant's turn with a single control
        token. A sampler could then not detect the end of a turn.
      UnstableHistory: the history is append-only, and the template does not allow that.

    Attributes:
      history: as given.
      end_id: id of the control token with which the template ends an assistant's turn.
      end_token: text of this token.
      lead: white space that the template prints before an answer and that the policy has to sample (usually
        empty).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        options: Mapping[str, Any] | None = None,
        history: HistoryMode = "template",
        cache_size: int = 8192,
    ):
        self.tokenizer, self.history = tokenizer, history
        self._options = dict(options or {})
        self._encode_short = functools.lru_cache(maxsize=cache_size)(self._encode_anew)
        self._told = {"user", "assistant"}  # roles of which the template prints the messages
        self._seams, self._suffixes = SeamFinder(self.render), SuffixFinder(self.render)
        self._led: dict[Any, bool] = {}  # by system message and roles: whether a seam holds behind it
        self.end_id = _require_turn_end(tokenizer)
        end_token = tokenizer.id_to_token(self.end_id)
        assert end_token is not None
        self.end_token = end_token
        self.lead = self._find_lead()
        self._decode = Continuation(tokenizer).decode if self.lead else tokenizer.decode
        self._opening = self._find_opening()
        self._closing = self._find_closing() if history == "append" else self.end_token

    def _encode_anew(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._encode_short(text) if len(text) <= _CACHED else self._encode_anew(text)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the template's text of a conversation; ``variables`` override the renderer's options."""
        variables = {**self._options, **variables}
        return self.tokenizer.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def trace(self, messages: Sequence[Message]) -> Iterator[tuple[str, int]]:
        """Yield the pieces of a prompt's text, each with the line of the template that prints it."""
        template = self.tokenizer.chat_template
        assert template is not None  # else there were no renderer
        return template.trace(messages, add_generation_prompt=True, **self._options)

    def start(self, messages: Sequence[Message], **variables: Any) -> list[int]:
        """Return the ids of the whole conversation so far, including the generation prompt."""
        return self.encode(self.render(messages, **variables))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text that `render` returned."""
        return list(self._encode(text))

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of a written response (by a person or an expert), as a sampler would produce it.

        The ids begin with the template's ``lead`` and end with its end-of-turn token. The response passed to
        `follow` must then begin with the lead, too.
        """
        return [*encode_behind(self._encode, self._opening, self.lead + text)[1], self.end_id]

    def decode_response(self, ids: Iterable[int]) -> str:
        """Return the text of a sampled response without control tokens.

        Where the template has a ``lead``, the text begins with it; some decoders would strip a space there.
        """
        return self._decode(ids)

    def encode_answer(self, lead: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the ids of a written response's beginning and of what follows it, without an end of turn."""
        before = self._opening + self.lead + lead
        led = encode_behind(self._encode, self._opening, self.lead + lead)[1]
        return led, encode_behind(self._encode, before, answer)[1]

    def follow(
        self,
        prefix_messages: Sequence[Message],
        response_text: str,
        new_messages: Sequence[Message],
        *,
        stopped: bool,
        **variables: Any,
    ) -> list[int] | None:
        """Return the ids to append after a sampled response, so that the model can answer the new messages.

        Args:
          prefix_messages: the conversation that the response answers.
          response_text: the decoded response without its end-of-turn token.
          new_messages: the messages after the response, oldest first; at least one.
          stopped: whether the sampled ids end with ``end_id``. If not (the response was cut by a length
            limit), the result begins with the end-of-turn token.
          **variables: further variables of the template, for example ``tools``.

        Returns:
          The ids after the response, including the generation prompt. None if the template renders the longer
          conversation differently, so that a full rendering is needed; with an append-only history, if it has
          no fixed text for these messages.
        """
        if not new_messages:
            raise ValueError("follow needs at least one new message after the response")
        # Seams were probed without variables, which a template may print anywhere.
        delta = None if variables else self._quick_delta(prefix_messages, response_text, new_messages)
        end_id: int | None = self.end_id
        if delta is None and self.history == "append":
            suffix = self.suffix(prefix_messages, new_messages, **variables)
            delta = None if suffix is None else self._closing + suffix
            end_id = self.tokenizer.token_to_id(self._closing)
        elif delta is None:
            delta = self._exact_delta(prefix_messages, response_text, new_messages, **variables)
        if delta is None:
            return None
        ids = self._encode(delta)
        # A tokenizer never merges a control token with its neighbors. The ids before and after the end of the
        # turn are therefore the same as in a tokenization of the whole text.
        if not ids or ids[0] != end_id:
            return None
        return list(ids[1:] if stopped else ids)

    def suffix(
        self, prefix: Sequence[Message], new_messages: Sequence[Message], **variables: Any
    ) -> str | None:
        """Return the text between the end of any answer to a prefix and the next; None if it is not fixed."""
        try:
            found = self._suffixes.find(new_messages, _system_of(prefix), **variables)
        except ChatTemplateError:
            return None
        return found.removeprefix(self._closing) if found.startswith(self._closing) else None

    @functools.cached_property
    def opens_thought(self) -> bool:
        """Whether a prompt ends with the tag that opens a thought, so that a response begins inside it."""
        return ends_in_thought(self.render([{"role": "user", "content": "question"}]))

    @functools.cached_property
    def tells_tools(self) -> bool:
        """Whether the template prints tools that it is given."""
        tool = {"name": _TOOL, "description": _TOOL, "parameters": {"type": "object", "properties": {}}}
        question: list[Message] = [{"role": "user", "content": "question"}]
        try:
            return _TOOL in self.render(question, tools=[{"type": "function", "function": tool}])
        except ChatTemplateError:
            return False

    def find_untold(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
        """Return a role of the messages of which the template prints nothing; None if it prints all.

        One message of each role is looked at, once in a renderer's life.

        Args:
          messages: a conversation.
          variables: further variables of the template.
        """
        for index, message in enumerate(messages):
            if message["role"] not in self._told:
                if not self._is_told(messages, index, variables):
                    return str(message["role"])
                self._told.add(message["role"])
        return None

    def _is_told(self, messages: Sequence[Message], index: int, variables: Mapping[str, Any]) -> bool:
        """Return whether the template prints a message, in the whole conversation or in a beginning of it.

        Some templates print the system's message beside the last one alone, and only if that is the user's.
        """
        changed = {**messages[index], "content": messages[index]["content"] + "."}
        is_refused = True
        for end in range(index + 1, len(messages) + 1):
            try:
                if self.tells_apart(messages[:end], index, changed, variables):
                    return True
                is_refused = False
            except ChatTemplateError:
                continue
        return is_refused  # as the template itself will say

    def tells_apart(
        self, messages: Sequence[Message], index: int, changed: Message, variables: Mapping[str, Any]
    ) -> bool:
        """Return whether the template prints another text when message ``index`` is ``changed``.

        Raises:
          ChatTemplateError: the template refuses the conversation as it is.
        """

        def render(messages: Sequence[Message]) -> str:
            return self.render(messages, **{**variables, "add_generation_prompt": False})

        text = render(messages)
        try:
            return render([*messages[:index], changed, *messages[index + 1 :]]) != text
        except ChatTemplateError:
            return True

    def role_of_results(self, tools: Sequence[Any]) -> str:
        """Return the role of the results of calls: ``tool``, or ``user`` where the template has no such."""
        call: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "x"}]
        results = [*call, {"role": "tool", "content": "result"}]
        try:
            self.render(results, tools=tools)
        except ChatTemplateError:
            return "user"
        return "tool" if self.find_untold(results, {"tools": tools}) is None else "user"

    def _find_closing(self) -> str:
        """Return the control token that ends an answer in history; it may be another one at the very end.

        Raises:
          UnstableHistory: there is none, or the text after an answer is not fixed.
        """
        found = self._suffixes.find([{"role": "user", "content": "next question"}])
        first = next(iter(self._encode(found)), None)
        if first not in self.tokenizer.special_ids:
            raise UnstableHistory(
                f"after an answer the chat template prints {found!r}: no control token ends it"
            )
        return str(self.tokenizer.id_to_token(first))

    def _find_lead(self) -> str:
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        prompt, whole = self.render(probe[:1]), self.render(probe, add_generation_prompt=False)
        lead = whole[len(prompt) :].partition("answer")[0] if whole.startswith(prompt) else ""
        return "" if lead.strip() else lead

    def _find_opening(self) -> str:
        """Return the end of a prompt, from its last control token on: the text right before a response."""
        prompt = self.render([{"role": "user", "content": "question"}])
        controls = [index for index in self._encode(prompt) if index in self.tokenizer.special_ids]
        last = self.tokenizer.id_to_token(controls[-1]) if controls else None
        return prompt[prompt.rindex(last) :] if last is not None else prompt

    def _quick_delta(
        self, prefix: Sequence[Message], response: str, new_messages: Sequence[Message]
    ) -> str | None:
        """Return the text after the response from a cached seam, or None if no seam is valid here."""
        new_roles = tuple(message["role"] for message in new_messages)
        seam = self._seams.find(prefix[-1]["role"], new_roles, len(prefix))
        if seam is None or not _fits(seam, prefix, response, new_messages):
            return None
        delta = seam.fill([message["content"] for message in new_messages])
        system = _system_of(prefix)
        if system is None:
            return delta
        # A template may choose by the system's words what it prints elsewhere: looked at once for each.
        key = (repr(system), prefix[-1]["role"], new_roles)
        if key not in self._led:
            if len(self._led) >= _KEPT:  # tasks may have system messages of their own
                self._led.clear()
            self._led[key] = self._exact_delta(prefix, response, new_messages) == delta
        return delta if self._led[key] else None

    def _exact_delta(
        self,
        prefix: Sequence[Message],
        response: str,
        new_messages: Sequence[Message],
        **variables: Any,
    ) -> str | None:
        """Return the text after the response by rendering both conversations.

        The result is None if the longer conversation's text does not extend the shorter one's.
        """
        before = self.render(prefix, **variables) + response
        answered = {"role": "assistant", "content": response}
        after = self.render([*prefix, answered, *new_messages], **variables)
        return after[len(before) :] if after.startswith(before) else None


def _system_of(messages: Sequence[Message]) -> Message | None:
    return messages[0] if messages and messages[0]["role"] == "system" else None


def ends_in_thought(prompt: str) -> bool:
    """Return whether a prompt's text ends with the tag that opens a thought."""
    return prompt.rstrip().endswith("<think>")


def encode_behind(
    encode: Callable[[str], Sequence[int]], prompt: str, text: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and the ids of a text after it.

    Both are tokenized together, because some tokenizers mark the beginning of a text, so that the ids of the
    text alone may differ. If a token would span the border, no sampler could produce it; the text is then
    tokenized alone.
    """
    before, whole = list(encode(prompt)), list(encode(prompt + text))
    return before, whole[len(before) :] if whole[: len(before)] == before else list(encode(text))


def _fits(seam: Seam, prefix: Sequence[Message], response: str, new_messages: Sequence[Message]) -> bool:
    # A new message can make a template strip the reasoning of any earlier answer: check all messages.
    for message in itertools.chain(new_messages, () if seam.takes_any else prefix):
        content = message["content"]
        # A template may print keys other than role and content (tool calls, for example) anywhere.
        if len(message) != 2 or not isinstance(content, str) or not (seam.takes_any or is_plain(content)):
            return False
    return seam.takes_any or is_plain(response)


def _require_turn_end(tokenizer: Tokenizer) -> int:
    if tokenizer.turn_end_id is not None:
        return tokenizer.turn_end_id
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.render(probe, add_generation_prompt=False)  # raises if there is no template at all
    raise ChatTemplateError(
        "the chat template does not end an assistant's turn with a control token of the tokenizer, so a "
        f"sampler could not stop there; after the answer it prints {text.rpartition('answer')[2]!r}"
    )
