"""One update from a batch: the choice of scores, and the optimizer steps of every epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from empg_jax.learner.batching import Layout, find_tokens
from empg_jax.learner.state import TrainState
from empg_jax.learner.update import Learner
from empg_jax.parallel.arrays import fetch
from empg_jax.types import Batch, Credit, Params, Scores

GAP_CHECK_EVERY = 25  # updates; the check costs one more forward pass over the batch


@dataclasses.dataclass(frozen=True)
class Pass:
    """One pass over a global batch: its layout in rows, its scores and its credit."""

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

    Every epoch deals the trajectories to other steps. The scores stay those of the policy before the
    update; only their places in the batch change.

    Args:
      learner: the compiled programs.
      state: donated to the first step.
      first: the pass of epoch 0.
      split: function from an epoch (1 or later) to a batch on the host and its layout.
      epochs: passes over the batch.
    """
    for epoch in range(epochs):
        each = first if epoch == 0 else _split_again(learner, first, *split(epoch))
        for start, stop in each.layout.bounds:
            bounds = np.int32(start), np.int32(stop)
            state, metrics = learner.update(state, each.batch, each.scores, each.credit, *bounds)
            yield state, metrics
        del each  # before the next one is made


def _split_again(learner: Learner, first: Pass, host: Batch, layout: Layout) -> Pass:
    """Make the pass over another layout of the same trajectories."""
    batch = learner.put(host)
    scores = learner.rearrange(first.scores, find_tokens(first.host, host))
    return Pass(host, layout, batch, scores, learner.credit(batch, scores))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The rule that decides when the learner scores a batch itself, with the measurements of that pass.

    Attributes:
      learner: the compiled programs.
      is_source: credit and loss use the learner's scores; else the engine's records, where they suffice.
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
        """Score a batch with the learner, where that is due, and measure the gap to the engine.

        A pass is due in three cases: the algorithm needs scores that no engine records (the learner's
        entropies, the reference's log-probs, the critic's values); the entropy drift is measured; or the
        engine is checked, every `GAP_CHECK_EVERY` updates.

        Args:
          params: the current weights.
          reference: the reference weights of the KL term; None where there are none.
          batch: on the mesh.
          layout: the batch's layout.
          update: number of updates made so far.
        """
        is_needed = self.is_source or self.learner.needs_score
        if not is_needed and update % GAP_CHECK_EVERY and not self.is_drift_due(update):
            return None, {}
        scores = self._run(params, reference, batch, layout)
        # Samples of older weights have a gap by right: it would say nothing about the engine.
        if not self.is_on_policy:
            return scores, {}
        mean, largest = (float(gap) for gap in self.learner.logprob_gap(batch, scores))
        return scores, {"logprob_gap": mean, "logprob_gap_max": largest}

    def read_logprobs(
        self, params: Params, reference: Params | None, host: Batch, layout: Layout
    ) -> np.ndarray:
        """Return the log-probs of a host batch's tokens, float32[B T] on the host."""
        return np.asarray(fetch(self._run(params, reference, self.learner.put(host), layout).old_logprobs))

    def choose(self, batch: Batch, own: Scores | None) -> Scores:
        """Choose the scores for credit and loss: the learner's, or the engine's records."""
        if own is not None and self.is_source:
            return own
        recorded = self.learner.recorded_scores(batch)
        # Only the learner has the reference's log-probs and the critic's values; the rest is the engine's.
        if own is None or not self.learner.needs_score:
            return recorded
        return dataclasses.replace(own, old_logprobs=recorded.old_logprobs, entropies=recorded.entropies)

    def is_drift_due(self, update: int) -> bool:
        """Return whether the entropy is measured before and after this update."""
        return self.drift_every > 0 and update % self.drift_every == 0

    def measure_drift(
        self, params: Params, reference: Params | None, first: Pass, before: Scores | None, update: int
    ) -> dict[str, float]:
        """Measure the update's change of the sampled tokens' mean entropy, where that is due."""
        if before is None or not self.is_drift_due(update):
            return {}
        after = self._run(params, reference, first.batch, first.layout)
        return {"entropy_drift_measured": float(self.learner.entropy_drift(first.batch, before, after))}

    def _run(self, params: Params, reference: Params | None, batch: Batch, layout: Layout) -> Scores:
        stop = np.int32(layout.bounds[-1][1])
        return self.learner.score(params, params if reference is None else reference, batch, stop)
