"""The time of an update and of a decode step by a chip's published peaks: a model, no measurement.

Work is counted from shapes. An update takes the longer of computing and exchanging weights, which the
compiler overlaps, and exchanges activations between the products, which wait for them; a decode step takes as
long as reading the weights and the live part of the KV cache, and exchanges activations, too.
The head is counted for every token, as devices that split the rows compute it (`models.head.num_blocks`);
one that has them whole leaves out blocks of tokens without loss, whose share only a run tells.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from empg_jax.errors import ConfigError
from empg_jax.learner.state import base_model
from empg_jax.models.decoder import DecoderConfig, init_params
from empg_jax.models.moe import MoeConfig
from empg_jax.parallel.layout import cache_heads_here, head_shards
from empg_jax.parallel.mesh import AXES
from empg_jax.plan.memory import as_computed
from empg_jax.run.assembly import micro_rows
from empg_jax.run.sampling import count_slots
from empg_jax.run.weights import base_shapes

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one device.

    Attributes:
      flops: dense bfloat16 operations per second.
      bandwidth: bytes per second of its memory.
      link: bytes per second that it sends to the other devices of its node or slice, in one direction.
      memory: bytes of its memory.
      network: bytes per second that it sends to devices of other hosts, in one direction; None: as `link`, by
        which a TPU's slice reaches over hosts.
      float32: float32 operations per second outside of tensor cores; None: a TPU, which has none.
    """

    flops: float
    bandwidth: float
    link: float
    memory: float
    network: float | None = None
    float32: float | None = None

    def rate(self, dtype: str, precision: str | None) -> float:
        """Return the operations per second of products in ``model.dtype`` at ``model.matmul_precision``.

        GPUs multiply float32 as TF32 at half of bfloat16's rate, but for the highest precision; TPUs as one,
        three or six bfloat16 products.
        """
        if dtype == "bfloat16":
            return self.flops
        precision = precision or "highest"  # see `run.process.find_precision`
        if self.float32 is None:
            return self.flops / {"default": 1, "high": 3, "highest": 6}[precision]
        return self.float32 if precision == "highest" else self.flops / 2


CHIPS = {
    # The networks are the cards for each in a DGX: 200 Gb/s, later 400.
    "a100": Chip(312e12, 2039e9, 300e9, 80e9, 25e9, 19.5e12),
    "h100": Chip(989e12, 3350e9, 450e9, 80e9, 50e9, 67e12),
    "h200": Chip(989e12, 4800e9, 450e9, 141e9, 50e9, 67e12),
    "b200": Chip(2250e12, 8000e9, 900e9, 180e9, 50e9, 75e12),
    "v5e": Chip(197e12, 819e9, 100e9, 16 * 2**30),
    "v5p": Chip(459e12, 2765e9, 300e9, 95 * 2**30),
    "v6e": Chip(918e12, 1640e9, 224e9, 32 * 2**30),
}
# Work of an update's token in forward passes, by `model.remat`: one, two for the gradients (of activations
# and of weights), and what is computed again; the head's logits always are.
PASSES = {"full": 4, "dots": 3, "none": 3}
# Times that a layer's weights are gathered: once for each pass over the layers.
GATHERS = {"full": 3, "dots": 2, "none": 2}
# Times that a layer's states are added up over `mesh.tensor`: behind attention and MLP, before both on the
# way back, and behind an attention that is computed again.
REDUCTIONS = {"full": 5, "dots": 4, "none": 4}
# Times that attention runs, forward, again or back, each of which exchanges heads over `mesh.sequence`.
SWAPS = {"full": 3, "dots": 3, "none": 2}


