"""Credit for recorded or hand-made episodes, by the same batch builder and algorithm as training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from empg_jax.algorithms.anchors import join_alike
from empg_jax.algorithms.recipe import compares_states, needs_of
from empg_jax.errors import ConfigError, writing
from empg_jax.learner.batching import BatchShape, make_batch, merge_turns
from empg_jax.rollout.record import Record, credit_fields, make_trajectory, read_episodes
from empg_jax.run.assembly import make_algorithm_from, make_recipe_from
from empg_jax.run.rollouts import format_record, write_records
from empg_jax.types import Scores

if TYPE_CHECKING:
    from empg_jax.config import Config
    from empg_jax.types import Trajectory


def print_credit(config: Config, path: Path, out: Path | None, *, say: Callable[[str], None]) -> None:
    """Recompute the credit of the episodes in a file; print the records, or write them to ``out``.

    Args:
      config: a configuration; its algorithm and ``env.context`` are used.
      path: a ``.jsonl`` or ``.jsonl.gz`` file of episode records.
      out: the file to write; None is stdout.
      say: receives messages for the user.

    Raises:
      ConfigError: ``path`` cannot be used, or ``out`` cannot be written.
    """
    records, notes = recompute_credit(config, path)
    for note in notes:
        say(note)
    if out is None:
        print("\n".join(format_record(record) for record in records))
        return
    with writing(f"--out {out}", ConfigError):
        write_records(out, records)


def recompute_credit(config: Config, path: Path) -> tuple[list[Record], list[str]]:
    """Recompute the credit of the episodes in a file, which together form one global batch.

    Args:
      config: a configuration; its algorithm and ``env.context`` are used. No model or environment is built.
      path: a ``.jsonl`` or ``.jsonl.gz`` file of episode records.

    Returns:
      ``(records, notes)``: the records in the order of the file, with group, member and credit set, and
      messages for the user about values that a record cannot hold.

    Raises:
      RecordError: the file cannot be read, or a field is missing or mistyped.
    """
    return make_recompute(config)(read_for(config, path))


def read_for(config: Config, path: Path) -> list[Record]:
    """Read the records of a file for a configuration, whose modulation needs their entropies.

    Raises:
      RecordError: the file cannot be read, or a field is missing or mistyped.
    """
    return read_episodes(path, needs_entropy=make_recipe_from(config).modulate is not None)


def make_recompute(config: Config) -> Callable[[list[Record]], tuple[list[Record], list[str]]]:
    """Build the function that recomputes the credit of checked records, as `recompute_credit` returns it.

    Batches of similar size share one compiled program.
    """
    algorithm = make_algorithm_from(config)
    has_critic = algorithm.value_loss is not None
    compiled = jax.jit(lambda batch, scores: algorithm.credit(batch, scores).turns)
    is_transcript = config.env.context == "transcript"

    def recompute(records: list[Record]) -> tuple[list[Record], list[str]]:
        trajectories = [make_trajectory(record, is_transcript=is_transcript) for record in records]
        alike = join_alike(trajectories, config.algorithm.anchor_similarity)
        batch, _ = make_batch(alike, _find_shape(config, trajectories), seed=(config.seed,))
        values = np.zeros(batch.tokens.shape, np.float32) if has_critic else None
        recorded = batch.behavior_logprobs, batch.behavior_entropies
        reference = batch.behavior_logprobs  # which nobody recorded
        credit = jax.device_get(compiled(batch, Scores(*recorded, reference, values)))
        for i, record in enumerate(records):
            turns = enumerate(record["turns"])
            record["turns"] = [turn | credit_fields(credit, i, k) for k, turn in turns]
        return records, _notes(config, records, has_critic=has_critic)

    return recompute


def _find_shape(config: Config, trajectories: list[Trajectory]) -> BatchShape:
    """Find a shape with room for the episodes: powers of two, so that few programs are compiled."""
    lengths = [len(segment.tokens) for t in trajectories for segment in merge_turns(t, 0)]
    return BatchShape(
        trajectories=len(trajectories),
        turns=max(config.env.max_turns, *(len(t.turns) for t in trajectories)),
        row_tokens=_power_of_two(max(lengths)),
        micro_rows=1,
        max_rows=_power_of_two(len(lengths)),
        num_minibatches=config.train.num_minibatches,
    )


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _notes(config: Config, records: list[Record], *, has_critic: bool) -> list[str]:
    notes = ["the critic's values are taken as 0: a record does not hold them"] if has_critic else []
    estimate = make_recipe_from(config).estimate
    needed, turns = needs_of(estimate), [turn for record in records for turn in record["turns"]]
    if "answer_logprobs" in needed and not all("answer_logprob" in turn for turn in turns):
        notes.append("turns without answer_logprob gain nothing: their known answers were not scored")
    if "success" in needed and not any("success" in record for record in records):
        notes.append("episodes without success count as failures: no state is near a goal")
    if compares_states(estimate) and not any(turn.get("anchor") or turn.get("observation") for turn in turns):
        notes.append("turns without observation or anchor: no two are known to share a state")
    # A response stands for its action.
    if "actions" in needed and not any("action" in turn or "response" in turn for turn in turns):
        notes.append("turns without action or response: no two moves are known to be the same action")
    if "milestones" in needed and not any("milestone" in turn for turn in turns):
        notes.append("turns without milestone: no turn reached one")
    if config.algorithm.reward_kl_coef > 0:  # a KL in the reward changes credit; a KL in the loss does not
        notes.append("the reference's log-probs are taken as the policy's: a record does not hold them")
    return notes
