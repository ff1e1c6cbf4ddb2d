"""The memory that a run needs on each device, computed from shapes alone: no weights, devices or compilation.

The sizes of weights, moments and caches are exact. The sizes of activations are estimates by the formulas of
`activations.activation_bytes` with a margin (`MARGIN`, `MIXTURE_MARGIN`), so that a plan errs high:
`tests/plan/test_memory.py` compares it with the compiler's memory. Memory fragmentation and the memory of a
platform's runtime (about 1 GiB on GPUs) are not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from empg_jax.engine.sizes import EngineConfig
from empg_jax.learner.state import base_model, init_trained
from empg_jax.models.attention.cached import SCORES
from empg_jax.models.axes import param_axes
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.head import LARGE_SLAB, num_blocks
from empg_jax.models.quantize import UNCAST_LEAVES
from empg_jax.parallel.layout import cache_heads_here
from empg_jax.parallel.mesh import AXES, fit_spec, mesh_axes
from empg_jax.plan.activations import activation_bytes, find_widths, tokens_here
from empg_jax.run.assembly import make_batch_shape, needs_reference
from empg_jax.run.sampling import size_engine
from empg_jax.run.weights import base_shapes
from empg_jax.types import Params

if TYPE_CHECKING:
    from empg_jax.config import Config

MARGIN = 1.3  # of estimates; the compiler reserves 0.9 to 1.25 times what the formulas say
MIXTURE_MARGIN = 2.1  # of estimates for layers whose mixtures of experts are trained
_BATCH_BYTES = 60  # bytes per token of a batch: ids, masks, scores, credit


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a device's memory.

    Attributes:
      name: its name in the table.
      size: bytes on the fullest device.
      phase: when the memory is in use: ``always``, during an ``update``, during a ``rollout``, within an
        update while one ``layer`` or the ``head`` runs, or within a rollout during a ``step``, the ``growth``
        of the cache, or the ``placing`` of new weights.
      note: the origin of the size.
      owner: ``learner`` or ``engine``.
    """

    name: str
    size: int
    phase: str
    note: str
    owner: str = "learner"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of the fullest device, item by item. Phases that never overlap share their memory.

    Attributes:
      name: the configuration's name.
      mesh: sizes of the learner's mesh.
      num_params: numbers of the model.
      items: the items.
      is_apart: whether the engine has devices of its own (``rollout.devices``).
    """

    name: str
    mesh: dict[str, int]
    num_params: int
    items: tuple[Item, ...]
    is_apart: bool = False

    @property
    def devices(self) -> int:
        """Number of devices of the learner."""
        return math.prod(self.mesh.values())

    @property
    def peaks(self) -> dict[str, int]:
        """Peak bytes of a device by its user: ``learner``, ``engine``, or ``both`` where they share it."""
        if not self.is_apart:
            return {"both": _peak(self.items)}
        owners = ("learner", "engine")
        return {owner: _peak(item for item in self.items if item.owner == owner) for owner in owners}

    @property
    def total(self) -> int:
        """Peak bytes of the fullest device."""
        return max(self.peaks.values())


def _peak(items: Iterable[Item]) -> int:
    sums = Counter[str]()
    for item in items:
        sums[item.phase] += item.size
    update = sums["update"] + max(sums["layer"], sums["head"])
    rollout = sums["rollout"] + max(sums["step"], sums["growth"], sums["placing"])
    return sums["always"] + max(update, rollout)


def compute_plan(config: Config, model: DecoderConfig, num_hosts: int | None = None) -> Plan:
    """Compute the plan of a configuration.

    Args:
      config: the configuration. The devices of its ``mesh`` need not exist.
      model: the decoder's shape (`plan.explain.find_shape`).
      num_hosts: hosts whose engines share the slots; the default is ``hosts.num``, or one.
    """
    mesh = AbstractMesh(tuple(vars(config.mesh)[axis] for axis in AXES), AXES)
    trained = jax.eval_shape(lambda: init_trained(jax.random.key(0), model))
    base = None if model.lora is None else base_shapes(config, model)
    items = [
        *_state_items(config, model, mesh, trained, base),
        *_update_items(config, model, mesh, trained, base),
    ]
    if config.rollout.engine == "builtin":
        engine = _engine_items(config, model, mesh, trained, base, num_hosts or config.hosts.num or 1)
        items += (dataclasses.replace(item, owner="engine") for item in engine)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: _plain(model))))
    found = tuple(item for item in items if item.size)
    return Plan(config.name, dict(vars(config.mesh)), count, found, config.rollout.devices is not None)


def _plain(model: DecoderConfig) -> Params:
    return init_params(jax.random.key(0), base_model(model))


# -------------------------------------------------------------------------------------------- weights


def _state_items(
    config: Config, model: DecoderConfig, mesh: AbstractMesh, trained: Params, base: Params | None
) -> Iterator[Item]:
    size = shard_bytes(trained, model.head_dim, mesh)
    wide = shard_bytes(trained, model.head_dim, mesh, itemsize=4)
    kind = "adapters" if base else "weights"
    yield Item(kind, size, "always", f"trained, {jnp.dtype(jnp.float32 if base else model.param_dtype).name}")
    if base:
        note = "as stored" if config.model.quantize == "none" else f"matrices in {config.model.quantize}"
        yield Item("frozen weights", shard_bytes(base, model.head_dim, mesh), "always", note)
    if needs_reference(config) and (base is None or config.sft.updates > 0):
        yield Item("reference", size, "always", f"frozen copy of the {kind} for the KL term")
    first = shard_bytes(trained, model.head_dim, mesh, itemsize=jnp.dtype(config.train.moments).itemsize)
    note = f"first moments in {config.train.moments}, second ones in float32"
    yield Item("optimizer", first + wide, "always", note)
    # The float32 sum over micro-batches, and the newest micro-batch's gradients in the parameters' type.
    yield Item("gradients", wide + size, "update", "sum in float32, and one micro-batch's")


def shard_bytes(params: Params, head_dim: int, mesh: AbstractMesh, itemsize: int | None = None) -> int:
    """Compute the bytes of parameters on the fullest device.

    Args:
      params: shapes and types.
      head_dim: width of a head.
      mesh: sizes of the mesh's axes.
      itemsize: bytes of a number; the default is the size of each leaf's type.
    """
    axes = jax.tree.leaves(param_axes(params, head_dim), is_leaf=lambda node: isinstance(node, tuple))
    total = 0
    for leaf, names in zip(jax.tree.leaves(params), axes, strict=True):
        spec = fit_spec(mesh, names, leaf.shape)
        parts = math.prod(mesh.shape[name] for names in spec for name in mesh_axes(names))
        total += math.prod(leaf.shape) // parts * (itemsize or leaf.dtype.itemsize)
    return total


def _estimate(size: int, margin: float = MARGIN) -> int:
    """Add the margin to a size that a formula estimates."""
    return round(margin * size)


# --------------------------------------------------------------------------------------------- update


def _update_items(
    config: Config, model: DecoderConfig, mesh: AbstractMesh, trained: Params, base: Params | None
) -> Iterator[Item]:
    sizes, shape = mesh.shape, make_batch_shape(config)
    row_shards, tokens = sizes["data"] * sizes["fsdp"], tokens_here(mesh, shape)
    kept, working = activation_bytes(model, mesh, shape)
    policy = f"remat={model.remat}" if model.scan_layers else "all kept: scan_layers=false"
    margin = MARGIN if model.moe is None or base else MIXTURE_MARGIN
    note = f"{tokens} tokens a device, {model.num_layers} layers, {policy}"
    yield Item("activations", _estimate(kept, margin), "update", note)
    is_split = row_shards * sizes["sequence"] > 1  # then all tokens of a device are computed at once
    here = tokens if is_split else tokens // num_blocks(tokens)
    logits = min(here * -(-model.vocab_size // sizes["tensor"]), LARGE_SLAB)
    head = 3 * 4 * logits + 2 * 4 * tokens * model.hidden_size
    if not is_split:  # the sum over blocks of the gradient of the vocabulary's table
        head += 4 * -(-model.vocab_size // sizes["tensor"]) * model.hidden_size
    working += _layer_bytes(model, mesh, trained, base)
    if is_split or sizes["tensor"] > 1:
        chunk = logits * sizes["tensor"] // here * model.hidden_size
        head += _gathered_bytes(model, mesh, chunk)
    note = "its recomputation, its slopes, its own weights and their gradients"
    yield Item("one layer", _estimate(working, margin), "layer", note)
    if base is None and jnp.dtype(model.param_dtype).itemsize < 4:
        # The gradient of the embeddings is added up in float32 when the head is done.
        head = max(head, shard_bytes({"embed": trained["embed"]}, model.head_dim, mesh, itemsize=4))
    note = "one chunk of the vocabulary, three times, and its part of the table"
    yield Item("logits", _estimate(head), "head", note)
    batch = shape.max_rows * shape.row_tokens * _BATCH_BYTES // (row_shards * sizes["sequence"])
    yield Item("batch", batch, "always", f"at most {shape.max_rows} rows of {shape.row_tokens} tokens")
    if config.train.epochs > 1:
        yield Item("batch again", batch, "update", "the same episodes in another order, for a further epoch")


def _layer_bytes(model: DecoderConfig, mesh: AbstractMesh, trained: Params, base: Params | None) -> int:
    """Compute the bytes of one layer's own weights, gathered or unpacked, and of their gradients."""

    def count(layers: Any) -> int:
        return sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(layers) if leaf.ndim > 2)

    if base is not None and mesh.size == 1:  # nothing is gathered, and frozen weights have no gradients
        plain = jax.eval_shape(lambda: _plain(model))
        return count(plain["layers"]) * jnp.dtype(model.dtype).itemsize
    return _gathered_bytes(model, mesh, count((base or trained)["layers"]))