def find_chip(name: str) -> Chip:
    """Return a chip by its name.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in CHIPS:
        raise ConfigError(f"--chip {name}: choose one of {', '.join(CHIPS)}")
    return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Speed:
    """Expected times in seconds, and rates per second.

    Attributes:
      compute: of a micro-batch's products on each device.
      exchange: of its weights and gradients between devices.
      waits: of its activations between devices.
      tokens: of a micro-batch, over all devices.
      step: of a decode step of one host's engine.
      slots: of this engine.
      busy: slots whose conversations, half full, the pool of pages holds; all without pages.
    """

    compute: float
    exchange: float
    waits: float
    tokens: int
    step: float
    slots: int
    busy: int

    @property
    def update_rate(self) -> float:
        """Trained tokens per second."""
        return self.tokens / (max(self.compute, self.exchange) + self.waits)

    @property
    def decode_rate(self) -> float:
        """Sampled tokens per second."""
        return self.busy / self.step


def compute_speed(config: Config, model: DecoderConfig, chip: Chip) -> Speed:
    """Compute the expected times of a configuration on a chip.

    Args:
      config: the configuration; its devices need not exist.
      model: the decoder's shape.
      chip: the device.
    """
    r = config.rollout
    tokens = micro_rows(config) * r.max_tokens
    per_token = PASSES[model.remat] * forward_flops(model, r.max_tokens)
    if PASSES[model.remat] == 3:
        per_token += 2 * model.vocab_size * model.hidden_size
    if model.lora is not None:  # frozen weights have no gradients
        per_token -= 2 * visited_numbers(model)
    experts, others = _weight_bytes(config, model)
    slots = busy = count_slots(config, config.hosts.num or 1)
    if r.page_tokens and r.kv_tokens:
        busy = min(slots, 2 * r.kv_tokens // r.max_tokens)
    heads = cache_heads_here(model.num_heads, model.num_kv_heads, r.tensor)
    read = others + experts * (1 if model.moe is None else _share_read(model.moe, busy / r.data))
    numbers = busy / r.data * r.max_tokens / 2 * 2 * model.num_layers * heads * model.head_dim
    live = numbers * jnp.dtype(model.dtype).itemsize
    # States are added up behind attention, MLP and embedding, as in `_exchange_activations`.
    states = busy / r.data * model.hidden_size * jnp.dtype(model.dtype).itemsize
    added = (2 * model.num_layers + 1) * states * 2 * (1 - 1 / r.tensor)
    return Speed(
        compute=tokens * per_token / math.prod(vars(config.mesh).values()) / _rate(config, model, chip),
        exchange=_exchange_weights(config, model, chip, experts + others),
        waits=_exchange_activations(config, model, chip, tokens),
        tokens=tokens,
        step=(read / r.tensor + live) / chip.bandwidth + added / chip.link,
        slots=slots,
        busy=busy,
    )


def _rate(config: Config, model: DecoderConfig, chip: Chip) -> float:
    return chip.rate(jnp.dtype(model.dtype).name, config.model.matmul_precision)


def _exchange_weights(config: Config, model: DecoderConfig, chip: Chip, weights: int) -> float:
    """Compute the seconds in which a micro-batch's weights, of so many bytes, and gradients are exchanged."""
    mesh, narrow = config.mesh, jnp.dtype(model.dtype).itemsize
    split, slopes = mesh.fsdp * mesh.sequence, 0.0
    if model.lora is None:
        slopes = weights * max(narrow, jnp.dtype(model.reduce_dtype).itemsize) / narrow
    sent = (GATHERS[model.remat] * weights + slopes) / mesh.tensor * (1 - 1 / split)
    # The split gradients are added up over the copies: scattered and gathered.
    added = 2 * slopes / mesh.tensor / split * (1 - 1 / mesh.data)
    return sent / _link(config, chip, "fsdp", "sequence") + added / _link(config, chip, "data")


def _exchange_activations(config: Config, model: DecoderConfig, chip: Chip, tokens: int) -> float:
    """Compute the seconds in which a micro-batch's activations are exchanged.

    Over ``tensor`` states are added up (scattered and gathered), once more behind the embedding and before
    the head. Over ``sequence`` queries, keys, values and results change between time and heads, or keys and
    values are gathered (`parallel.layout.split_attention`).
    """
    mesh, narrow = config.mesh, jnp.dtype(model.dtype).itemsize
    here = tokens / (mesh.data * mesh.fsdp * mesh.sequence) * narrow
    sums = REDUCTIONS[model.remat] * model.num_layers + 2
    added = sums * here * model.hidden_size * 2 * (1 - 1 / mesh.tensor)
    shards = head_shards(vars(mesh), model.num_heads)
    kept = math.lcm(model.num_kv_heads, math.prod(shards))
    if shards.sequence == mesh.sequence:
        heads = 2 * (model.num_heads + kept) * (1 - 1 / mesh.sequence)
    else:
        heads = 2 * kept * (mesh.sequence - 1)
    swapped = SWAPS[model.remat] * model.num_layers * here * heads / shards.tensor * model.head_dim
    return added / _link(config, chip, "tensor") + swapped / _link(config, chip, "sequence")


