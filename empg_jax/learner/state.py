"""The learner's state and its initialization: trained parameters, optimizer, step.

The trained parameters are all parameters, or the adapters alone where the model has adapters (`models.lora`).
In the second case the frozen base is no part of the state. Gradients are summed and moments are kept in
float32, whatever the type of the parameters; the first moments may be bfloat16.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from empg_jax.models.axes import param_shardings
from empg_jax.models.decoder import DecoderConfig, init_params, init_value_head
from empg_jax.models.lora import make_lora
from empg_jax.parallel.mesh import replicated
from empg_jax.types import Leaf, Params, wide_type


@flax.struct.dataclass
class TrainState:
    """Everything that an update changes. An update takes it as a donated argument and returns the new one."""

    params: Params  # the trained ones only
    opt_state: Any  # moments in float32, or the first ones in bfloat16
    step: Leaf  # int32[], optimizer steps made


def make_optimizer(
    *,
    learning_rate: float,
    final_learning_rate: float,
    total_steps: int,
    schedule: str = "linear",
    warmup_steps: int = 0,
    beta1: float = 0.9,
    beta2: float = 0.99,
    moments: str = "float32",
    weight_decay: float = 0.0,
    grad_clip: float = 1.0,
    critic_learning_rate: float | None = None,
    critic_grad_clip: float | None = None,
    critic_warmup_steps: int = 0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Build AdamW with global-norm clipping and a schedule, computed in float32 for parameters of any type.

    Args:
      learning_rate: peak learning rate.
      final_learning_rate: learning rate at ``total_steps`` (ignored by ``constant``).
      total_steps: optimizer steps of the run, warm-up included.
      schedule: ``linear``, ``cosine`` or ``constant``.
      warmup_steps: steps of linear warm-up from zero.
      beta1: first moment decay.
      beta2: second moment decay.
      moments: type that the first moments are kept in. The second ones stay float32: they change by less than
        the last bit of a bfloat16 number, and would stand still.
      weight_decay: decoupled decay of matrices (norms and biases do not decay).
      grad_clip: largest global gradient norm.
      critic_learning_rate: peak of the critic's head, on the same schedule; None = the policy's.
      critic_grad_clip: largest gradient norm of the critic's head alone; None = the policy's value.
      critic_warmup_steps: first steps, which train the critic's head only while the policy stays fixed.

    Returns:
      ``(optimizer, schedule)``; the schedule is the policy's. If any setting of the critic is given, the head
      has an optimizer of its own, and each optimizer clips by its own norm.

    Raises:
      ValueError: unknown schedule.
    """
    kept = None if moments == "float32" else moments  # None: as wide as the gradients
    decay = _schedule(learning_rate, final_learning_rate, total_steps, schedule, warmup_steps)

    def adam(rate: optax.Schedule, clip: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(clip),
            optax.adamw(rate, b1=beta1, b2=beta2, mu_dtype=kept, weight_decay=weight_decay, mask=_decayed),
        )

    if critic_learning_rate is None and critic_grad_clip is None and not critic_warmup_steps:
        return _relaxed(adam(decay, grad_clip)), decay
    ratio = 1.0 if critic_learning_rate is None else critic_learning_rate / learning_rate
    of_critic = adam(lambda step: ratio * decay(step), critic_grad_clip or grad_clip)
    policy = decay
    if critic_warmup_steps:
        # A rate of 0 keeps the policy fixed, while the schedule still counts every step.
        def policy(step: Any) -> Any:
            return jnp.where(step < critic_warmup_steps, 0.0, decay(step))

    return _relaxed(
        optax.multi_transform({"policy": adam(policy, grad_clip), "critic": of_critic}, _owners)
    ), policy


def _owners(params: Params) -> Params:
    """Label each parameter with its optimizer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "critic" if path[0].key == "value_head" else "policy", params
    )


def _schedule(
    learning_rate: float, final_learning_rate: float, total_steps: int, schedule: str, warmup_steps: int
) -> optax.Schedule:
    """Make a schedule with warm-up from zero and decay."""
    decay_steps = max(1, total_steps - warmup_steps)
    if schedule == "linear":
        decay = optax.linear_schedule(learning_rate, final_learning_rate, decay_steps)
    elif schedule == "cosine":
        decay = optax.cosine_decay_schedule(learning_rate, decay_steps, final_learning_rate / learning_rate)
    elif schedule == "constant":
        decay = optax.constant_schedule(learning_rate)
    else:
        raise ValueError(f"schedule={schedule!r} is unknown; choose linear, cosine or constant")
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        decay = optax.join_schedules([warmup, decay], [warmup_steps])
    return decay


def _relaxed(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wrap an optimizer to run in float32 under JAX's standard promotion: optax mixes integers and floats."""

    def init(params: Params) -> Any:
        return optimizer.init(widen(params))

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return optimizer.update(widen(updates), state, widen(params))

    return optax.GradientTransformation(init, update)


