"""One update from a batch: which scores count, and the optimizer steps of every epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from empg_jax.learner.batching import Layout, find_tokens
from empg_jax.learner.state import TrainState
from empg_jax.learner.update import Learner
from empg_jax.types import Batch, Credit, Params, Scores

GAP_CHECK_EVERY = 25


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over a global batch: how its rows are split, and what they are worth."""

    host: Batch
    layout: Layout
    batch: Batch  # the same on the mesh
    scores: Scores
    credit: Credit


def optimize(
    learner: Learner,
    state: TrainState,
    first: Pass,
    split: Callable[[int], tuple[Batch, Layout]],
    epochs: int,
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Make the optimizer steps of an update; yield the state and the metrics after each.

    Every epoch deals the trajectories to other steps. Scores stay those of the policy before the update; only
    their place in the batch changes.

    Args:
      learner: the compiled programs.
      state: donated to the first step.
      first: the pass of epoch 0.
      split: the batch and its layout, on the host, for an epoch from 1 on.
      epochs: passes over the batch.
    """
    for epoch in range(epochs):
        each = first if epoch == 0 else _split_again(learner, first, *split(epoch))
        for start, stop in each.layout.bounds:
            bounds = np.int32(start), np.int32(stop)
            state, metrics = learner.update(state, each.batch, each.scores, each.credit, *bounds)
            yield state, metrics


def _split_again(learner: Learner, first: Pass, host: Batch, layout: Layout) -> Pass:
    """The pass over another layout of the same trajectories."""
    batch = learner.put(host)
    scores = learner.rearrange(first.scores, find_tokens(first.host, host))
    return Pass(host, layout, batch, scores, learner.credit(batch, scores))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Decides when the learner scores a batch itself, and what is measured by it.

    Attributes:
      learner: the compiled programs.
      is_source: credit and loss use the learner's scores; else what the engine recorded, where that suffices.
      drift_every: updates between two measurements of the entropy's drift; 0 is never.
      is_on_policy: batches hold samples of the current version only, so that the engine can be checked.
    """

    learner: Learner
    is_source: bool
    drift_every: int
    is_on_policy: bool

    def score(
        self, params: Params, reference: Params | None, batch: Batch, layout: Layout, update: int
    ) -> tuple[Scores | None, dict[str, float]]:
        """Make the learner's own pass over a batch, where one is due, and measure its gap to the engine.

        It is due where the algorithm needs what no engine records (entropies by the learner, the reference's
        log-probs, the critic's values), where a drift is measured, and now and then to check the engine.

        Args:
          params: the current weights.
          reference: those of the KL term; None where there are none.
          batch: on the mesh.
          layout: its rows.
          update: number of updates made.
        """
        is_needed = self.is_source or self.learner.needs_score
        if not is_needed and update % GAP_CHECK_EVERY and not self.is_drift_due(update):
            return None, {}
        scores = self._run(params, reference, batch, layout)
        if not self.is_on_policy:
            return scores, {}
        mean, largest = (float(gap) for gap in self.learner.logprob_gap(batch, scores))
        return scores, {"logprob_gap": mean, "logprob_gap_max": largest}

    def choose(self, batch: Batch, own: Scores | None) -> Scores:
        """Say what credit and loss work with: the learner's scores, or what the engine recorded."""
        if own is not None and self.is_source:
            return own
        recorded = self.learner.recorded_scores(batch)
        if own is None or not self.learner.needs_score:
            return recorded
        return dataclasses.replace(own, old_logprobs=recorded.old_logprobs, entropies=recorded.entropies)

    def is_drift_due(self, update: int) -> bool:
        """Whether the entropy is measured before and after this update."""
        return self.drift_every > 0 and update % self.drift_every == 0

    def measure_drift(
        self, params: Params, reference: Params | None, first: Pass, before: Scores | None, update: int
    ) -> dict[str, float]:
        """Measure how the update changed the mean entropy of the sampled tokens, where that is due."""
        if before is None or not self.is_drift_due(update):
            return {}
        after = self._run(params, reference, first.batch, first.layout)
        return {"entropy_drift_measured": float(self.learner.entropy_drift(first.batch, before, after))}

    def _run(self, params: Params, reference: Params | None, batch: Batch, layout: Layout) -> Scores:
        stop = np.int32(layout.bounds[-1][1])
        return self.learner.score(params, params if reference is None else reference, batch, stop)
