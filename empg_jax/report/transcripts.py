"""Sample episodes as a text file: observations, responses and the mean entropy of each turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.files import write_text_atomic

if TYPE_CHECKING:  # these types import jax, which a report does not need
    from empg_jax.types import Trajectory, Turn

RULE = "-" * 88


def select_samples(trajectories: Sequence[Trajectory], count: int) -> list[Trajectory]:
    """Select at most ``count`` episodes with turns, in order: half of them solved, if there are enough."""
    seen = [trajectory for trajectory in trajectories if trajectory.turns]
    solved = [index for index, trajectory in enumerate(seen) if trajectory.is_success]
    failed = [index for index, trajectory in enumerate(seen) if not trajectory.is_success]
    share = max(count // 2, count - len(failed))  # when one kind is short, the other fills up
    chosen = [*solved[:share], *failed[: count - len(solved[:share])]]
    return [seen[index] for index in sorted(chosen)]


def write_transcripts(path: Path, trajectories: Sequence[Trajectory]) -> Path:
    """Write the episodes as text, one after the other; return ``path``."""
    write_text_atomic(Path(path), "\n".join(render_transcript(trajectory) for trajectory in trajectories))
    return Path(path)


def render_transcript(trajectory: Trajectory) -> str:
    """Render one episode as text."""
    lines = [RULE, headline(trajectory), RULE]
    for number, turn in enumerate(trajectory.turns, start=1):
        lines += [
            turn.observation.rstrip(),
            f"  > {turn.response.strip()}    [{turn_note(turn, number)}]",
            "",
        ]
    return "\n".join(lines)


def headline(trajectory: Trajectory) -> str:
    """Format task, verdict, return and length in one line."""
    outcome = trajectory.outcome.reason + (
        f" ({trajectory.outcome.detail})" if trajectory.outcome.detail else ""
    )
    verdict = "solved" if trajectory.is_success else "not solved"
    return (
        f"{trajectory.split} task {trajectory.task}, attempt {trajectory.member}: {verdict}, {outcome}, "
        f"return {trajectory.episode_return:g}, {len(trajectory.turns)} turns, {trajectory.num_tokens} tokens"
    )


def turn_note(turn: Turn, number: int) -> str:
    """Format number, mean entropy, reward and faults of a turn, as a note beside it."""
    notes = [f"turn {number}"]
    if len(turn.entropies):
        notes.append(f"entropy {float(turn.entropies.mean()):.2f}")
    if turn.reward:
        notes.append(f"reward {turn.reward:g}")
    if not turn.is_valid:
        notes.append("no valid action")
    if turn.finish_reason == "length":
        notes.append("cut at the length limit")
    return ", ".join(notes)