def _link(config: Config, chip: Chip, *axes: str) -> float:
    """Return the bytes per second that a device sends to those that differ from it on these axes only.

    Over several hosts such a group is a ring that leaves each host once, by the network cards of all its
    devices there.
    """
    sizes = [vars(config.mesh)[axis] for axis in AXES]
    count, hosts = math.prod(sizes), config.hosts.num or 1
    host = (np.arange(count) * hosts // count).reshape(sizes)
    group = host[tuple(slice(None) if axis in axes else 0 for axis in AXES)]
    if chip.network is None or not group.any():
        return chip.link
    return min(chip.link, np.count_nonzero(group == 0) * chip.network)


def forward_flops(model: DecoderConfig, row: int) -> float:
    """Count the operations of a forward pass per token: two per weight, and attention to half of the row."""
    attention = 4 * model.num_layers * model.num_heads * model.head_dim * row / 2
    return 2 * visited_numbers(model) + attention


def visited_numbers(model: DecoderConfig) -> int:
    """Count the weights that multiply a token: not the input embedding, and only the experts it visits."""
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), base_model(model)))
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    if not model.tie_embeddings:
        total -= model.vocab_size * model.hidden_size
    if (moe := model.moe) is not None:
        idle = moe.num_experts - moe.top_k
        total -= model.num_layers * idle * 3 * model.hidden_size * moe.expert_size
    return total


def _weight_bytes(config: Config, model: DecoderConfig) -> tuple[int, int]:
    """Count the bytes of all experts, and of all other weights, as they are sent and read.

    The input embedding is left out where it is no head: only a few of its rows are read. Adapters are left
    out for their size.
    """
    experts = others = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        as_computed(base_shapes(config, model), model.dtype)
    ):
        module, size = path[-2].key, math.prod(leaf.shape) * leaf.dtype.itemsize
        if module.endswith("_experts"):
            experts += size
        elif module != "embed" or model.tie_embeddings:
            others += size
    return experts, others


def _share_read(moe: MoeConfig, slots: float) -> float:
    """Return the largest share of the experts that a decode step of these slots visits."""
    return min(1.0, slots * moe.top_k / moe.num_experts)


def speed_lines(config: Config, model: DecoderConfig, name: str) -> list[str]:
    """Return the expected times on the chip of this name as text."""
    chip = find_chip(name)
    speed = compute_speed(config, model, chip)
    times = (speed.compute, speed.exchange, speed.waits, speed.step)
    compute, exchange, waits, step = (f"{1e3 * each:.2f} ms" for each in times)
    hosts, network, between = config.hosts.num or 1, "", ""
    peak = _rate(config, model, chip) / 1e12
    if hosts > 1 and chip.network is not None:
        rate = f"{chip.network / 1e9:.0f} GB/s ({8 * chip.network / 1e9:.0f} Gb/s)"
        network = f", {rate} a device between hosts, which is assumed"
    if speed.waits > 0:
        between = f", and {waits} of exchanging activations,"
    lines = [
        f"at best on {name}, a model from published peaks and not a measurement "
        f"({peak:.{1 if peak < 100 else 0}f} TFLOP/s in {jnp.dtype(model.dtype).name}, "
        f"{chip.bandwidth / 1e9:.0f} GB/s, "
        f"links {chip.link / 1e9:.0f} GB/s{network}):",
        f"  update  {speed.update_rate:,.0f} tokens/s: {compute} of computing beside {exchange} of exchange"
        f"{between} for {speed.tokens} tokens, the head for all of them",
    ]
    if config.rollout.engine != "builtin":
        return [*lines, f"  decode  unknown: rollout.engine={config.rollout.engine} samples elsewhere"]
    slots = f"{speed.slots} slots"
    if speed.busy < speed.slots:
        slots = f"{speed.busy} busy slots of {speed.slots} (rollout.kv_tokens={config.rollout.kv_tokens})"
    where = "on one host" if hosts == 1 else f"on each of {hosts} hosts"
    return [
        *lines,
        f"  decode  {speed.decode_rate:,.0f} tokens/s {where}: {step} for a step of {slots}, "
        "conversations half full",
    ]
