"""Episodes as the page holds them: columns to filter by, text to search in, compressed chunks to read."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from empg_jax.report.statistics import finite
from empg_jax.report.view.pieces import Decode, split_text
from empg_jax.report.view.reading import Record

# The columns of the list, in this order. ``chunk`` and ``slot`` say where the transcript of an episode lies.
COLUMNS = (
    *("update", "group", "member", "task", "split", "kind", "status", "reason", "return", "success"),
    *("turns", "tokens", "entropy", "advantage", "goal", "chunk", "slot"),
)
TURN_TEXTS = ("observation", "response", "finish_reason")
TURN_NUMBERS = (
    "reward",
    "tokens",
    "version",
    "entropy",
    "logprob",
    "factor",
    "bonus",
    "advantage_base",
    "advantage",
)
CREDIT = ("factor", "bonus", "advantage_base", "advantage")
TOKEN_NUMBERS = {"token_entropies": "e", "token_logprobs": "l", "token_advantages": "a"}
CHUNK_BYTES = 400_000  # of JSON; a browser opens that within a few milliseconds
SEARCHED = 4_000  # most characters of an episode to search in
SEARCH_BYTES = 12_000_000  # of text to search in, over all episodes

# Of one algorithm: per record and turn the numbers of CREDIT.
Credit = Sequence[Sequence[Sequence[float | None]]]


@dataclasses.dataclass(frozen=True)
class Packed:
    """The episodes of one file.

    Attributes:
      columns: by name, one value per episode, ordered by group and member.
      search: lowercase text of each episode.
      chunks: compressed JSON by name.
      scale: largest size of each number that is drawn.
      has_tokens: whether some turn has numbers of its tokens.
    """

    columns: dict[str, list[Any]]
    search: list[str]
    chunks: dict[str, bytes]
    scale: dict[str, float]
    has_tokens: bool


def pack(
    name: str,
    records: Sequence[Record],
    *,
    decode: Decode | None = None,
    others: Mapping[str, Credit] | None = None,
) -> Packed:
    """Pack the episodes of one file.

    Args:
      name: name of the file; chunks are named after it.
      records: episodes in the order of the file.
      decode: maps token ids to text; None leaves the numbers of tokens out.
      others: by name, what other algorithms would give these turns.
    """
    order = sorted(
        range(len(records)), key=lambda i: (_key(records[i], "group_id"), _key(records[i], "member"), i)
    )
    columns: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    search, chunks, has_tokens = [], {}, False
    for number, places in enumerate(_cut([records[i] for i in order])):
        chunk = f"{name}.{number}"
        shown = [records[order[place]] for place in places]
        episodes = [_describe(record, decode) for record in shown]
        has_tokens = has_tokens or any("pieces" in turn for each in episodes for turn in each["turns"])
        chunks[chunk] = compress(episodes)
        for other, credit in (others or {}).items():
            chunks[f"{chunk}.{other}"] = compress([_rounded(credit[order[place]]) for place in places])
        for slot, record in enumerate(shown):
            for column, value in _row(record).items():
                columns[column].append(value)
            columns["chunk"].append(chunk)
            columns["slot"].append(slot)
            search.append(_searched(record)[:SEARCHED])
    return Packed(columns, search, chunks, _scale(records), has_tokens)


def compress(value: Any) -> bytes:
    """Compress a value as JSON; equal values give equal bytes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A text may hold half of a surrogate pair, which UTF-8 has no bytes for.
    return gzip.compress(text.encode("utf-8", "replace"), compresslevel=6, mtime=0)


def number(value: Any, digits: int = 5) -> float | int | None:
    """Return a JSON number with so many digits; None for everything that is no finite number."""
    known = finite(value)
    return float(f"{known:.{digits}g}") if isinstance(known, float) else known


def _cut(records: Sequence[Record]) -> Iterator[list[int]]:
    """Cut between groups, so that the members of a group lie in one chunk."""
    places: list[int] = []
    size = 0
    for place, record in enumerate(records):
        is_new = place and _key(record, "group_id") != _key(records[place - 1], "group_id")
        if is_new and size > CHUNK_BYTES:
            yield places
            places, size = [], 0
        places.append(place)
        size += sum(120 + _length(turn) for turn in record["turns"])
    if places:
        yield places


