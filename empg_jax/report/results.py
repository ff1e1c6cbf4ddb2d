"""The results of a run: metrics of an update, summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from empg_jax.engine.engine import EngineStats
from empg_jax.errors import writing
from empg_jax.files import as_json, write_json_atomic
from empg_jax.learner.batching import BatchShape, Layout
from empg_jax.metrics import group_success, reduce_metrics
from empg_jax.report.record import SUMMARY, RunRecord
from empg_jax.report.summary import paired_interval, print_summary
from empg_jax.types import Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config


def describe_update(
    trajectories: Sequence[Trajectory],
    layout: Layout,
    shape: BatchShape,
    *,
    version: int,
    engine: EngineStats,
    credit: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    seconds: float,
) -> dict[str, float]:
    """Compute the metrics of one update, by the names of `metrics.METRICS`.

    Args:
      trajectories: the batch's episodes.
      layout: the batch's layout in rows.
      shape: the batch's static sizes.
      version: the policy version that was trained.
      engine: the engine's counts during the update.
      credit: metrics of the credit assignment.
      steps: metrics of each optimizer step, with the numbers of tokens that were trained and sampled.
      seconds: wall time of the whole cycle: rollout, credit and optimizer steps.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    # Numbers of a step, not of its tokens; a step without tokens has none.
    of_steps = [
        ({name: step[name] for name in ("loss", "grad_norm")}, 1.0 - float(step["empty"])) for step in steps
    ]
    values = reduce_metrics((dict(step), float(step["tokens"])) for step in steps) | reduce_metrics(of_steps)
    values |= reduce_metrics(({"entropy": step["entropy"]}, float(step["sampled"])) for step in steps)
    for count in ("tokens", "sampled"):
        values.pop(count, None)
    # These are counts of steps left out, so the weighted mean above would be meaningless for them.
    left_out = 0.0
    for guard in ("nonfinite", "kl_exceeded", "empty"):
        values.pop(guard, None)
        values[f"{guard}_steps"] = float(sum(float(step[guard]) for step in steps))
        left_out += values[f"{guard}_steps"]
    values |= {name: float(value) for name, value in credit.items()}
    num_tokens = sum(len(turn.response_tokens) for turn in turns)
    ages = np.array([version - turn.version for turn in turns])
    values |= {
        "success_rate": float(np.mean([t.is_success for t in trajectories])),
        "episode_return": float(np.mean([t.episode_return for t in trajectories])),
        "episode_turns": float(np.mean([len(t.turns) for t in trajectories])),
        "response_tokens": float(np.mean([len(turn.response_tokens) for turn in turns])),
        "segments_per_episode": layout.num_segments / len(trajectories),
        "invalid_actions": float(np.mean([not turn.is_valid for turn in turns])),
        "episodes_trained": float(len(trajectories)),
        "lag": float(ages.mean()),
        "lag_max": float(ages.max()),
        "tokens_sampled": float(engine.sampled_tokens),
        "optimizer_steps": len(steps) - left_out,
        "tokens_trained": float(round(num_tokens * values["loss_coverage"])),
        "tokens_prefilled": float(engine.prefilled_tokens),
        "tokens_shared": float(engine.shared_tokens),
        "prefix_hits": engine.hit_rate,
        "tokens_evicted": float(engine.evicted_tokens),
        "tokens_per_second": engine.sampled_tokens / seconds,
        "train_tokens_shared": float(layout.num_shared),
        "packing_efficiency": layout.num_tokens / (layout.num_rows * shape.row_tokens),
        "seconds_cycle": seconds,
    }
    if engine.page_use:
        values["page_use"] = engine.page_use
    if engine.decode_rows:  # what the slots of a server do is not known
        values["slot_occupancy"] = engine.occupancy
    values |= group_success("success", trajectories)
    values |= {f"lag_share_{age}": float(np.mean(ages == age)) for age in np.unique(ages)}
    for name in sorted({name for t in trajectories for name in t.metrics}):
        values[f"env_{name}"] = float(np.mean([t.metrics[name] for t in trajectories if name in t.metrics]))
    return values


def write_results(
    run_dir: Path,
    record: RunRecord,
    seconds: Mapping[str, float],
    config: Config,
) -> None:
    """Write ``summary.json`` and print the table.

    Raises:
      RunError: the file cannot be written.
    """
    summary = record.summary()
    rounded = {name: round(value, 3) for name, value in seconds.items()}
    summary["wall_seconds"] = {"total": round(sum(seconds.values()), 3), **rounded}
    summary |= {"seed": config.seed, "algorithm": config.algorithm.name or config.algorithm.entry_point}
    summary["modulation"] = config.algorithm.modulation
    wins = [summary.get(f"eval_wins_{when}", "") for when in ("before", "after")]
    # A warm start alone is evaluated only once, so its results have no pair.
    if len(wins[0]) == len(wins[1]) >= 1:
        interval = paired_interval(*wins)
        summary["eval_gain_interval"] = None if interval is None else [round(bound, 4) for bound in interval]
    summary = as_json(summary)  # a policy that is broken has numbers such as NaN; the table leaves them out
    with writing(run_dir / SUMMARY):
        write_json_atomic(run_dir / SUMMARY, summary)
    print_summary(summary)
