"""The memory plan as text: a table, one line, and suggestions for a run that does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import jax

from empg_jax.config.places import expand
from empg_jax.errors import ConfigError
from empg_jax.hf.presets import PRESETS
from empg_jax.models.decoder import DecoderConfig
from empg_jax.plan.memory import Plan, compute_plan
from empg_jax.plan.speed import find_chip, speed_lines
from empg_jax.plan.whole import whole_lines
from empg_jax.run.assembly import (
    make_language,
    make_model,
    micro_rows,
    shape_model,
)
from empg_jax.run.devices import check_planned, count_devices
from empg_jax.run.sampling import count_slots

if TYPE_CHECKING:
    from empg_jax.config import Config

GIB = 2**30


def find_shape(config: Config) -> DecoderConfig:
    """Return the decoder's shape without reading weights.

    It comes from a folder's config.json, a preset, or the configuration. A hub id whose model is also a
    preset (``Qwen/Qwen2.5-7B-Instruct``) uses the preset, so that planning needs no download.

    Raises:
      ConfigError: as `run.assembly.shape_model` does.
    """
    m = config.model
    if m.path is None and m.preset is None and m.vocab_size is None:
        return make_model(config, make_language(config).tokenizer)
    known = None if m.path is None or expand(m.path, "model.path").is_dir() else _preset_of(m.path)
    section = m if known is None else m.model_copy(update={"path": None, "preset": known})
    return shape_model(config, section, 0)  # the tokenizer is the model's own: it fits


def _preset_of(hub_id: str) -> str | None:
    name = hub_id.rpartition("/")[2].lower().replace("llama-3", "llama3")
    return next((preset for preset in PRESETS if name == preset or name.startswith(f"{preset}-")), None)


def spread(config: Config, devices: int) -> list[str]:
    """Return the overrides that make a configuration use this number of devices, by its ``fsdp`` axis.

    The engines' own ones (``rollout.devices``) are among them.

    Raises:
      ConfigError: the hosts or the other mesh axes do not divide the number of devices.
    """
    mesh, hosts = config.mesh, config.hosts.num or 1
    if devices % hosts:
        raise ConfigError(f"--devices {devices}: {hosts} hosts need a multiple of {hosts}, as many on each")
    others = mesh.data * mesh.tensor * mesh.sequence
    learner = devices - hosts * (config.rollout.devices or 0)
    if learner < 1 or mesh.fsdp * others == learner:  # `check_planned` tells of a learner without devices
        return []
    if learner % others:
        what = "it" if learner == devices else f"the {learner} of the learner"
        raise ConfigError(
            f"--devices {devices}: mesh.data={mesh.data} x mesh.tensor={mesh.tensor} x "
            f"mesh.sequence={mesh.sequence} does not divide {what}"
        )
    fsdp = learner // others
    shards, rows = mesh.data * fsdp, micro_rows(config)
    changes = [f"mesh.fsdp={fsdp}"]
    if rows % shards:
        changes.append(f"train.micro_tokens={-(-rows // shards) * shards * config.rollout.max_tokens}")
    return changes


def as_lines(plan: Plan, memory: float | None = None) -> list[str]:
    """Return the plan as a table in plain text.

    Args:
      plan: the plan.
      memory: bytes of a device, for the comparison in the last line.
    """
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    head = f"{plan.name}: {plan.num_params / 1e9:.3g} billion parameters, {mesh}"
    lines = [head, "GiB on the fullest device:"]
    lines += [f"  {item.name:<15}{in_gib(item.size):>9}  {item.phase:<8}{item.note}" for item in plan.items]
    return [*lines, f"  {'at most':<15}{in_gib(plan.total):>9}{_whose(plan)}{_verdict(plan.total, memory)}"]


def as_line(plan: Plan, memory: float | None = None) -> str:
    """Return the plan in one line, with its largest items."""
    largest = sorted(plan.items, key=lambda item: -item.size)[:4]
    parts = ", ".join(f"{item.name} {in_gib(item.size)}" for item in largest)
    at_most = f"{in_gib(plan.total)} GiB a device{_whose(plan)}"
    return f"memory: at most {at_most} ({parts}){_verdict(plan.total, memory)}"


def _whose(plan: Plan) -> str:
    """Name the user of the fullest device, where learner and engine have devices of their own."""
    return f" of the {max(plan.peaks, key=plan.peaks.__getitem__)}" if plan.is_apart else ""


def _verdict(total: int, memory: float | None) -> str:
    if memory is None:
        return ""
    size = f"{memory / GIB:.0f}" if memory >= 10 * GIB else f"{memory / GIB:.3g}"
    share = f"  {total / memory:.0%} of {size} GiB"
    return share + (": does not fit" if total > memory else "")


def in_gib(size: int) -> str:
    """Return a size in GiB, with more digits where it is small."""
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"


def device_memory() -> int | None:
    """Return the bytes that a local device has for arrays; None if it does not report them (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


# ---------------------------------------------------------------------------------------- suggestions


Load = Callable[[Sequence[str]], "Config"]


def explain(
    load: Load,
    devices: int | None = None,
    memory: float | None = None,
    chip: str | None = None,
) -> list[str]:
    """Return a configuration's plan as text, with suggestions if it does not fit.

    Args:
      load: function from overrides to the configuration.
      devices: number of devices to use (`spread`); the default is the size of the configuration's mesh.
      memory: bytes of a device; the default is that of ``chip``.
      chip: a device whose speed is expected, one of `plan.speed.CHIPS`.

    Raises:
      ConfigError: the configuration is invalid, cannot use this number of devices or hosts, the memory is not
        above 0, or the chip is unknown.
    """
    if memory is not None and not memory > 0:
        raise ConfigError(f"--memory-gib {memory / GIB:g}: a device has more than 0 GiB")
    config = load([])
    changes = [] if devices is None else spread(config, devices)
    config = load(changes) if changes else config
    check_planned(config, devices)

    def load_more(more: Sequence[str]) -> Config:
        changed = load([*changes, *more])
        check_planned(changed, devices)
        return changed

    model = find_shape(config)
    plan = compute_plan(config, model)
    if memory is None and chip is not None:
        memory = find_chip(chip).memory
    lines = as_lines(plan, memory)
    lines += whole_lines(config, model)
    if chip is not None:
        lines += speed_lines(config, model, chip)
    if changes:
        lines.insert(1, f"with {' '.join(changes)}, to use {devices} devices")
    if (hosts := config.hosts.num or 1) > 1:
        lines.insert(1, f"for {hosts} hosts, each with an engine of its own")
    if memory is not None and plan.total > memory:
        lines.append("each change, and the peak memory with it:")
        lines += suggest(config, plan, load_more, memory)
    return lines


def suggest(config: Config, plan: Plan, load: Load, memory: float) -> list[str]:
    """Return the changes that make a plan smaller, with the largest saving first; pairs if none is enough.

    Args:
      config: the configuration.
      plan: its plan.
      load: function from further overrides to the configuration. A change that raises ConfigError is left
        out.
      memory: bytes of a device.

    Returns:
      One line for each change that saves 2 % or more, with the number of devices where it takes more of them.
    """
    there, where = count_devices(config), dict[str, str]()

    def peak(changes: list[str]) -> int | None:
        """The peak with some changes; None where they are refused."""
        try:
            changed = load(changes)
            total = compute_plan(changed, find_shape(changed)).total
        except ConfigError:
            return None
        if (needed := count_devices(changed)) > there:
            where[" ".join(changes)] = f" (on {needed} devices)"
        return total

    single = [(total, c) for c in _candidates(config, plan.devices) if (total := peak(c)) is not None]
    useful = [(total, c) for total, c in single if total < 0.98 * plan.total]
    found = useful
    if not any(total <= memory for total, _ in useful):
        pairs = [first + second for (_, first), (_, second) in itertools.combinations(useful, 2)]
        distinct = [c for c in pairs if len({each.partition("=")[0] for each in c}) == len(c)]
        tried = [(total, c) for c in distinct if (total := peak(c)) is not None]
        found = useful + [(total, c) for total, c in tried if total <= memory]
    told = [(total, " ".join(changes)) for total, changes in sorted(found)]
    return [
        f"  {text}{where.get(text, '')}: {in_gib(total)} GiB{', which fits' if total <= memory else ''}"
        for total, text in told
    ]


def _candidates(config: Config, devices: int) -> Iterator[list[str]]:
    model, mesh, rollout, hosts = config.model, config.mesh, config.rollout, config.hosts.num or 1
    yield ["model.remat=full"]
    yield ["model.dtype=bfloat16"]
    yield ["model.dtype=bfloat16", "model.param_dtype=bfloat16"]
    yield ["train.moments=bfloat16"]
    yield ["rollout.release=true"]
    yield [f"train.micro_tokens={rollout.max_tokens * mesh.data * mesh.fsdp}"]
    yield [f"rollout.slots={max(1, count_slots(config, hosts) // 4)}"]
    for shards in (2, 4, 8):
        if rollout.tensor < shards <= (rollout.devices or devices // hosts) // rollout.data:
            yield [f"rollout.tensor={shards}"]
    tokens = max(config.train.micro_tokens, rollout.max_tokens * mesh.data * mesh.fsdp * 2)
    yield [f"mesh.fsdp={mesh.fsdp * 2}", f"train.micro_tokens={tokens}"]
    if not model.lora.rank:
        yield ["model.lora.rank=16"]
    yield [f"model.lora.rank={model.lora.rank or 16}", "model.quantize=int8"]
    yield [f"model.lora.rank={model.lora.rank or 16}", "model.quantize=nf4"]
