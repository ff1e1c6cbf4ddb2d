"""Chat renderer: messages → *token delta*.

A conversation is tokenized once and only grows: what the policy sampled stays as the ids it sampled, and a
new message costs only its own tokens. Whether a chat template allows that is not assumed but shown: the
template's text with the new messages must start with the template's text before them plus the response. When
it does not (reasoning stripped from history, trimmed white space), `ChatRenderer.follow` says so with None,
and the caller starts a new row from a full rendering.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from empg_jax.text.seams import Seam, SeamFinder, is_plain
from empg_jax.text.template import ChatTemplateError, Message
from empg_jax.text.tokenizer import Tokenizer


class ChatRenderer:
    """Renders a growing conversation as token deltas.

    Args:
      tokenizer: a tokenizer with a chat template.
      options: variables for the template, for example ``{"enable_thinking": False}``.
      cache_size: how many encoded texts to keep.

    Raises:
      ChatTemplateError: when there is no template, or it does not end an assistant's turn with a single
        control token (then a turn has no end that a sampler could stop at).

    Attributes:
      end_id: the control token with which the template ends an assistant's turn.
      end_token: its text.
      lead: white space that the template puts before an answer and that a sampler has to say (mostly none).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, options: Mapping[str, Any] | None = None, cache_size: int = 8192
    ):
        self.tokenizer = tokenizer
        self._options = dict(options or {})
        self._encode = functools.lru_cache(maxsize=cache_size)(lambda text: tuple(tokenizer.encode(text)))
        self._seams = SeamFinder(self.render)
        self.end_id = _require_turn_end(tokenizer)
        end_token = tokenizer.id_to_token(self.end_id)
        assert end_token is not None
        self.end_token = end_token
        self.lead = self._find_lead()
        self._opening = self._find_opening()

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Return the template's text of a conversation; ``variables`` go before the renderer's options."""
        variables = {**self._options, **variables}
        return self.tokenizer.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def start(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the whole conversation so far, the generation prompt included."""
        return list(self._encode(self.render(messages)))

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of a response that a person or an expert wrote, as the template writes it.

        That is behind the template's ``lead`` and with its end of turn; `follow` is to be told the lead too.
        """
        return [*encode_behind(self._encode, self._opening, self.lead + text)[1], self.end_id]

    def follow(
        self,
        prefix_messages: Sequence[Message],
        response_text: str,
        new_messages: Sequence[Message],
        *,
        stopped: bool,
    ) -> list[int] | None:
        """Return the ids to append after a sampled response, so that the model can answer the new messages.

        Args:
          prefix_messages: the conversation that the response answers.
          response_text: the decoded response without its end-of-turn token.
          new_messages: what comes after the response, oldest first; not empty.
          stopped: True when the sampled ids end with ``end_id``; when False (cut by a length limit) the
            end-of-turn token is part of the result.

        Returns:
          The ids after the response, generation prompt included, or None when the template renders the
          longer conversation differently and a full rendering must start afresh.
        """
        if not new_messages:
            raise ValueError("follow needs at least one new message after the response")
        delta = self._quick_delta(prefix_messages, response_text, new_messages)
        if delta is None:
            delta = self._exact_delta(prefix_messages, response_text, new_messages)
        if delta is None:
            return None
        ids = self._encode(delta)
        # An end-of-turn control token is never merged with its neighbors, so ids before and after it are
        # those of the whole text.
        if not ids or ids[0] != self.end_id:
            return None
        return list(ids[1:] if stopped else ids)

    def _find_lead(self) -> str:
        probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        prompt, whole = self.render(probe[:1]), self.render(probe, add_generation_prompt=False)
        lead = whole[len(prompt) :].partition("answer")[0] if whole.startswith(prompt) else ""
        return "" if lead.strip() else lead

    def _find_opening(self) -> str:
        """What a response stands behind: the end of a prompt, from its last control token on."""
        prompt = self.render([{"role": "user", "content": "question"}])
        controls = [index for index in self._encode(prompt) if index in self.tokenizer.special_ids]
        last = self.tokenizer.id_to_token(controls[-1]) if controls else None
        return prompt[prompt.rindex(last) :] if last is not None else prompt

    def _quick_delta(
        self, prefix: Sequence[Message], response: str, new_messages: Sequence[Message]
    ) -> str | None:
        """Return the text after the response from remembered seams, or None when they may not be trusted."""
        new_roles = tuple(message["role"] for message in new_messages)
        seam = self._seams.find(prefix[-1]["role"], new_roles, len(prefix))
        if seam is None or not _fits(seam, prefix, response, new_messages):
            return None
        return seam.fill([message["content"] for message in new_messages])

    def _exact_delta(
        self, prefix: Sequence[Message], response: str, new_messages: Sequence[Message]
    ) -> str | None:
        """Return the text after the response by rendering both conversations; None if it is no extension."""
        before = self.render(prefix) + response
        after = self.render([*prefix, {"role": "assistant", "content": response}, *new_messages])
        return after[len(before) :] if after.startswith(before) else None


def encode_behind(
    encode: Callable[[str], Sequence[int]], prompt: str, text: str
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt and those of a text behind it.

    Some tokenizers mark the beginning of a text, so ids of the text alone may differ. Where a token would
    span the seam no sampler could produce it; there the text is tokenized alone all the same.
    """
    before, whole = list(encode(prompt)), list(encode(prompt + text))
    return before, whole[len(before) :] if whole[: len(before)] == before else list(encode(text))


def _fits(seam: Seam, prefix: Sequence[Message], response: str, new_messages: Sequence[Message]) -> bool:
    # Reasoning in an earlier answer may vanish when a later message arrives: all of the conversation counts.
    for message in itertools.chain(new_messages, () if seam.takes_any else prefix):
        content = message["content"]
        # More keys than role and content (tool calls and the like) may be printed anywhere.
        if len(message) != 2 or not isinstance(content, str) or not (seam.takes_any or is_plain(content)):
            return False
    return seam.takes_any or is_plain(response)


def _require_turn_end(tokenizer: Tokenizer) -> int:
    if tokenizer.turn_end_id is not None:
        return tokenizer.turn_end_id
    probe = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.render(probe, add_generation_prompt=False)  # raises when that is what is wrong
    raise ChatTemplateError(
        "the chat template does not end an assistant's turn with a control token of the tokenizer, so a "
        f"sampler could not stop there; after the answer it prints {text.rpartition('answer')[2]!r}"
    )