def widen(tree: Any) -> Any:
    """Convert the tree to float32 or wider."""
    return jax.tree.map(lambda leaf: leaf.astype(wide_type(leaf.dtype)), tree)


def apply_updates(params: Params, updates: Params, step: jax.Array) -> Params:
    """Add ``updates`` to ``params`` in float32.

    A bfloat16 number has 8 significant bits. Most training steps are smaller than half of the last bit, so
    rounding to nearest would lose them. Stochastic rounding is used instead: it is unbiased.

    Args:
      params: the parameters.
      updates: the changes, in float32.
      step: the optimizer step; seeds the random bits.
    """
    leaves, structure = jax.tree.flatten(params)
    added = []
    for number, (leaf, change) in enumerate(zip(leaves, jax.tree.leaves(updates), strict=True)):
        total = leaf.astype(change.dtype) + change
        if leaf.dtype == jnp.bfloat16:
            total = _round_at_random(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), number), total
            )
        added.append(total.astype(leaf.dtype))
    return jax.tree.unflatten(structure, added)


def _round_at_random(key: jax.Array, wide: jax.Array) -> jax.Array:
    """Round float32 to one of the two neighboring bfloat16 numbers, the nearer one more often.

    Infinities and NaN stay as they are.
    """
    # Noise below the kept bits carries into them with a probability equal to the dropped fraction.
    noise = jax.random.bits(key, wide.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(wide, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(wide), rounded, wide).astype(jnp.bfloat16)


_MATRICES = ("kernel", "embedding", "lora_a", "lora_b")


def _decayed(params: Params) -> Params:
    """Mark the matrices, by name: stacked layers give norms and biases a second axis, too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _MATRICES, params)


def init_trained(key: jax.Array, model: DecoderConfig) -> Params:
    """Make the first trained parameters: random ones, or fresh adapters (and a critic's head) in float32."""
    if model.lora is None:
        return init_params(key, model)
    # Shapes alone: the base may be large and is loaded elsewhere.
    base = jax.eval_shape(lambda: init_params(key, base_model(model)))
    trained = make_lora(key, base, model.lora)
    if model.value_head:
        trained["value_head"] = init_value_head(dataclasses.replace(model, param_dtype=jnp.float32))
    return trained


def base_model(model: DecoderConfig) -> DecoderConfig:
    """Return the config of the frozen base below adapters, without the critic's head, which is trained."""
    return dataclasses.replace(model, lora=None, value_head=False)


def state_shardings(mesh: Mesh, model: DecoderConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the sharding of every leaf of a `TrainState`; moments are sharded like their parameter."""
    params = jax.eval_shape(lambda: init_trained(jax.random.key(0), model))
    of_params = param_shardings(mesh, params, model.head_dim)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_shardings = optax.tree_map_params(
        optimizer,
        # With separate optimizers for critic and policy, each state masks the other's parameters.
        lambda leaf, sharding: leaf if isinstance(leaf, optax.MaskedNode) else sharding,
        opt_state,
        of_params,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    return TrainState(params=of_params, opt_state=opt_shardings, step=replicated(mesh))


def state_shapes(model: DecoderConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the shape and type of every leaf of a `TrainState`."""

    def init() -> TrainState:
        params = init_trained(jax.random.key(0), model)
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    return jax.eval_shape(init)


def init_state(
    key: jax.Array, model: DecoderConfig, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Make parameters with `init_trained` and a fresh optimizer state, in place on the mesh."""

    def init(key: jax.Array) -> TrainState:
        params = init_trained(key, model)
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    return jax.jit(init, out_shardings=shardings)(key)


def restart_optimizer(
    params: Params, optimizer: optax.GradientTransformation, shardings: TrainState
) -> TrainState:
    """Make a state from given parameters, which are donated, and a fresh optimizer, at a phase's start."""

    def init(params: Params) -> TrainState:
        return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.int32(0))

    placed = jax.device_put(params, shardings.params)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(placed)
