"""The trajectory viewer: one static HTML page, tokens colored by entropy or by advantage.

The page needs no script library, no font and no network: it opens from disk and can be sent by mail.
"""

from __future__ import annotations

import html
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from empg_jax.files import write_text_atomic
from empg_jax.report.transcripts import headline, turn_note

if TYPE_CHECKING:
    from empg_jax.types import Trajectory, Turn

Decode = Callable[[Sequence[int]], str]

PAGE = Path(__file__).with_name("viewer.html")
RADIO = (
    '<label><input type="radio" name="by" value="{by}"{checked} onchange="document.body.className=value">'
    " {by}</label>"
)


class _Scale(NamedTuple):
    """The values that are drawn in full color."""

    entropy: float
    advantage: float


def write_viewer(
    path: Path,
    trajectories: Sequence[Trajectory],
    decode: Decode,
    *,
    advantages: Sequence[Sequence[np.ndarray]] | None = None,
    title: str = "Trajectories",
) -> Path:
    """Write the page.

    Args:
      path: the file to write.
      trajectories: the episodes to show.
      decode: maps token ids to text.
      advantages: per trajectory, per turn, float[R]: the advantage of each response token. Without it
        the page colors by entropy only.
      title: heading of the page.

    Returns:
      ``path``.

    Raises:
      ValueError: the advantages do not match the turns or their tokens.
    """
    if advantages is not None:
        _check_advantages(trajectories, advantages)
    shown = [turn for trajectory in trajectories for turn in trajectory.turns]
    scale = _Scale(
        entropy=_largest([turn.entropies for turn in shown]),
        advantage=_largest([values for turns in advantages or () for values in turns]),
    )
    cards = []
    for index, trajectory in enumerate(trajectories):
        credit = advantages[index] if advantages is not None else None
        cards.append(_card(trajectory, decode, credit, scale, is_open=index == 0))
    legend = f"darkest: entropy {scale.entropy:.2f} nats"
    switch = ""
    if advantages is not None:
        legend += f", advantage ±{scale.advantage:.2f}"
        switch = RADIO.format(by="entropy", checked=" checked") + RADIO.format(by="advantage", checked="")
    page = string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), switch=switch, legend=legend, cards="\n".join(cards)
    )
    write_text_atomic(Path(path), page)
    return Path(path)


def split_text(tokens: Sequence[int], decode: Decode) -> list[str]:
    """Split the decoded text into the parts that the tokens add.

    A character whose bytes are spread over several tokens is shown at the token that completes it.
    """
    pieces, shown = [], ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        # An incomplete character decodes to U+FFFD; it is held back until its last byte has come.
        complete = text.rstrip("\ufffd") if end < len(tokens) else text
        if not complete.startswith(shown):  # the tokenizer rewrote earlier text: start over from this token
            complete = shown + decode(tokens[end - 1 : end])
        pieces.append(complete[len(shown) :])
        shown = complete
    return pieces


def _check_advantages(trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[np.ndarray]]) -> None:
    found = [[len(values) for values in turns] for turns in advantages]
    expected = [[len(turn.response_tokens) for turn in trajectory.turns] for trajectory in trajectories]
    if found != expected:
        raise ValueError(f"advantages have lengths {found}, the response tokens {expected}")


def _largest(arrays: Sequence[np.ndarray]) -> float:
    return max((float(np.abs(values).max()) for values in arrays if len(values)), default=0.0)


def _card(
    trajectory: Trajectory,
    decode: Decode,
    advantages: Sequence[np.ndarray] | None,
    scale: _Scale,
    *,
    is_open: bool,
) -> str:
    verdict = "solved" if trajectory.is_success else "failed"
    turns = []
    for number, turn in enumerate(trajectory.turns, start=1):
        credit = advantages[number - 1] if advantages is not None else None
        turns.append(_turn(turn, number, decode, credit, scale))
    return (
        f'<details class="card"{" open" if is_open else ""}><summary>'
        f'<span class="badge {verdict}">{verdict}</span> {html.escape(headline(trajectory))}</summary>'
        f"{''.join(turns)}</details>"
    )


def _turn(turn: Turn, number: int, decode: Decode, advantages: np.ndarray | None, scale: _Scale) -> str:
    prompt = html.escape(decode([int(token) for token in turn.prompt_tokens]))
    note = turn_note(turn, number)
    if advantages is not None and len(advantages):
        note += f", advantage {float(np.mean(advantages)):+.3f}"
    return (
        f'<div class="turn"><div class="note">{html.escape(note)}</div>'
        f'<div class="text">{html.escape(turn.observation)}</div>'
        f'<details class="prompt"><summary>prompt, {len(turn.prompt_tokens)} tokens</summary>'
        f'<div class="text">{prompt}</div></details>'
        f'<div class="text response">{_tokens(turn, decode, advantages, scale)}</div></div>'
    )


def _tokens(turn: Turn, decode: Decode, advantages: np.ndarray | None, scale: _Scale) -> str:
    spans = []
    pieces = split_text([int(token) for token in turn.response_tokens], decode)
    for index, piece in enumerate(pieces):
        entropy, logprob = float(turn.entropies[index]), float(turn.behavior_logprobs[index])
        style = f"--e:{entropy / scale.entropy if scale.entropy else 0:.2f}"
        told = f"entropy {entropy:.3f}, log-prob {logprob:.3f}"
        if advantages is not None:
            share = float(advantages[index]) / scale.advantage if scale.advantage else 0.0
            style += f";--p:{max(share, 0.0):.2f};--n:{max(-share, 0.0):.2f}"
            told += f", advantage {float(advantages[index]):+.3f}"
        spans.append(f'<span style="{style}" title="{told}">{html.escape(piece)}</span>')
    return "".join(spans)
