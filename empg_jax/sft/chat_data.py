"""Chat files as training examples: they are read and tokenized once and stored as flat arrays.

Each row of a conversation (`text.rows`) is one example. An example is returned as a `Trajectory`, so that
packing, loss and update are the same as for episodes.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from empg_jax.config.places import expand
from empg_jax.text.chat import ChatRenderer
from empg_jax.text.chatfile import ChatDataError, Conversation, read_chat_file
from empg_jax.text.rows import TokenRow, tokenize_conversation
from empg_jax.text.template import ChatTemplateError
from empg_jax.types import Outcome, Status, Trajectory, Turn

SHOWN_PROBLEMS = 10  # number of unusable lines that an error message lists


@dataclasses.dataclass(frozen=True, eq=False)
class ChatCorpus(Sequence[Trajectory]):
    """Examples in three flat arrays, which take about five bytes per token.

    Attributes:
      tokens: int32, the concatenated rows.
      loss_mask: bool of the same length, True for trained tokens.
      offsets: int64[rows + 1]; row ``i`` has the tokens from ``offsets[i]`` to ``offsets[i + 1]``.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Trajectory:  # type: ignore[override]  # no slices
        """Return one row as a trajectory, with a turn for every trained answer."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = self.offsets[index % len(self) :][:2]
        tokens, mask = self.tokens[start:stop], self.loss_mask[start:stop]
        # Pairs of first and last + 1 index of every run of trained tokens.
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        turns = tuple(_turn(tokens[:first], tokens[first:last]) for first, last in edges)
        return Trajectory(
            task=index,
            split="data",
            group_id=index,
            member=0,
            turns=turns,
            outcome=Outcome(Status.TRAINED, "written"),
            episode_return=0.0,
            is_success=False,
            terminated=True,
            truncated=False,
        )

    @property
    def max_turns(self) -> int:
        """Largest number of trained answers in one row; 0 without rows."""
        # A run starts after an untrained token, and also at the first token of a row: the token before it
        # in the flat array belongs to another row.
        starts = np.concatenate([self.loss_mask[:1], self.loss_mask[1:] & ~self.loss_mask[:-1]])
        starts[self.offsets[:-1]] = self.loss_mask[self.offsets[:-1]]
        totals = np.concatenate([[0], np.cumsum(starts)])
        return int(np.max(np.diff(totals[self.offsets]), initial=0))

    @property
    def fingerprint(self) -> str:
        """A short hash of all tokens and masks."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.tokens, self.loss_mask, self.offsets):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()


def _turn(prompt: np.ndarray, response: np.ndarray) -> Turn:
    zeros = np.zeros(len(response), np.float32)
    return Turn(
        prompt_tokens=prompt,
        response_tokens=response,
        behavior_logprobs=zeros,
        entropies=zeros,
        reward=0.0,
        version=0,
        anchor=0,
        is_valid=True,
        finish_reason="stop",
    )


class _Builder:
    """A collector of the rows of one part of the data (training or held out)."""

    def __init__(self) -> None:
        self.tokens, self.mask, self.offsets = array.array("i"), bytearray(), array.array("q", [0])

    def add(self, row: TokenRow) -> None:
        self.tokens.extend(row.tokens)
        self.mask.extend(row.loss_mask)
        self.offsets.append(len(self.tokens))

    def build(self) -> ChatCorpus:
        return ChatCorpus(
            np.frombuffer(self.tokens, np.int32) if self.tokens else np.zeros(0, np.int32),
            np.frombuffer(self.mask, np.bool_),
            np.frombuffer(self.offsets, np.int64),
        )


@dataclasses.dataclass
class ChatData:
    """The examples of chat files, with counts for the report.

    Attributes:
      train: training examples.
      held_out: examples for the held-out loss; may be empty.
      conversations: number of conversations read.
      held_out_conversations: number of held-out conversations.
      too_long: number of rows longer than the limit.
      unknown: number of tokens that are the tokenizer's unknown token.
    """

    train: ChatCorpus
    held_out: ChatCorpus
    conversations: int
    held_out_conversations: int
    too_long: int
    unknown: int

    def describe(self, max_tokens: int, too_long: str) -> str:
        """Return a one-line summary for the user."""
        tokens = len(self.train.tokens) + len(self.held_out.tokens)
        learned = int(self.train.loss_mask.sum())
        parts = [
            f"chat data: {self.conversations:,} conversations ({self.held_out_conversations:,} held out), "
            f"{len(self.train):,} + {len(self.held_out):,} rows, {tokens:,} tokens, {learned:,} learned"
        ]
        if self.too_long:
            what = "left out (sft.too_long=truncate cuts them)" if too_long == "skip" else "cut"
            parts.append(f"{self.too_long:,} rows longer than rollout.max_tokens={max_tokens} {what}")
        if self.unknown:
            parts.append(f"{self.unknown:,} tokens are unknown to the tokenizer")
        return "; ".join(parts)


