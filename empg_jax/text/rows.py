"""A written conversation as the token rows that a policy would have seen and sampled.

Every answer that is learned stands behind exactly the prompt that the template would have put before a
sampler, and holds exactly the tokens that it would have had to sample, its end-of-turn token included. Where
the template prints the longer conversation as an extension of the shorter, both share a row; where it does
not (reasoning stripped from history), the later answer gets a row of its own. No answer is learned twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from empg_jax.text.chat import ChatRenderer, encode_behind
from empg_jax.text.chatfile import ChatDataError, Conversation


@dataclasses.dataclass(slots=True)
class TokenRow:
    """Tokens and which of them are learned (two lists of one length); grows while it is built."""

    tokens: list[int]
    loss_mask: list[bool]

    def add(self, ids: Sequence[int], is_trained: bool) -> None:
        """Append tokens."""
        self.tokens += ids
        self.loss_mask += [is_trained] * len(ids)

    def cut(self, limit: int | None = None) -> TokenRow | None:
        """Return the row up to its last learned token among the first ``limit``; None when there is none."""
        mask = self.loss_mask[:limit]
        if not any(mask):
            return None
        stop = len(mask) - mask[::-1].index(True)
        return TokenRow(self.tokens[:stop], mask[:stop])


def tokenize_conversation(renderer: ChatRenderer, conversation: Conversation) -> list[TokenRow]:
    """Render and tokenize a conversation.

    Args:
      renderer: renderer of the model's chat template.
      conversation: messages and which of them are learned.

    Returns:
      Rows that end with a learned answer; nothing after the last one is kept.

    Raises:
      ChatDataError: a content holds the end-of-turn token.
      ChatTemplateError: the template refuses the conversation.
    """
    end = renderer.end_token
    for index, message in enumerate(conversation.messages):
        if end in message["content"]:
            raise ChatDataError(f"message {index} holds the control token {end}, which ends a turn")
    render = renderer.render
    if conversation.tools is not None:
        render = functools.partial(render, tools=conversation.tools)
    rows: list[TokenRow] = []
    row, shown = TokenRow([], []), ""  # shown: the row's text
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = conversation.messages[:index]
        prompt = render(before)
        if not rows or not prompt.startswith(shown):
            row, shown = TokenRow([], []), ""
            rows.append(row)
        whole = render((*before, message), add_generation_prompt=False)
        answer = _answer(prompt, whole, message["content"], end)
        prompt_ids, answer_ids = _encode(renderer, prompt[len(shown) :], answer, is_first=not shown)
        row.add(prompt_ids, False)
        row.add(answer_ids, conversation.is_trained[index])
        shown = prompt + answer
    return [kept for row in rows if (kept := row.cut()) is not None]


def _answer(prompt: str, whole: str, content: str, end: str) -> str:
    """What a sampler would have to say after the prompt, as the template writes it, its end included.

    Args:
      prompt: the template's text up to the generation prompt.
      whole: its text with the answer in place.
      content: the answer's own text.
      end: the end-of-turn token.
    """
    if whole.startswith(prompt) and end in whole[len(prompt) :]:
        said = whole[len(prompt) :]
        return said[: said.index(end) + len(end)]
    # The generation prompt is not part of history (an empty thought, say): the content follows it directly.
    return content + end


def _encode(
    renderer: ChatRenderer, delta: str, answer: str, *, is_first: bool
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt's new text and of the answer to it.

    A sampler gets the prompt's own ids, so the answer's are those that follow them. Within a row the end of
    the turn before is encoded along and dropped: what stands behind a control token is tokenized as in the
    whole text.
    """
    lead = "" if is_first else renderer.end_token
    prompt_ids, answer_ids = encode_behind(renderer.tokenizer.encode, lead + delta, answer)
    return prompt_ids[0 if is_first else 1 :], answer_ids
