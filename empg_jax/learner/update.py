"""The learner's three compiled and sharded programs: ``score``, ``credit`` and ``update``.

Rows are arranged as ``[R, M, T]`` (`learner.batching`): the axis that is split over devices is a micro-batch.
Loops run over ``M`` with bounds that are data, so one compilation serves every number of rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from empg_jax.learner.outputs import compute_outputs
from empg_jax.learner.state import TrainState, apply_updates, state_shardings, widen
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.models.lora import combine
from empg_jax.parallel.ahead import Call, warm_up
from empg_jax.parallel.arrays import fetch, put
from empg_jax.parallel.layout import constrain
from empg_jax.parallel.mesh import replicated, row_sharding, token_sharding
from empg_jax.parallel.order import jit_on_mesh
from empg_jax.types import BATCH_FIELDS, Batch, Credit, Params, Scores, fields_per, wide_type


@dataclasses.dataclass(frozen=True)
class Learner:
    """The compiled programs of one model, algorithm, optimizer and mesh.

    ``score(params, ref_params, batch, stop) -> Scores``; ``credit(batch, scores) -> Credit``;
    ``update(state, batch, scores, credit, start, stop) -> (state, metrics)`` makes one optimizer step from
    micro-batches ``[start, stop)``; ``recorded_scores(batch)`` takes the engine's records instead of scoring;
    ``logprob_gap(batch, scores) -> (mean, max)`` measures the difference between the two;
    ``entropy_drift(batch, before, after)`` is the change of the mean entropy between two scorings.
    ``rearrange(scores, places)`` carries scores to another layout of the same trajectories (`find_tokens`).
    ``put(batch)`` moves a host batch onto the mesh.

    Where only adapters are trained, "parameters" means the adapters, and ``base`` holds the frozen weights
    below them, which are never donated. The empty reference ``{}`` then means the base itself.
    """

    model: DecoderConfig
    mesh: Mesh
    base: Params | None
    shardings: TrainState
    put: Callable[[Batch], Batch]
    score: Callable[..., Scores]
    recorded_scores: Callable[[Batch], Scores]
    credit: Callable[[Batch, Scores], Credit]
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    logprob_gap: Callable[[Batch, Scores], tuple[jax.Array, jax.Array]]
    entropy_drift: Callable[[Batch, Scores, Scores], jax.Array]
    rearrange: Callable[[Scores, np.ndarray], Scores]
    needs_score: bool  # the engine's records do not suffice: a reference or a critic must be scored

    num_programs: ClassVar[int] = 7  # that `warm_up` compiles, and how often it calls ``check``

    def warm_up(
        self,
        state: TrainState,
        batch: Batch,
        reference: Params | None = None,
        *,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Compile every program for the shape of this batch. The state is donated, so it is lost.

        Args:
          state: a state on the mesh.
          batch: a batch on the mesh; only its shape matters.
          reference: a reference policy of the later shape; default the state's parameters.
          check: called for each of the ``num_programs`` programs; it may raise to end the warm-up.
        """
        reference = state.params if reference is None else reference
        warm_up(functools.partial(self._call_all, state, batch, reference), check)

    def _call_all(self, state: TrainState, batch: Batch, reference: Params, call: Call) -> None:
        """Call every program once."""
        none = np.int32(0)
        scores = call(self.score, state.params, reference, batch, none)
        call(self.logprob_gap, batch, scores)
        call(self.entropy_drift, batch, scores, scores)
        recorded = call(self.recorded_scores, batch)
        scores = scores if self.needs_score else recorded
        call(self.rearrange, scores, np.zeros(batch.tokens.shape, np.int32))
        credit = call(self.credit, batch, scores)
        if not batch.tokens.is_fully_addressable:  # over several hosts: the copies of what is written down
            call(fetch, (scores, credit))
        jax.block_until_ready(call(self.update, state, batch, scores, credit, none, none))


