"""Tokenization of written conversations into the rows that a policy would have seen and sampled.

Each trained answer follows exactly the prompt that the template would give to a sampler. It consists of
exactly the tokens that the policy would have to sample, including the end-of-turn token. If the template
prints the longer conversation as an extension of the shorter one, both answers share a row. Otherwise (a
template may strip reasoning from history) the later answer starts a new row, unless the history is
append-only. No answer is trained on twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from empg_jax.text.chat import ChatRenderer, encode_behind
from empg_jax.text.chatfile import ChatDataError, Conversation


@dataclasses.dataclass(slots=True)
class TokenRow:
    """Tokens and the mask of trained tokens: two lists of the same length that grow while a row is built."""

    tokens: list[int]
    loss_mask: list[bool]

    def add(self, ids: Sequence[int], is_trained: bool) -> None:
        """Append tokens."""
        self.tokens += ids
        self.loss_mask += [is_trained] * len(ids)

    def cut(self, limit: int | None = None) -> TokenRow | None:
        """Return the row up to its last trained token among the first ``limit``, or None if there is none."""
        mask = self.loss_mask[:limit]
        if not any(mask):
            return None
        stop = len(mask) - mask[::-1].index(True)
        return TokenRow(self.tokens[:stop], mask[:stop])


def tokenize_conversation(renderer: ChatRenderer, conversation: Conversation) -> list[TokenRow]:
    """Render and tokenize a conversation.

    Args:
      renderer: renderer of the model's chat template.
      conversation: messages with their training flags.

    Returns:
      Rows that end with a trained answer; later tokens are dropped.

    Raises:
      ChatDataError: a content holds the end-of-turn token.
      ChatTemplateError: the template refuses the conversation.
    """
    end = renderer.end_token
    for index, message in enumerate(conversation.messages):
        if end in message["content"]:
            raise ChatDataError(f"message {index} holds the control token {end}, which ends a turn")
    variables: dict[str, Any] = {} if conversation.tools is None else {"tools": conversation.tools}
    render: Callable[..., str] = functools.partial(renderer.render, **variables)
    rows: list[TokenRow] = []
    row, shown, last = TokenRow([], []), "", -1  # shown: the text of the row so far; last: its last answer
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = conversation.messages[:index]
        prompt = render(before)
        new = prompt[len(shown) :] if rows and prompt.startswith(shown) else None
        if renderer.history == "append" and rows and index > last + 1:
            new = renderer.suffix(before[last + 1 :], **variables)
        if new is None:
            row, shown, new = TokenRow([], []), "", prompt
            rows.append(row)
        whole = render((*before, message), add_generation_prompt=False)
        if message.get("tool_calls") and not whole.startswith(prompt):
            raise ChatDataError(
                f"message {index} has tool_calls, and the chat template prints an earlier answer without its "
                "generation prompt, so that the text of the calls cannot be told: write them into content"
            )
        answer = _answer(prompt, whole, message["content"], end)
        prompt_ids, answer_ids = _encode(renderer, new, answer, is_first=not shown)
        row.add(prompt_ids, False)
        row.add(answer_ids, conversation.is_trained[index])
        shown, last = shown + new + answer, index
    return [kept for row in rows if (kept := row.cut()) is not None]


def _answer(prompt: str, whole: str, content: str, end: str) -> str:
    """Return the text that the policy would have to sample after the prompt, including the end of the turn.

    Args:
      prompt: the template's text up to the generation prompt.
      whole: the template's text with the answer.
      content: the answer's own text.
      end: the end-of-turn token.
    """
    if whole.startswith(prompt) and end in whole[len(prompt) :]:
        said = whole[len(prompt) :]
        return said[: said.index(end) + len(end)]
    # The template does not repeat its generation prompt in history (an empty thought, for example). The
    # policy then samples the content right after the generation prompt.
    return content + end


def _encode(
    renderer: ChatRenderer, delta: str, answer: str, *, is_first: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt's new text and of its answer.

    The end-of-turn token before the new text is encoded with it and dropped again: text after a control token
    has the same ids as in a tokenization of the whole row.
    """
    lead = "" if is_first else renderer.end_token
    prompt_ids, answer_ids = encode_behind(renderer.tokenizer.encode, lead + delta, answer)
    return prompt_ids[0 if is_first else 1 :], answer_ids
