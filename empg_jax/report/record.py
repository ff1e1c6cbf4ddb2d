"""What a run has counted and measured so far: a part of every checkpoint, the source of ``summary.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from empg_jax.types import Trajectory


@dataclasses.dataclass(frozen=True)
class PanelResult:
    """One evaluation of the held-out panel.

    Attributes:
      update: RL updates made before it.
      metrics: ``eval_*`` by name.
      wins: ``1`` or ``0`` for every task, in the panel's order.
    """

    update: int
    metrics: dict[str, float]
    wins: str


@dataclasses.dataclass
class RunRecord:
    """The totals of a run, over all of its attempts.

    Attributes:
      phase: the warm start, or RL.
      sft_update: updates of the warm start that are made.
      sft_data: hash of its data; empty for demonstrations (recorded again on resume), None before it.
      sft_eval_loss: the last held-out loss of the warm start, in nats per token.
      panels: results by time, ``before`` and ``after``.
      tokens_sampled: tokens of the trajectories that were learned from.
      trajectories: episodes by ``status:reason``.
      rollbacks_in_a_row: updates in a row that were undone.
      recompiles_after_warmup: programs compiled during the RL phase; None until it has ended.
    """

    phase: Literal["sft", "rl"] = "sft"
    sft_update: int = 0
    sft_data: str | None = None
    sft_eval_loss: float | None = None
    panels: dict[str, PanelResult] = dataclasses.field(default_factory=dict)
    tokens_sampled: int = 0
    trajectories: dict[str, int] = dataclasses.field(default_factory=dict)
    rollbacks_in_a_row: int = 0
    recompiles_after_warmup: int | None = None

    def count(self, trajectories: Sequence[Trajectory], outcomes: Mapping[str, int]) -> None:
        """Add a batch, and take over the episodes by outcome."""
        self.tokens_sampled += sum(trajectory.num_tokens for trajectory in trajectories)
        self.trajectories = dict(sorted(outcomes.items()))

    def as_json(self) -> dict[str, Any]:
        """The record in JSON's types; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunRecord:
        """The inverse of `as_json`."""
        panels = {when: PanelResult(**panel) for when, panel in values["panels"].items()}
        return cls(**{**values, "panels": panels})

    def summary(self) -> dict[str, Any]:
        """What of it stands in ``summary.json``."""
        found: dict[str, Any] = {"sft_data": self.sft_data} if self.sft_data else {}
        if self.sft_eval_loss is not None:
            found["sft_eval_loss"] = self.sft_eval_loss
        for when, panel in self.panels.items():
            found |= {f"{name}_{when}": value for name, value in panel.metrics.items()}
            found |= {"eval_tasks": len(panel.wins), "updates": panel.update, f"eval_wins_{when}": panel.wins}
        found |= {"tokens_sampled": self.tokens_sampled, "trajectories": self.trajectories}
        if self.recompiles_after_warmup is not None:
            found["recompiles_after_warmup"] = self.recompiles_after_warmup
        return found
