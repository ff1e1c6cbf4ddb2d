"""The model that a client trains: gradients of its batches, its optimizer steps, its weights.

Gradients come from the learner's own ``update`` program, with an optimizer that only adds them up. So several
batches make one step, and a batch's gradient is the one that training would take. Each step then brings its
own settings of Adam. All methods run on one thread.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from empg_jax.learner.state import TrainState, apply_updates, state_shardings, widen
from empg_jax.learner.update import Learner, make_learner
from empg_jax.parallel.mesh import replicated, token_sharding
from empg_jax.parallel.order import jit_on_mesh
from empg_jax.serve.policy import Start
from empg_jax.serve.tinker.codec import BatchResult, Datum
from empg_jax.serve.tinker.objectives import Objective, find_objective
from empg_jax.serve.tinker.rows import Limits, Rows, has_entropies, make_rows
from empg_jax.serve.wire import refuse
from empg_jax.types import Credit, Params, Scores

MOST_PROGRAMS = 16  # that are kept: one for each loss, its settings and rows of a micro-batch
Moments = Any  # an `optax.ScaleByAdamState`


@dataclasses.dataclass(frozen=True)
class AdamParams:
    """Settings of one optimizer step; a ``grad_clip_norm`` of 0 does not clip."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class Trainer:
    """One model in training.

    Args:
      start: the model and the weights that it starts from.
      limits: what batches must keep to.

    Attributes:
      version: how often the weights have changed, by a step or by loading.
    """

    def __init__(self, start: Start, limits: Limits) -> None:
        self.start, self.limits, self.version = start, limits, 0
        self._summing = sum_gradients()
        self._shardings = state_shardings(start.mesh, start.model, self._summing)
        self._programs: collections.OrderedDict[Any, tuple[Learner, Any]] = collections.OrderedDict()
        whole, params = replicated(start.mesh), self._shardings.params
        moments = optax.ScaleByAdamState(count=whole, mu=params, nu=params)
        self._step = jit_on_mesh(
            start.mesh, _step, donate_argnums=(0, 1), out_shardings=(self._shardings, moments, whole)
        )
        self._fresh = jax.jit(_fresh_moments, out_shardings=moments)
        self._zero = jax.jit(self._summing.init, out_shardings=self._shardings.opt_state)
        self._state: TrainState
        self._moments: Moments
        self._batches, self._groups = 0, frozenset[int]()  # since the last step
        self.reset()

    def reset(self) -> None:
        """Begin again from the first weights, with a fresh optimizer."""
        self.load(self.start.params, None)

    # ------------------------------------------------------------------------------------- batches

    def run_batch(self, data: Sequence[Datum], objective: Objective, *, forward_only: bool) -> BatchResult:
        """Compute loss and log-probabilities of a batch, and add its gradient to the sum.

        Raises:
          ApiError: an example is malformed, or the loss is not finite; the sum is as before.
        """
        rows = make_rows(data, objective, self.limits)
        if not forward_only and (again := rows.groups & self._groups):
            raise refuse(
                f"group {min(again)} was in an earlier request of this step: credit compares the "
                "attempts of a group, so all of them belong in one request"
            )
        learner, total = self._compiled(objective, rows.micro_rows)
        stop = rows.layout.bounds[0][1]
        batch = learner.put(rows.batch)
        own = learner.score(self._state.params, self._reference(objective), batch, np.int32(stop))
        scores = _choose_scores(own, batch, objective, has_entropies(data))
        credit = learner.credit(batch, scores) if objective.has_credit else self._given(rows, data, objective)
        metrics = {"loss:sum": total(batch, scores, credit, own)}
        if not forward_only:
            bounds = np.int32(0), np.int32(stop)
            self._state, of_update = learner.update(self._state, batch, scores, credit, *bounds)
            if float(of_update["nonfinite"]):
                raise refuse("the loss or its gradient is not finite; this request's gradient was dropped")
            self._batches += 1
            self._groups |= rows.groups
            metrics["grad_norm:mean"] = of_update["grad_norm"]
        metrics |= self._describe(data, objective, batch, own, credit)
        outputs = jax.device_get((own.old_logprobs, own.entropies, credit.advantages))
        found = [rows.gather(np.asarray(grid)) for grid in outputs]
        names = ("logprobs", "entropies", "advantages")[: 3 if objective.has_credit else 2]
        return BatchResult(
            [dict(zip(names, values, strict=False)) for values in zip(*found, strict=True)],
            {name: float(value) for name, value in jax.device_get(metrics).items()},
        )

    def score(self, params: Params, tokens: np.ndarray) -> np.ndarray:
        """Compute the log-probability of every token but the first, under given weights.

        Args:
          params: trained parameters, on the host.
          tokens: int32[T], at least two.
        """
        objective = find_objective("cross_entropy", {})
        rows = make_rows([Datum(tokens[:-1], {"target_tokens": tokens[1:]})], objective, self.limits)
        learner, _ = self._compiled(objective, rows.micro_rows)
        stop = np.int32(rows.layout.bounds[0][1])
        placed = jax.device_put(params, self._shardings.params)
        scores = learner.score(placed, placed, learner.put(rows.batch), stop)
        return rows.gather(np.asarray(scores.old_logprobs))[0]

    def _describe(
        self, data: Sequence[Datum], objective: Objective, batch: Any, own: Scores, credit: Credit
    ) -> dict[str, Any]:
        """Measure a batch; the names say how the metrics of several requests are joined."""
        metrics: dict[str, Any] = {
            "datums:sum": len(data),
            "entropy:mean": _mean(batch.loss_mask, own.entropies),
        }
        if objective.weights == "weights":
            return metrics
        # The tokens that the client trains: it sends zeros for the others.
        trained = jnp.logical_and(batch.loss_mask, credit.advantages != 0)
        gap = jnp.where(trained, jnp.abs(own.old_logprobs - batch.behavior_logprobs), jnp.float32(0.0))
        metrics |= {"logprob_gap:max": jnp.max(gap), "logprob_gap:mean": _mean(trained, gap)}
        return metrics | {f"{name}:mean": value for name, value in credit.metrics.items()}

    def _given(self, rows: Rows, data: Sequence[Datum], objective: Objective) -> Credit:
        """Make credit of the weights or advantages that the client sent; the loss is their plain sum."""
        ones = [np.ones(len(datum.tokens), np.float32) for datum in data]
        sent = [datum.inputs.get(objective.weights, one) for datum, one in zip(data, ones, strict=True)]
        sharding = token_sharding(self.start.mesh)
        grids = jax.device_put((rows.spread(sent), rows.spread(ones)), sharding)
        return Credit(advantages=grids[0], loss_weights=grids[1], metrics={})

    def _compiled(self, objective: Objective, micro_rows: int) -> tuple[Learner, Any]:
        """Return the programs of a loss: the learner's, and the loss of a scored batch."""
        key = (objective.key, micro_rows)
        if key not in self._programs:
            learner = make_learner(
                self.start.model,
                objective.algorithm,
                self._summing,
                self.start.mesh,
                micro_rows=micro_rows,
                has_reference=objective.needs_reference,
                base=self.start.base,
            )
            total = functools.partial(_total_loss, objective.algorithm.loss)
            self._programs[key] = learner, jit_on_mesh(self.start.mesh, total)
        self._programs.move_to_end(key)
        if len(self._programs) > MOST_PROGRAMS:
            self._programs.popitem(last=False)
        return self._programs[key]

    def _reference(self, objective: Objective) -> Params:
        """Return the weights of the KL term: the first ones."""
        if not objective.needs_reference:
            return self._state.params
        return jax.device_put(self.start.params, self._shardings.params)

    # --------------------------------------------------------------------------------------- steps

    def step(self, settings: AdamParams) -> dict[str, float]:
        """Make one step of AdamW from the gradients so far.

        Returns:
          Metrics.

        Raises:
          ApiError: there is no gradient.
        """
        if not self._batches:
            raise refuse("optim_step without a forward_backward before it: there is no gradient")
        numbers = jax.tree.map(np.float32, dataclasses.asdict(settings))
        self._state, self._moments, metrics = self._step(self._state, self._moments, numbers)
        self._batches, self._groups = 0, frozenset[int]()
        self.version += 1
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def drop_gradients(self) -> None:
        """Forget the gradients since the last step."""
        if self._batches:
            self._state = dataclasses.replace(self._state, opt_state=self._zero(self._state.params))
        self._batches, self._groups = 0, frozenset[int]()

    # ------------------------------------------------------------------------------------- weights

    def read(self) -> Params:
        """Copy the trained parameters to the host."""
        return jax.device_get(self._state.params)

    def read_moments(self) -> Moments:
        """Copy the optimizer's state to the host."""
        return jax.device_get(self._moments)

    def load(self, params: Params, moments: Moments | None) -> None:
        """Go on from other weights.

        Args:
          params: trained parameters on the host.
          moments: the optimizer's state; None is a fresh one.
        """
        placed = jax.device_put(params, self._shardings.params)
        zero = jax.device_put(np.int32(0), replicated(self.start.mesh))
        self._state = TrainState(params=placed, opt_state=self._zero(placed), step=zero)
        self._moments = self._fresh(placed)
        if moments is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self._moments)
            self._moments = jax.device_put(moments, shardings)
        self._batches, self._groups = 0, frozenset[int]()
        self.version += 1