def _gathered_bytes(model: DecoderConfig, mesh: AbstractMesh, numbers: int) -> int:
    """Compute the bytes of gathered weights and of their gradients, which are added up in a wider type."""
    narrow, wide = (jnp.dtype(dtype).itemsize for dtype in (model.dtype, model.reduce_dtype))
    return numbers // mesh.shape["tensor"] * (narrow + max(narrow, wide))


# -------------------------------------------------------------------------------------------- rollout


def _engine_items(
    config: Config,
    model: DecoderConfig,
    learner: AbstractMesh,
    trained: Params,
    base: Params | None,
    num_hosts: int,
) -> Iterator[Item]:
    r, narrow = config.rollout, jnp.dtype(model.dtype).itemsize
    mesh = AbstractMesh((r.data, 1, r.tensor, 1), AXES)
    own = shard_bytes(trained, model.head_dim, mesh, itemsize=narrow)
    where = f"on {r.data * r.tensor} of the devices" if r.data * r.tensor > 1 else "on the first device"
    if r.devices is not None:
        where = "on its own devices"
    # Without release the old weights are live while new ones are placed.
    when, copies = ("rollout", 1) if r.release else ("always", 2)
    note = "freed during updates" if r.release else "live ones and those to come"
    yield Item("engine weights", copies * own, when, f"{note}, {where}")
    # Pieces of weights that are split over hosts are gathered to every device.
    source = AbstractMesh((1,) * len(AXES), AXES) if num_hosts > 1 else learner
    placing = _placing_bytes(model, trained, source, mesh)
    # With a lag weights come while responses are sampled.
    phase = "rollout" if config.train.max_lag else "placing"
    yield Item("placing", placing, phase, "new weights come piece by piece: one beside those that are placed")
    if base:
        size = shard_bytes(as_computed(base, model.dtype), model.head_dim, mesh)
        yield Item("engine base", size, "always", f"the frozen weights, {where}")
    sizes = size_engine(config, num_hosts=num_hosts)
    slots = -(-sizes.slots // r.data)
    kv_heads = cache_heads_here(model.num_heads, model.num_kv_heads, r.tensor)
    per_token = 2 * model.num_layers * kv_heads * model.head_dim * narrow
    note, caches = f"{slots} slots of {sizes.longest_cache} tokens, {where}", 1
    if config.train.max_lag:
        note, caches = f"{note}; another for evaluation", 2
    tokens = slots * sizes.longest_cache
    if r.page_tokens:
        tokens = sizes.num_pages * r.page_tokens
        note = note.replace(f"{slots} slots of {sizes.longest_cache} tokens", f"{tokens} tokens in pages")
    yield Item("KV cache", caches * tokens * per_token, when, note)
    if not r.page_tokens and len(sizes.cache_buckets) > 1:
        shorter = sizes.cache_buckets[-2]
        note = f"the cache of {shorter} tokens a slot, while it is copied into the longest one"
        yield Item("growth", slots * shorter * per_token, "growth", note)
    logits = 3 * 4 * slots * model.vocab_size // r.tensor
    prefill = _prefill_bytes(config, model, mesh, sizes)
    yield Item("sampling", _estimate(max(prefill, logits)), "step", "one prefill, or logits of a step")


def _placing_bytes(model: DecoderConfig, params: Params, learner: AbstractMesh, engine: AbstractMesh) -> int:
    """Compute the bytes that `engine.weights.place_params` needs at its peak besides the whole copy."""

    def layer(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)

    num_layers, narrow = len(jax.tree.leaves(params["layers"])[0]), jnp.dtype(model.dtype).itemsize
    outer = [(name, part, 1) for name, part in params.items() if name != "layers"]
    layers = ("layers", jax.tree.map(layer, params["layers"]), num_layers)
    placed = most = 0
    for name, part, count in (*outer, layers):
        piece = {name: part}
        taken = shard_bytes(piece, model.head_dim, learner)
        kept = shard_bytes(piece, model.head_dim, engine, itemsize=narrow)
        placed += count * kept
        # The newest one is taken, cast, moved, and laid out anew with a copy.
        most = max(most, placed + taken + _estimate(3 * kept) - kept)
    return max(0, most - placed)


def as_computed(base: Params, dtype: Any) -> Params:
    """Return frozen weights in the type that computations take; quantized leaves keep theirs.

    Args:
      base: shapes and types, as stored.
      dtype: the computation's type.
    """

    def cast(path: tuple[Any, ...], leaf: Any) -> Any:
        return leaf if path[-1].key in UNCAST_LEAVES else jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(cast, base)


def _prefill_bytes(config: Config, model: DecoderConfig, mesh: AbstractMesh, sizes: EngineConfig) -> int:
    """Compute the bytes that one prefill dispatch needs besides weights and cache."""
    r, w, narrow = config.rollout, find_widths(model, mesh), jnp.dtype(model.dtype).itemsize
    most = 0
    capacity = sizes.longest_cache
    for length in sizes.prefill_lengths(capacity):
        for rows in sizes.prefill_rows(length):
            here = rows // sizes.shards
            queries = min(length, max(1, SCORES // (here * w.heads * capacity)))
            scores = 2 * 4 * here * queries * w.heads * capacity
            # Fewer rows than slots, and pages, are copies of the keys and values that they read.
            is_copied = rows < sizes.slots or r.page_tokens
            copies = 2 * narrow * here * capacity * w.keys if is_copied else 0
            layer = here * length * (4 * 2 * w.stream + narrow * (w.stream + 2 * w.queries + 3 * w.hidden))
            most = max(most, layer + scores + copies)
    return most