def make_learner(
    model: DecoderConfig,
    algorithm: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    micro_rows: int,
    temperature: float = 1.0,
    token_filter: TokenFilter = NO_FILTER,
    has_reference: bool = False,
    max_kl: float = math.inf,
    base: Params | None = None,
    shares_prefix: bool = False,
) -> Learner:
    """Build the programs for a mesh; each compiles at its first call.

    Args:
      model: decoder config.
      algorithm: `algorithms.Algorithm`: credit, loss, and value_loss where there is a critic.
      optimizer: optax transformation.
      mesh: device mesh; rows go over ``data`` x ``fsdp``, time over ``sequence``.
      micro_rows: R, rows of a micro-batch over all devices.
      temperature: rollout temperature.
      token_filter: the rollouts' filter, which restricts every log-prob: new, old and the reference's.
      has_reference: whether ``score`` also scores the frozen reference (KL term).
      max_kl: an optimizer step is skipped when the KL of its policy from the old one exceeds this bound.
      base: the frozen parameters, on the mesh, where the model has adapters.
      shares_prefix: whether rows hold beginnings that several segments share (`BatchShape.shares_prefix`).

    Returns:
      The programs. Shapes other than the first batch's would compile again.

    Raises:
      ValueError: the mesh does not divide ``micro_rows``, the model lacks the critic's value head, or it has
        adapters and no base; or shared beginnings would be split over time.
    """
    if (model.lora is None) != (base is None):
        raise ValueError("a model with adapters (lora) needs its base; without adapters there is no base")
    has_critic = algorithm.value_loss is not None
    if has_critic and not model.value_head:
        raise ValueError("this algorithm has a critic: the model needs value_head=True")
    _check_division(mesh, micro_rows, shares_prefix)
    shardings = state_shardings(mesh, model, optimizer)
    tokens, whole = token_sharding(mesh), replicated(mesh)
    batch_shardings = _batch_shardings(tokens, row_sharding(mesh), whole)
    one: Any = whole  # one sharding stands for all leaves of a dict or a table
    credit_shardings = Credit(tokens, tokens, metrics=one, turns=one, value_targets=tokens, clip_scale=tokens)
    spec = _Spec(
        model=model,
        algorithm=algorithm,
        optimizer=optimizer,
        micro_rows=micro_rows,
        temperature=temperature,
        token_filter=token_filter,
        has_reference=has_reference,
        max_kl=max_kl,
        shares_prefix=shares_prefix,
    )
    jit = functools.partial(jit_on_mesh, mesh)

    def above(program: Callable[..., Any]) -> Callable[..., Any]:
        """Bind the base to a program, where there is one."""
        return program if base is None else functools.partial(program, base=base)

    return Learner(
        model=model,
        mesh=mesh,
        base=base,
        shardings=shardings,
        put=lambda batch: put(batch, batch_shardings),
        score=above(jit(spec.score, out_shardings=tokens)),
        recorded_scores=jit(_recorded, out_shardings=tokens),
        credit=jit(algorithm.credit, out_shardings=credit_shardings),
        update=above(jit(spec.update, donate_argnums=0, out_shardings=(shardings, whole))),
        logprob_gap=jit(_logprob_gap, out_shardings=whole),
        entropy_drift=jit(_entropy_drift, out_shardings=whole),
        rearrange=jit(_rearrange, out_shardings=tokens),
        needs_score=has_reference or has_critic,
    )


def _check_division(mesh: Mesh, micro_rows: int, shares_prefix: bool) -> None:
    """Refuse rows that the mesh cannot divide."""
    if shares_prefix and mesh.shape["sequence"] > 1:
        raise ValueError(
            f"sequence={mesh.shape['sequence']}: rows with shared beginnings cannot be split over time; use "
            "a mesh with sequence=1 (or train.share_prefix=false)"
        )
    row_devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if micro_rows % row_devices:
        raise ValueError(
            f"a micro-batch of {micro_rows} rows cannot be divided over data x fsdp = {row_devices} devices; "
            f"use a multiple (train.micro_tokens // rollout.max_tokens rows)"
        )


def _batch_shardings(tokens: NamedSharding, rows: NamedSharding, whole: NamedSharding) -> Batch:
    shardings = {"token": tokens, "row": rows}
    return Batch(**{name: shardings.get(axis, whole) for name, axis in BATCH_FIELDS.items()})


def _recorded(batch: Batch) -> Scores:
    return Scores(batch.behavior_logprobs, batch.behavior_entropies)


def _sampled_mean(batch: Batch, values: jax.Array) -> jax.Array:
    total = jnp.sum(jnp.where(batch.loss_mask, values, jnp.float32(0.0)))
    return total / jnp.maximum(jnp.sum(batch.loss_mask, dtype=jnp.float32), 1.0)