def _length(turn: Record) -> int:
    texts = sum(len(_text(turn.get(name))) for name in TURN_TEXTS)
    values = turn.get("token_ids")
    return texts + (25 * len(values) if isinstance(values, list) else 0)


def _key(record: Record, name: str) -> int:
    value = record.get(name)
    return value if isinstance(value, int) else 0


def _row(record: Record) -> dict[str, Any]:
    turns, success = record["turns"], record.get("success")
    values = [number(turn.get("advantage")) for turn in turns]
    known = [value for value in values if value is not None]
    returned = number(record.get("return"))
    if returned is None:  # an older or hand-made record
        rewards = [number(turn.get("reward")) for turn in turns]
        returned = None if None in rewards else sum(filter(None, rewards))
    entropies = [value for turn in turns if (value := number(turn.get("entropy"))) is not None]
    return {
        "update": _key(record, "update"),
        "group": _key(record, "group_id"),
        "member": _key(record, "member"),
        "task": number(record.get("task")),
        "split": _text(record.get("split")),
        "kind": _text(record.get("group")),
        "status": _text(record.get("status")),
        "reason": _text(record.get("reason")),
        "return": returned,
        "success": int(success) if isinstance(success, bool) else None,
        "turns": len(turns),
        "tokens": sum(_key(turn, "tokens") for turn in turns),
        "entropy": number(sum(entropies) / len(entropies), 4) if entropies else None,
        "advantage": number(sum(known) / len(known), 4) if known else None,
        "goal": _crop(_text(turns[0].get("observation")) if turns else ""),
    }


def _crop(text: str, head: int = 90, tail: int = 70) -> str:
    """Shorten a first observation; many environments state the task at its end."""
    line = " ".join(text.split())
    return line if len(line) <= head + tail + 3 else f"{line[:head]} … {line[-tail:]}"


def _searched(record: Record) -> str:
    turns = record["turns"]
    first = _text(turns[0].get("observation"))[:600] if turns else ""
    responses = "\n".join(_text(turn.get("response")) for turn in turns)
    later = "\n".join(_text(turn.get("observation")) for turn in turns[1:])
    return f"{first}\n{responses}\n{later}".lower()


def _describe(record: Record, decode: Decode | None) -> dict[str, Any]:
    metrics = record.get("metrics")
    shown = {str(name): number(value) for name, value in metrics.items()} if isinstance(metrics, dict) else {}
    return {
        "detail": _text(record.get("detail")),
        "metrics": shown,
        "turns": [_turn(turn, decode) for turn in record["turns"]],
    }


def _turn(turn: Record, decode: Decode | None) -> dict[str, Any]:
    found: dict[str, Any] = {name: _text(turn.get(name)) for name in TURN_TEXTS}
    found |= {name: value for name in TURN_NUMBERS if (value := number(turn.get(name))) is not None}
    found["valid"] = turn.get("valid") if isinstance(turn.get("valid"), bool) else None
    ids = turn.get("token_ids")
    if decode is None or not isinstance(ids, list) or not all(type(index) is int for index in ids):
        return found
    try:
        found["pieces"] = split_text(ids, decode)
    except (ValueError, OverflowError, TypeError):  # ids of another vocabulary
        return found
    for name, short in TOKEN_NUMBERS.items():
        values = turn.get(name)
        if isinstance(values, list) and len(values) == len(ids):
            found[short] = [number(value, 3) for value in values]
    return found


def _rounded(turns: Sequence[Sequence[float | None]]) -> list[list[float | int | None]]:
    return [[number(value) for value in values] for values in turns]


def _scale(records: Sequence[Record]) -> dict[str, float]:
    found = dict.fromkeys(("entropy", "logprob", "bonus", "advantage_base", "advantage"), 0.0)
    for record in records:
        for turn in record["turns"]:
            for name in found:
                value = turn.get(name)
                if type(value) is float and math.isfinite(value):
                    found[name] = max(found[name], abs(value))
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