def load_chat_data(
    paths: Sequence[str | Path],
    renderer: ChatRenderer,
    *,
    max_tokens: int,
    loss_on: Literal["all", "last"] = "all",
    too_long: Literal["skip", "truncate"] = "skip",
    holdout: float = 0.0,
    advance: Callable[[int, dict[str, float]], None] = lambda n, values: None,
    check: Callable[[], None] = lambda: None,
) -> ChatData:
    """Read, check and tokenize chat files.

    Args:
      paths: JSON-lines files.
      renderer: renderer of the model's chat template.
      max_tokens: length limit of a row.
      loss_on: train on ``all`` answers of a conversation, or only on the ``last``.
      too_long: ``skip`` a longer row, or ``truncate`` it.
      holdout: share of the conversations that is held out. A hash of the content selects them, so that the
        choice depends neither on order nor on seed, and copies of a conversation are never on both sides.
      advance: progress display, called after each conversation.
      check: called before each line is tokenized; it may raise to end the reading.

    Raises:
      ChatDataError: some lines are no conversations (all are counted, the first ten are listed), or there are
        no training examples.
    """
    parts = (_Builder(), _Builder())
    problems: list[str] = []
    num_problems = conversations = held_out = num_long = unknown = 0
    unknown_id = renderer.tokenizer.token_to_id(renderer.tokenizer.special_tokens.get("unk_token", ""))
    for where, conversation in _read(paths):
        check()
        try:
            if isinstance(conversation, ChatDataError):
                raise conversation
            rows = tokenize_conversation(renderer, _select(conversation, loss_on))
        except (ChatDataError, ChatTemplateError) as problem:
            num_problems += 1
            if num_problems <= SHOWN_PROBLEMS:
                problems.append(f"{where}: {problem}")
            continue
        conversations += 1
        is_held_out = _position(conversation) < holdout
        held_out += is_held_out
        for row in rows:
            kept = _fit(row, max_tokens, too_long)
            num_long += len(row.tokens) > max_tokens
            if kept is not None:
                parts[is_held_out].add(kept)
                unknown += row.tokens.count(unknown_id) if unknown_id is not None else 0
        advance(1, {})
    if problems:
        raise ChatDataError(_list_problems(problems, num_problems))
    data = ChatData(parts[0].build(), parts[1].build(), conversations, held_out, num_long, unknown)
    _require_examples(data, paths, max_tokens)
    return data


def epoch_batch(count: int, size: int, seed: int, update: int) -> list[int]:
    """Return the indices of an update's examples.

    Every example occurs once per epoch, and every epoch has its own random order.

    Args:
      count: number of examples.
      size: number of examples per update; it is limited to ``count``.
      seed: the run's seed.
      update: index of the update. The result does not depend on earlier updates, so a resumed run continues
        with the same examples.
    """
    size = min(size, count)
    chosen: list[int] = []
    position = update * size
    while len(chosen) < size:
        epoch, start = divmod(position + len(chosen), count)
        order = np.random.default_rng((seed, 2, epoch)).permutation(count)
        chosen += order[start : start + size - len(chosen)].tolist()
    return chosen


def _read(paths: Sequence[str | Path]) -> Iterator[tuple[str, Conversation | ChatDataError]]:
    for path in map(Path, paths):
        for number, conversation in read_chat_file(expand(path, "sft.data")):
            yield f"{path}, line {number}", conversation


def _select(conversation: Conversation, loss_on: str) -> Conversation:
    if loss_on == "all":
        return conversation
    last = max(index for index, is_trained in enumerate(conversation.is_trained) if is_trained)
    flags = tuple(index == last for index in range(len(conversation.messages)))
    return dataclasses.replace(conversation, is_trained=flags)


def _position(conversation: Conversation) -> float:
    """Map a conversation to [0, 1) by a hash of its content, uniformly over contents."""
    text = json.dumps([conversation.messages, conversation.tools], sort_keys=True, ensure_ascii=False)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _fit(row: TokenRow, max_tokens: int, too_long: str) -> TokenRow | None:
    if len(row.tokens) <= max_tokens:
        return row
    return row.cut(max_tokens) if too_long == "truncate" else None


def _list_problems(problems: Sequence[str], count: int) -> str:
    rest = f"\n  and {count - len(problems):,} more" if count > len(problems) else ""
    lines = "line is no conversation" if count == 1 else f"{count:,} lines are no conversations"
    return f"sft.data: {lines if count > 1 else '1 ' + lines}:\n  " + "\n  ".join(problems) + rest


def _require_examples(data: ChatData, paths: Sequence[str | Path], max_tokens: int) -> None:
    names = ", ".join(map(str, paths))
    if data.conversations == 0:
        raise ChatDataError(f"sft.data: {names} holds no conversation")
    if len(data.train) + len(data.held_out) == 0:
        raise ChatDataError(
            f"sft.data: none of the {data.conversations:,} conversations of {names} fits "
            f"rollout.max_tokens={max_tokens}: raise it, or use sft.too_long=truncate"
        )
    if len(data.train) == 0:
        raise ChatDataError(
            f"sft.data: all {data.conversations:,} conversations of {names} are held out: lower sft.holdout"
        )
