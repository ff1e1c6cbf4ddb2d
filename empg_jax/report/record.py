"""The totals and results of a run so far: a part of every checkpoint, and the source of ``summary.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from empg_jax.files import read_json_object

if TYPE_CHECKING:
    from empg_jax.types import Trajectory

SUMMARY = "summary.json"  # in the run's folder: written when the last evaluation has ended


@dataclasses.dataclass(frozen=True)
class PanelResult:
    """One evaluation of the held-out panel.

    Attributes:
      update: number of RL updates made before the evaluation.
      metrics: ``eval_*`` metrics by name.
      wins: ``1`` or ``0`` for every task, in the panel's order.
    """

    update: int
    metrics: dict[str, float]
    wins: str


@dataclasses.dataclass
class RunRecord:
    """The totals of a run, over all of its attempts.

    Attributes:
      phase: current phase: the warm start, or RL.
      sft_update: number of warm-start updates made.
      sft_data: hash of the warm start's data; empty for demonstrations (recorded again on resume), None
      before.
      sft_eval_loss: the last held-out loss of the warm start, in nats per token.
      weights_before: checksum of the policy that RL starts from; None before. Runs with the same one can be
        paired.
      panels: results by time, ``before`` and ``after``.
      tokens_sampled: sampled tokens of the trajectories that were trained on.
      trajectories: number of episodes by ``status:reason``.
      rollbacks_in_a_row: number of consecutive updates that were rolled back.
      skips_in_a_row: number of consecutive updates without any optimizer step.
      empty_in_a_row: number of consecutive updates without any token to train on.
      unlogged: metrics of an update that is made but has no line yet, because its evaluation was cut short.
      incidents: the meter of faults and waste since the last line of metrics (`IncidentMeter.state`); None
        before RL.
      last_good: newest checkpoint that was followed by an update without a fault; None before.
      best_step: checkpoint with the best held-out success so far; None without evaluations on the way.
      best_success: that success.
      recompiles_after_warmup: programs compiled during the RL phase; None until it has ended.
    """

    phase: Literal["sft", "rl"] = "sft"
    sft_update: int = 0
    sft_data: str | None = None
    sft_eval_loss: float | None = None
    weights_before: str | None = None
    panels: dict[str, PanelResult] = dataclasses.field(default_factory=dict)
    tokens_sampled: int = 0
    trajectories: dict[str, int] = dataclasses.field(default_factory=dict)
    rollbacks_in_a_row: int = 0
    skips_in_a_row: int = 0
    empty_in_a_row: int = 0
    unlogged: dict[str, float] | None = None
    incidents: dict[str, dict[str, Any]] | None = None
    last_good: int | None = None
    best_step: int | None = None
    best_success: float = 0.0
    recompiles_after_warmup: int | None = None

    def count(self, trajectories: Sequence[Trajectory], outcomes: Mapping[str, int]) -> None:
        """Add a batch's tokens, and replace the number of episodes by outcome."""
        self.tokens_sampled += sum(trajectory.num_tokens for trajectory in trajectories)
        self.trajectories = dict(sorted(outcomes.items()))

    def note_success(self, update: int, success: float) -> bool:
        """Note the success of an evaluation, and return whether it is the best so far."""
        is_best = self.best_step is None or success > self.best_success
        if is_best:
            self.best_step, self.best_success = update, success
        return is_best

    def as_json(self) -> dict[str, Any]:
        """Convert the record to JSON types; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunRecord:
        """Rebuild a record from the result of `as_json`."""
        panels = {when: PanelResult(**panel) for when, panel in values["panels"].items()}
        return cls(**{**values, "panels": panels})

    def summary(self) -> dict[str, Any]:
        """Return the entries of ``summary.json`` that come from the record."""
        found: dict[str, Any] = {"sft_data": self.sft_data} if self.sft_data else {}
        if self.sft_eval_loss is not None:
            found["sft_eval_loss"] = self.sft_eval_loss
        if self.weights_before is not None:
            found["weights_before"] = self.weights_before
        for when, panel in self.panels.items():
            found |= {f"{name}_{when}": value for name, value in panel.metrics.items()}
            found |= {"eval_tasks": len(panel.wins), "updates": panel.update, f"eval_wins_{when}": panel.wins}
        found |= {"tokens_sampled": self.tokens_sampled, "trajectories": self.trajectories}
        if self.recompiles_after_warmup is not None:
            found["recompiles_after_warmup"] = self.recompiles_after_warmup
        return found


def has_results(run_dir: Path, updates: int | None) -> bool:
    """Return whether a run's summary is that of ``updates`` updates; a damaged one is of none."""
    try:
        return updates is not None and read_json_object(run_dir / SUMMARY).get("updates") == updates
    except (OSError, ValueError):
        return False