def _logprob_gap(batch: Batch, scores: Scores) -> tuple[jax.Array, jax.Array]:
    """Return mean and largest absolute difference of recorded and recomputed log-probs, sampled tokens."""
    gap = jnp.abs(scores.old_logprobs - batch.behavior_logprobs)
    return _sampled_mean(batch, gap), jnp.max(jnp.where(batch.loss_mask, gap, jnp.float32(0.0)))


def _entropy_drift(batch: Batch, before: Scores, after: Scores) -> jax.Array:
    """Return the change of the sampled tokens' mean entropy: after minus before."""
    return _sampled_mean(batch, after.entropies - before.entropies)


def _rearrange(scores: Scores, places: jax.Array) -> Scores:
    """Move scores to the new places of their tokens (`find_tokens`); put zeros at padding."""

    def move(stream: jax.Array) -> jax.Array:
        return jnp.where(places >= 0, stream.reshape(-1)[jnp.maximum(places, 0)], jnp.float32(0.0))

    return jax.tree.map(move, scores)


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The static settings of the programs over rows.

    Attributes:
      model: decoder config.
      algorithm: `algorithms.Algorithm`.
      optimizer: optax transformation.
      micro_rows: R, rows of a micro-batch over all devices.
      temperature: rollout temperature.
      token_filter: the rollouts' filter.
      has_reference: whether the frozen reference is scored too.
      max_kl: bound on the KL from the old policy.
      shares_prefix: whether rows hold shared beginnings.
    """

    model: DecoderConfig
    algorithm: Any
    optimizer: optax.GradientTransformation
    micro_rows: int
    temperature: float
    token_filter: TokenFilter
    has_reference: bool
    max_kl: float
    shares_prefix: bool

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.algorithm.value_loss is not None

    def outputs(
        self, params: Params, rows: Batch, *, has_critic: bool
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Compute log-probs, entropies and, with a critic, values of the sampled tokens of some rows."""
        return compute_outputs(
            params,
            self.model,
            rows.tokens,
            rows.positions,
            rows.segment_ids,
            self.temperature,
            # Without trunks the platform's fused kernels can be used.
            trunk_ids=rows.trunk_ids if self.shares_prefix else None,
            token_filter=self.token_filter,
            loss_mask=rows.loss_mask,
            has_critic=has_critic,
            detach_critic=self.algorithm.detach_critic,
        )

    def micro(self, array: jax.Array, index: jax.Array) -> jax.Array:
        """Take micro-batch ``index`` ``[R, ...]`` of a per-row array ``[R * M, ...]``, still sharded."""
        grouped = array.reshape(self.micro_rows, array.shape[0] // self.micro_rows, *array.shape[1:])
        piece = jax.lax.dynamic_index_in_dim(grouped, index, axis=1, keepdims=False)
        return constrain(piece, *("rows", "time")[: piece.ndim])

    def micro_batch(self, batch: Batch, index: jax.Array) -> Batch:
        """Take micro-batch ``index`` of a batch: its own rows, and the whole table of trajectories."""
        names = (*fields_per("token"), *fields_per("row"))
        return dataclasses.replace(batch, **{n: self.micro(getattr(batch, n), index) for n in names})

    def score(
        self,
        params: Params,
        ref_params: Params,
        batch: Batch,
        stop: jax.Array,
        *,
        base: Params | None = None,
    ) -> Scores:
        """Score micro-batches ``[0, stop)`` under the current weights; scores elsewhere are zero."""
        params, ref_params = combine(base or {}, params), combine(base or {}, ref_params)
        size, length = batch.tokens.shape
        probe = self.micro(batch.tokens, jnp.int32(0))

        def score_rows(index: jax.Array) -> dict[str, jax.Array]:
            rows = self.micro_batch(batch, index)
            logprobs, entropies, values = self.outputs(params, rows, has_critic=self.has_critic)
            found = {"old_logprobs": logprobs, "entropies": entropies}
            if values is not None:
                found["values"] = values
            if self.has_reference:
                found["ref_logprobs"] = self.outputs(ref_params, rows, has_critic=False)[0]
            return found

        def body(index: jax.Array, grids: dict[str, jax.Array]) -> dict[str, jax.Array]:
            put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=1)
            return jax.tree.map(put, grids, score_rows(index))

        # A loop with a traced bound: empty micro-batches at the end are not computed.
        grid = jnp.zeros((probe.shape[0], size // probe.shape[0], length), jnp.float32)
        names = jax.eval_shape(score_rows, jnp.int32(0))
        grids = jax.lax.fori_loop(0, stop, body, dict.fromkeys(names, grid))
        flat = {name: grid.reshape(size, length) for name, grid in grids.items()}
        return Scores(**flat)

    def update(
        self,
        state: TrainState,
        batch: Batch,
        scores: Scores,
        credit: Credit,
        start: jax.Array,
        stop: jax.Array,
        *,
        base: Params | None = None,
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Make one optimizer step.

        Micro-batches only sum ``loss * loss_weights``, so every split into micro-batches gives the same step.
        If the loss or the gradient norm is not finite, nothing changes and ``nonfinite`` is 1. If the loss's
        ``approx_kl`` is beyond ``max_kl``, nothing changes and ``kl_exceeded`` is 1. Where no
        token has a share in the loss, nothing changes either, and ``empty`` is 1.
        """
        scores = dataclasses.replace(scores, clip_scale=credit.clip_scale)

        def loss_of(params: Params, index: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            rows = self.micro_batch(batch, index)
            rows_scores = jax.tree.map(lambda leaf: self.micro(leaf, index), scores)
            advantages, weights = self.micro(credit.advantages, index), self.micro(credit.loss_weights, index)
            policy = combine(base or {}, params)
            logprobs, entropies, values = self.outputs(policy, rows, has_critic=self.has_critic)
            # A token without a share in the loss moves no ratio of its turn or sequence either.
            trained = dataclasses.replace(rows, loss_mask=weights != 0)
            per_token, metrics = self.algorithm.loss(logprobs, entropies, trained, rows_scores, advantages)
            if values is not None:
                targets = self.micro(credit.value_targets, index)
                value_losses, value_metrics = self.algorithm.value_loss(values, rows, rows_scores, targets)
                per_token, metrics = per_token + value_losses, metrics | value_metrics

            def total(value: jax.Array, mask: jax.Array) -> jax.Array:
                # where, not a product: off the mask a value may be infinite, and 0 * inf is NaN.
                return jnp.sum(jnp.where(mask, value, jnp.float32(0.0)))

            covered, sampled, one = trained.loss_mask, rows.loss_mask, jnp.float32(1.0)
            loss = total(per_token * weights, covered)
            sums = {name: total(value, covered) for name, value in metrics.items()}
            sums |= {"entropy": total(entropies, sampled), "loss": loss}
            sums |= {"tokens": total(one, covered), "sampled": total(one, sampled)}
            return loss, jax.lax.stop_gradient(sums)

        gradient = jax.grad(loss_of, has_aux=True)
        shapes = jax.eval_shape(gradient, state.params, start)
        # Sums of many bfloat16 gradients would lose small terms, so they are kept in float32.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide_type(leaf.dtype)), shapes)

        def body(index: jax.Array, total: Any) -> Any:
            return jax.tree.map(jnp.add, total, widen(gradient(state.params, index)))

        gradients, sums = jax.lax.fori_loop(start, stop, body, zeros)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradients)))
        is_finite = jnp.logical_and(jnp.isfinite(norm), jnp.isfinite(sums["loss"]))
        has_tokens = sums["tokens"] > 0  # without any, momentum and weight decay would still move the weights
        tokens, sampled = (jnp.maximum(sums.pop(name), 1.0) for name in ("tokens", "sampled"))
        # Sums, not means, are compared: the KL is bounded per trained token.
        is_near = sums.get("approx_kl", jnp.float32(0.0)) <= self.max_kl * tokens
        is_good = is_finite & is_near & has_tokens
        updates, opt_state = self.optimizer.update(gradients, state.opt_state, state.params)
        params = apply_updates(state.params, updates, state.step)
        stepped = TrainState(params=params, opt_state=opt_state, step=state.step + 1)
        # Selected on the device: the host would have to wait for the verdict of every step.
        new_state = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), stepped, state)
        counts = {"loss": jnp.float32(1.0), "entropy": sampled}
        metrics = {name: value / counts.get(name, tokens) for name, value in sums.items()}
        metrics |= {"grad_norm": norm, "tokens": tokens, "sampled": sampled}
        metrics["nonfinite"] = 1.0 - is_finite.astype(jnp.float32)
        metrics["empty"] = jnp.logical_and(is_finite, jnp.logical_not(has_tokens)).astype(jnp.float32)
        metrics["kl_exceeded"] = jnp.logical_and(is_finite, jnp.logical_not(is_near)).astype(jnp.float32)
        return new_state, metrics
