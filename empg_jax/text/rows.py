"""Tokenization of written conversations into the rows that a policy would have seen and sampled.

Each trained answer follows exactly the prompt that the template would give to a sampler. It consists of
exactly the tokens that the policy would have to sample, including the end-of-turn token. If the template
prints the longer conversation as an extension of the shorter one, both answers share a row. Otherwise (a
template may strip reasoning from history) the later answer starts a new row, unless the history is
append-only. No answer is trained on twice. A conversation of which the template would leave something out is
refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from empg_jax.text.chat import ChatRenderer, encode_behind, ends_in_thought
from empg_jax.text.chatfile import ChatDataError, Conversation
from empg_jax.text.template import Message

_OPEN, _CLOSE = "<think>", "</think>"  # of a thought


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
      ChatDataError: a message holds the end-of-turn token, or the template does not print what it says.
      ChatTemplateError: the template refuses the conversation.
    """
    end = renderer.end_token
    variables: dict[str, Any] = {} if conversation.tools is None else {"tools": conversation.tools}
    render: Callable[..., str] = functools.partial(renderer.render, **variables)
    _require_no_end(conversation, end)
    _require_told(renderer, conversation, variables)
    rows: list[TokenRow] = []
    row, shown, last = TokenRow([], []), "", -1  # shown: the text of the row so far; last: its last answer
    for index, message in enumerate(conversation.messages):
        if message["role"] != "assistant":
            continue
        before = conversation.messages[:index]
        prompt = render(before)
        new = prompt[len(shown) :] if rows and prompt.startswith(shown) else None
        if renderer.history == "append" and rows and index > last + 1:
            new = renderer.suffix(before[:last], before[last + 1 :], **variables)
        if new is None:
            row, shown, new = TokenRow([], []), "", prompt
            rows.append(row)
        whole = render((*before, message), add_generation_prompt=False)
        if message.get("tool_calls") and not whole.startswith(prompt):
            raise ChatDataError(
                f"message {index} has tool_calls, and the chat template prints an earlier answer without its "
                "generation prompt, so that the text of the calls cannot be told: write them into content"
            )
        answer = _answer(prompt, whole, message, end)
        # Another answer, neither learned nor kept as sampled, is only history as the template prints it.
        if conversation.is_trained[index] or renderer.history == "append":
            _require_thoughts(prompt, answer, message, index)
        prompt_ids, answer_ids = _encode(renderer, new, answer, is_first=not shown)
        row.add(prompt_ids, False)
        row.add(answer_ids, conversation.is_trained[index])
        shown, last = shown + new + answer, index
    return [kept for row in rows if (kept := row.cut()) is not None]


def _require_no_end(conversation: Conversation, end: str) -> None:
    """Refuse the end-of-turn token in any text of a message or of the tools."""
    named = [(f"message {index} holds", message) for index, message in enumerate(conversation.messages)]
    for what, value in (*named, ("tools hold", conversation.tools)):
        if end in json.dumps(value, ensure_ascii=False):
            raise ChatDataError(f"{what} the control token {end}, which ends a turn")


def _require_told(renderer: ChatRenderer, conversation: Conversation, variables: dict[str, Any]) -> None:
    """Refuse tools, calls and roles that the template does not print."""
    if conversation.tools is not None and not renderer.tells_tools:
        raise ChatDataError(
            "has tools, and the chat template prints none: describe them in a system message, or set "
            "model.chat_template to one that does"
        )
    messages = conversation.messages
    if (role := renderer.find_untold(messages, variables)) is not None:
        raise ChatDataError(
            f"has messages of the role {role}, of which the chat template prints nothing: write "
            f"{'system' if role == 'developer' else 'user'}, or set model.chat_template to one that does"
        )
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and message.get("tool_calls"):
            changed = {key: value for key, value in message.items() if key != "tool_calls"}
            if not renderer.tells_apart(messages[: index + 1], index, changed, variables):
                raise ChatDataError(
                    f"message {index} has tool_calls, and the chat template prints none: write them into "
                    "content, or set model.chat_template to one that does"
                )


def _answer(prompt: str, whole: str, message: Message, end: str) -> str:
    """Return the text that the policy would have to sample after the prompt, including the end of the turn.

    Args:
      prompt: the template's text up to the generation prompt.
      whole: the template's text with the answer.
      message: the answer.
      end: the end-of-turn token.
    """
    if whole.startswith(prompt) and end in whole[len(prompt) :]:
        said = whole[len(prompt) :].partition(end)[0]
        if message.get("tool_calls") or _holds_thoughts(said, message):
            return said + end
    # The template does not repeat its generation prompt in history (an empty thought, for example), or strips
    # the thought of every answer. The policy then samples the content right after the generation prompt.
    content = message["content"]
    if ends_in_thought(prompt) and content.lstrip().startswith(_OPEN):
        content = content.lstrip().removeprefix(_OPEN).removeprefix(prompt[len(prompt.rstrip()) :])
    return content + end


def _holds_thoughts(said: str, message: Message) -> bool:
    """Return whether a message's thoughts, and the texts around them or beside calls, are in what is said."""
    content = message["content"]
    may_be_lost = _CLOSE in content or message.get("tool_calls")
    texts = re.split(f"{_OPEN}|{_CLOSE}", content) if may_be_lost else []
    return all(text.strip() in said for text in (*texts, message.get("reasoning_content") or ""))


def _require_thoughts(prompt: str, answer: str, message: Message, index: int) -> None:
    """Refuse an answer whose thought is lost, or does not go on from the generation prompt."""
    opening, is_whole = prompt.rstrip(), _holds_thoughts(answer, message)
    if ends_in_thought(prompt) and _CLOSE not in answer:
        raise ChatDataError(
            f"message {index} has no {_CLOSE}, and the chat template's generation prompt opens a thought: "
            f"write the thought into content, as {_OPEN}...{_CLOSE}, or change model.chat_options"
        )
    is_second = opening.endswith(_CLOSE) and (_CLOSE in answer or not is_whole)
    if is_second or (opening.endswith((_OPEN, _CLOSE)) and answer.lstrip().startswith(_OPEN)):
        raise ChatDataError(
            f"message {index} has a thought, and the chat template's generation prompt has one already: take "
            "it out of the message, or change model.chat_options (enable_thinking, for example)"
        )
    if not is_whole:
        raise ChatDataError(
            f"message {index} has a thought, or a text beside its calls, that the chat template does not "
            f"print: write the whole answer into content, with its thought as {_OPEN}...{_CLOSE} and its "
            "calls as the model writes them"
        )


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