def sum_gradients() -> optax.GradientTransformation:
    """Make an optimizer that changes nothing: its state is the sum of the gradients."""

    def init(params: Params) -> Params:
        return jax.tree.map(jnp.zeros_like, widen(params))

    def update(gradients: Params, state: Params, params: Params | None = None) -> tuple[Params, Params]:
        del params
        return jax.tree.map(jnp.zeros_like, state), jax.tree.map(jnp.add, state, widen(gradients))

    return optax.GradientTransformation(init, update)


def _fresh_moments(params: Params) -> Moments:
    zeros = jax.tree.map(jnp.zeros_like, widen(params))
    return optax.ScaleByAdamState(count=jnp.int32(0), mu=zeros, nu=jax.tree.map(jnp.copy, zeros))


def _step(
    state: TrainState, moments: Moments, settings: dict[str, jax.Array]
) -> tuple[TrainState, Moments, dict[str, jax.Array]]:
    """Step with torch's AdamW: clipping by the global norm, decay of every trained parameter."""
    s = settings
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        norm = optax.tree.norm(state.opt_state)
        clip = jnp.where(s["grad_clip_norm"] > 0, jnp.minimum(1.0, s["grad_clip_norm"] / (norm + 1e-6)), 1.0)
        gradients = jax.tree.map(lambda leaf: leaf * clip, state.opt_state)
        adam = optax.scale_by_adam(b1=s["beta1"], b2=s["beta2"], eps=s["eps"])
        directions, moments = adam.update(gradients, moments)
        changes = jax.tree.map(
            lambda leaf, way: -s["learning_rate"] * (way + s["weight_decay"] * leaf),
            widen(state.params),
            directions,
        )
        metrics = {"grad_norm": norm, "update_norm": optax.tree.norm(changes)}
    params = apply_updates(state.params, changes, state.step)
    zeros = jax.tree.map(jnp.zeros_like, state.opt_state)
    stepped = TrainState(params=params, opt_state=zeros, step=state.step + 1)
    return stepped, moments, metrics


def _choose_scores(own: Scores, batch: Any, objective: Objective, are_entropies_sent: bool) -> Scores:
    """Take the old log-probabilities that the client sent; entropies are the learner's if it sent none."""
    if objective.weights == "weights":
        return own
    entropies = batch.behavior_entropies if are_entropies_sent else own.entropies
    return dataclasses.replace(own, old_logprobs=batch.behavior_logprobs, entropies=entropies)


def _total_loss(loss: Any, batch: Any, scores: Scores, credit: Credit, own: Scores) -> jax.Array:
    """Compute a batch's loss under the weights that ``own`` was scored with."""
    values, _ = loss(own.old_logprobs, own.entropies, batch, scores, credit.advantages)
    return jnp.sum(jnp.where(credit.loss_weights != 0, values * credit.loss_weights, jnp.float32(0.0)))


def _mean(mask: jax.Array, values: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(mask, values, jnp.float32(0.0)))
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), jnp.float32(1.0))
