"""The memory plan: its arithmetic against the compiler's, every shipped configuration, its words."""

import dataclasses
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from empg_jax.algorithms import make_algorithm
from empg_jax.cli import app
from empg_jax.config import Config, load_config
from empg_jax.errors import ConfigError
from empg_jax.hf.presets import PRESETS
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import make_optimizer, state_shapes
from empg_jax.learner.update import make_learner
from empg_jax.models.attention.cached import SCORES
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.moe import MoeConfig
from empg_jax.parallel.mesh import make_mesh
from empg_jax.plan.explain import GIB, as_line, as_lines, explain, find_shape, spread
from empg_jax.plan.memory import MARGIN, compute_plan
from empg_jax.plan.speed import Chip, compute_speed, find_chip
from empg_jax.plan.whole import whole_lines
from empg_jax.run.assembly import make_batch_shape
from empg_jax.run.sampling import size_engine

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SMALL = DecoderConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=1024,
)
LEARNER = ("weights", "optimizer", "gradients", "activations", "one layer", "logits", "batch")


def make_config(mesh, rows, length, **sections):
    rollout = {"max_tokens": length, "tasks_per_update": 1, "group_size": rows}
    train = {"micro_tokens": rows * length, "num_minibatches": 1} | sections.pop("train", {})
    return Config.model_validate({"mesh": mesh, "rollout": rollout, "train": train, **sections})


def sizes(plan):
    return {item.name: item.size for item in plan.items}


def update_bytes(plan):
    """What the plan says of the update alone."""
    return dataclasses.replace(plan, items=[item for item in plan.items if item.name in LEARNER]).total


def reserved_bytes(model, mesh, shape):
    """What the compiler reserves for the update on one device, arguments included."""
    optimizer, _ = make_optimizer(learning_rate=1.0, final_learning_rate=1.0, total_steps=1)
    learner = make_learner(
        model,
        make_algorithm("grpo"),
        optimizer,
        make_mesh(**mesh),
        micro_rows=shape.micro_rows,
        shares_prefix=shape.shares_prefix,
    )
    batch, _ = make_batch([], shape, seed=(0,))
    batch = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        jax.eval_shape(learner.put, batch),
    )
    state = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        state_shapes(model, optimizer),
        learner.shardings,
    )
    scores = learner.recorded_scores.eval_shape(batch)
    credit, index = learner.credit.eval_shape(batch, scores), jax.ShapeDtypeStruct((), jnp.int32)
    memory = learner.update.lower(state, batch, scores, credit, index, index).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, mesh",
    [
        (dict(), dict(fsdp=4, tensor=2)),
        (dict(vocab_size=2**16), {}),
        (dict(scan_layers=False), dict(fsdp=8)),
        (dict(moe=MoeConfig(64, 4, 256)), dict(fsdp=8)),
        pytest.param(dict(remat="dots"), {}, marks=pytest.mark.long),
        pytest.param(dict(remat="none"), dict(fsdp=2, sequence=2), marks=pytest.mark.long),
    ],
)
def test_the_estimate_is_near_what_the_compiler_reserves(changes, mesh):
    model = dataclasses.replace(SMALL, **changes)
    planned = update_bytes(compute_plan(make_config(mesh, 8, 256), model))
    assert 0.65 < reserved_bytes(model, mesh, BatchShape(8, 4, 256, 8, 8, 1)) / planned <= 1.0


@pytest.mark.slow
def test_rows_with_shared_beginnings_are_estimated_too():
    train = {"micro_tokens": 8 * 256, "num_minibatches": 1, "share_prefix": True}
    config = make_config({}, 8, 256, train=train)
    shape = make_batch_shape(config)
    assert (shape.micro_rows, shape.row_tokens) == (1, 8 * 256)
    planned = update_bytes(compute_plan(config, SMALL))
    assert 0.65 < reserved_bytes(SMALL, {}, shape) / planned <= 1.0


def test_weights_moments_and_cache_are_counted_exactly():
    model = dataclasses.replace(SMALL, tie_embeddings=False, qkv_bias=False)
    layer = 256 * (256 + 2 * 128) + 256 * 256 + 3 * 256 * 1024 + 2 * 256
    count = 4 * layer + 2 * 4096 * 256 + 256
    plan = compute_plan(make_config({}, 8, 256), model)
    found = sizes(plan)
    assert (plan.num_params, found["weights"], found["optimizer"]) == (count, 4 * count, 8 * count)
    assert found["engine weights"] == 2 * 4 * count
    assert found["KV cache"] == (2 * 4 * 4 * 32 * 4) * 8 * 256  # a token's bytes x tokens
    config = make_config({}, 8, 256, train={"micro_tokens": 8 * 256, "moments": "bfloat16"})
    assert sizes(compute_plan(config, model))["optimizer"] == (4 + 2) * count
    split = sizes(compute_plan(make_config(dict(fsdp=4, tensor=2), 8, 256), model))
    assert split["weights"] == pytest.approx(4 * count / 8, rel=0.01)
    assert split["engine weights"] == found["engine weights"]


def test_a_pool_of_pages_is_counted_by_its_tokens():
    config = make_config({}, 8, 256)
    for kv_tokens, counted in ((520, 512), (None, 8 * 256)):
        rollout = config.rollout.model_copy(update={"page_tokens": 16, "kv_tokens": kv_tokens})
        plan = compute_plan(config.model_copy(update={"rollout": rollout}), SMALL)
        (item,) = (item for item in plan.items if item.name == "KV cache")
        assert item.size == (2 * 4 * 4 * 32 * 4) * counted and f"{counted} tokens in pages" in item.note


def test_a_growing_cache_is_beside_the_one_before():
    def growth(**rollout):
        config = make_config({}, 8, 512)
        rollout = config.rollout.model_copy(update=rollout)
        return sizes(compute_plan(config.model_copy(update={"rollout": rollout}), SMALL)).get("growth")

    per_token = 2 * 4 * 4 * 32 * 4
    buckets = size_engine(make_config({}, 8, 512)).cache_buckets
    steps = [old + new for old, new in itertools.pairwise(buckets)]
    assert growth() == (max(steps) - 512) * 8 * per_token > 0
    assert growth(max_tokens=128) is None and growth(page_tokens=16) is None


def test_new_weights_are_placed_beside_one_piece():
    def placing(mesh, **sections):
        config = make_config(mesh, 8, 256, **sections)
        return sizes(compute_plan(config, find_shape(config)))["placing"]

    model = {"preset": "qwen2.5-7b", "dtype": "bfloat16"}
    layer = 233e6  # numbers
    alone, split = (placing(mesh, model=model) for mesh in ({}, dict(fsdp=8)))
    assert alone - split == pytest.approx(4 * layer * 7 / 8, rel=0.01)  # the float32 original of the piece
    assert 2 * 2 * layer < split < 4 * 2 * layer  # not the whole of 15 GB


def test_prefills_are_planned_with_the_rows_that_the_engine_has():
    def sampling(*changes):
        config = load_config("household_qwen2.5_7b", changes)
        return sizes(compute_plan(config, find_shape(config)))["sampling"]

    # Episodes that take each turn together are prefilled in all 128 slots at once, half of them on a device.
    together = sampling("rollout.deterministic=true", "train.max_lag=0")
    scores = MARGIN * 2 * 4 * SCORES  # of a block of queries, whatever the rows
    assert together - scores > 5 * (sampling() - scores) and together > 64 * 1024 * 3584 * 4


def test_hosts_share_the_slots():
    keys = {"num": 2, "index": 0, "coordinator": "node0:99"}
    alone, shared = (make_config({}, 8, 256, **sections) for sections in ({}, {"hosts": keys}))
    whole, half = (sizes(compute_plan(config, SMALL))["KV cache"] for config in (alone, shared))
    assert whole == 2 * half == 2 * sizes(compute_plan(alone, SMALL, num_hosts=2))["KV cache"]
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)
    assert [compute_speed(config, SMALL, chip).slots for config in (alone, shared)] == [8, 4]


def test_devices_of_the_engine_alone_are_not_the_learners():
    def plan(**rollout):
        return compute_plan(*_seven(dict(fsdp=4), dict(tensor=4, slots=40, **rollout)))

    shared, apart = plan(), plan(devices=4)
    assert sizes(apart) == sizes(shared) and list(shared.peaks) == ["both"]
    assert apart.total == apart.peaks["learner"] == update_bytes(shared)
    engine = {name: size for name, size in sizes(shared).items() if name not in LEARNER}
    assert {"placing", "growth", "sampling"} < engine.keys()
    once = max(engine.pop(name) for name in ("placing", "growth", "sampling"))  # never at the same time
    assert apart.peaks["engine"] == sum(engine.values()) + once
    assert " of the learner (optimizer " in as_line(apart) and " of the learner" not in as_line(shared)
    assert as_lines(apart)[-1].endswith(" of the learner")


def test_adapters_freeze_and_quantize_the_rest():
    sections = {"model": {"preset": "qwen2.5-7b", "dtype": "bfloat16", "lora": {"rank": 16}}}
    plain = make_config({}, 8, 256, **sections, algorithm={"kl_coef": 0.1})
    sections["model"] |= {"quantize": "nf4"}
    packed = make_config({}, 8, 256, **sections, algorithm={"kl_coef": 0.1})
    one, other = (sizes(compute_plan(config, find_shape(config))) for config in (plain, packed))
    assert "reference" not in one  # the frozen weights are the reference
    assert one["adapters"] == other["adapters"] < one["frozen weights"] / 50
    assert one["optimizer"] == 2 * one["adapters"]
    assert other["frozen weights"] < 0.4 * one["frozen weights"]
    # The engine holds what is not quantized in the type that it computes in, but for the scales of 57 norms.
    assert 2 * one["engine base"] - one["frozen weights"] == 57 * 3584 * 4
    tables = 2 * 152064 * 3584
    assert other["frozen weights"] - other["engine base"] == pytest.approx(2 * tables, rel=0.01)


def test_less_is_kept_when_more_is_computed_again():
    kept = [
        sizes(compute_plan(make_config({}, 8, 256), dataclasses.replace(SMALL, remat=remat)))["activations"]
        for remat in ("full", "dots", "none")
    ]
    assert kept[0] * 3 < kept[1] and kept[1] * 1.5 < kept[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_has_a_plan(path):
    config = load_config(path)
    plan = compute_plan(config, find_shape(config))
    assert plan.total > 0 and plan.num_params > 0
    assert {"activations", "logits", "optimizer"} <= sizes(plan).keys()
    # Where a server samples, there is no engine here.
    assert ("KV cache" in sizes(plan)) == (config.rollout.engine == "builtin")
    devices = config.rollout.data * config.rollout.tensor
    assert devices <= max(8, plan.devices)


def test_configs_for_a_node_and_for_eight_fit():
    for name in ("household_qwen2.5_7b", "household_qwen2.5_32b"):
        config = load_config(name)
        assert compute_plan(config, find_shape(config)).total < 80 * GIB


def test_a_further_epoch_deals_the_batch_again():
    once, twice = (
        sizes(compute_plan(make_config({}, 8, 256, train={"epochs": epochs}), SMALL)) for epochs in (1, 2)
    )
    assert twice.pop("batch again") == once["batch"] and twice == once


@pytest.mark.parametrize(
    ("name", "memory", "changes"),
    [
        ("household_qwen2.5_0.5b", 24, []),
        ("household_qwen2.5_1.5b_lora", 80, []),
        ("household_qwen2.5_1.5b_lora", 24, ["rollout.slots=32", "train.micro_tokens=6144"]),
        ("household_smollm2", 8, []),
    ],
)
def test_configs_for_one_gpu_fit(name, memory, changes):
    config = load_config(name, changes)
    plan = compute_plan(config, find_shape(config))
    assert plan.devices == 1 and 0.3 < plan.total / (memory * GIB) < 0.9
    top = (CONFIGS[0].parent / f"{name}.yaml").read_text()
    assert " ".join(changes) in top  # what the file says to override


@pytest.mark.parametrize(
    "path, preset",
    [("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("meta-llama/Llama-3.2-1B", "llama3.2-1b")],
)
def test_known_hub_ids_need_no_hub(path, preset):
    shape = find_shape(make_config({}, 8, 256, model={"path": path}))
    assert shape.num_layers == PRESETS[preset]["num_layers"]
    assert shape.hidden_size == PRESETS[preset]["hidden_size"]


def test_a_plan_is_spread_over_devices_by_fsdp():
    config = make_config(dict(tensor=2), 3, 256)
    assert spread(config, 2) == []
    assert spread(config, 8) == ["mesh.fsdp=4", "train.micro_tokens=1024"]
    with pytest.raises(ConfigError, match=r"--devices 7: mesh.data=1 x mesh.tensor=2 .* does not divide it"):
        spread(config, 7)


@pytest.mark.parametrize(
    "mesh, rollout, said",
    [
        ({}, {}, []),
        (
            dict(sequence=8),
            {},
            ["mesh.sequence=8 does not divide the 28 heads: keys and values are gathered"],
        ),
        (
            dict(tensor=8),
            {},
            ["tensor=8 does not divide key/value heads 4: ", r"heads 28: \d+ MiB more"],
        ),
        (dict(fsdp=5), {}, [r"mesh.fsdp=5 does not divide hidden size 3584: \d{5} MiB more"]),
        ({}, dict(tensor=7), [r"tensor=7 does not divide 4 key/value heads: each is kept 7 times.* 1/1 of"]),
        (
            {},
            dict(tensor=8),
            ["tensor=8 does not divide the 28 heads: every device holds the whole KV cache"],
        ),
    ],
)
def test_what_is_not_split_is_said_with_its_cost(mesh, rollout, said):
    lines = whole_lines(*_seven(mesh, rollout))
    assert len(lines) == len(said)
    for line, pattern in zip(lines, said, strict=True):
        assert re.search(pattern, line), line


def test_frozen_weights_that_are_not_split_are_said_too():
    def lines(**changes):
        config = make_config(dict(tensor=8), 40, 256, model={"preset": "qwen2.5-7b", **changes})
        found = (line.rpartition(": ") for line in whole_lines(config, find_shape(config)))
        return {what: int(size.split()[0]) for what, _, size in found}

    whole, frozen = lines(), lines(lora={"rank": 16})
    assert frozen.keys() == whole.keys() and len(whole) == 2
    for what, size in whole.items():
        assert frozen[what] == pytest.approx(size / 3, rel=0.02)  # without moments, with adapters
    packed = lines(lora={"rank": 16}, quantize="nf4")
    assert packed.keys() == whole.keys() and max(packed.values()) < 0.2 * max(frozen.values())


def _seven(mesh, rollout):
    sections = {"mesh": mesh, "model": {"preset": "qwen2.5-7b"}, "train": {"micro_tokens": 40 * 256}}
    sizes = {"max_tokens": 256, "tasks_per_update": 1, "group_size": 40, **rollout}
    config = Config.model_validate({**sections, "rollout": sizes})
    return config, find_shape(config)


def test_weights_are_split_over_fsdp_and_sequence():
    split = [_seven(mesh, {}) for mesh in (dict(fsdp=8), dict(fsdp=2, sequence=4))]
    one, other = (sizes(compute_plan(*each)) for each in split)
    assert one["weights"] == other["weights"] and one["optimizer"] == other["optimizer"]


@pytest.mark.slow
def test_pairs_of_changes_are_tried_where_no_single_one_is_enough():
    def load(changes):
        return load_config("household_qwen2.5_7b", ["mesh.fsdp=1", "rollout.tensor=1", *changes])

    lines = explain(load, memory=60 * GIB)
    fitting = [line for line in lines if line.endswith("which fits")]
    assert fitting and all(
        len({c.partition("=")[0] for c in line.split(":")[0].split()}) > 2 for line in fitting
    )


def test_what_does_not_fit_is_said_with_what_would():
    def load(changes):
        return load_config("household_qwen2.5_7b", ["mesh.fsdp=1", "rollout.tensor=1", *changes])

    text = "\n".join(explain(load, memory=80 * GIB))
    assert "of 80 GiB: does not fit" in text
    suggestions = text.partition("each change, and the peak memory with it:\n")[2].splitlines()
    assert any(line.startswith("  model.lora.rank=16 model.quantize=nf4: ") for line in suggestions)
    for change in ("rollout.release=true", "train.moments=bfloat16"):
        assert any(line.startswith(f"  {change}: ") for line in suggestions)
    needed = [float(line.rpartition(": ")[2].split()[0]) for line in suggestions]
    assert needed == sorted(needed) and len(needed) > 4
    config = load([])
    line = as_line(compute_plan(config, find_shape(config)), 80 * GIB)
    assert "\n" not in line and "optimizer" in line and line.endswith("does not fit")


def test_one_device_computes_the_logits_of_some_tokens_at_a_time():
    lengths = "rollout.max_tokens=2048 rollout.max_response_tokens=256 train.micro_tokens=4096"
    model = "model.preset=qwen2.5-0.5b model.lora.rank=16 rollout.slots=8 rollout.prefill_buckets=null"
    arguments = ["plan", "quickstart", *lengths.split(), *model.split(), "--memory-gib", "8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "does not fit" not in result.stdout and "% of 8 GiB" in result.stdout


def test_more_devices_are_proposed_only_where_their_number_is_free():
    arguments = ["plan", "household_qwen2.5_7b", "--memory-gib", "34"]
    free, fixed = (CliRunner().invoke(app, [*arguments, *more]).stdout for more in ([], ["--devices", "8"]))
    assert "\n  mesh.fsdp=16 train.micro_tokens=65536 (on 16 devices): 29.00 GiB, which fits\n" in free
    assert "mesh.fsdp=16" not in fixed and "\n  rollout.release=true: 29.04 GiB, which fits\n" in fixed


def test_the_command_prints_the_times_to_expect():
    result = CliRunner().invoke(app, ["plan", "household_qwen2.5_7b", "--chip", "h100"])
    assert result.exit_code == 0, result.stderr
    assert "not a measurement (989 TFLOP/s in bfloat16, 3350 GB/s" in result.stdout
    assert "of 75 GiB" in result.stdout
    told = [
        plan("--chip", chip, *more).stdout for chip, *more in (["b200", "model.dtype=bfloat16"], ["a100"])
    ]
    assert "(2250 TFLOP/s in bfloat16, " in told[0] and "(19.5 TFLOP/s in float32, " in told[1]
    refused = CliRunner().invoke(app, ["plan", "quickstart", "--chip", "abacus"])
    assert refused.exit_code == 2 and "choose one of a100, h100, h200, b200, v5e, v5p, v6e" in refused.stderr


def test_expected_times_follow_from_the_peaks():
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)
    config, model = _seven(dict(fsdp=8), {})
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    speed = compute_speed(config, model, chip)
    weights = 7.07e9  # without the input embedding
    tokens = 40 * 256
    attention = 4 * 28 * 28 * 128 * 128
    assert speed.compute == pytest.approx(4 * tokens * (2 * weights + attention) / 8 / 100e12, rel=0.01)
    assert speed.exchange == pytest.approx((3 * 2 + 4) * weights * 7 / 8 / 1e11, rel=0.01)
    cache = 40 * 128 * 2 * 28 * 4 * 128 * 2
    assert speed.step == pytest.approx((2 * weights + cache) / 1e12, rel=0.01)
    assert speed.decode_rate == pytest.approx(40 / speed.step)
    # Over 7 devices each of the 4 key/value heads is kept 7 times; 3 devices keep all of them.
    for tensor, heads in ((7, 4), (3, 4), (2, 2)):
        config, _ = _seven(dict(fsdp=8), {"tensor": tensor})
        states = 40 * 3584 * 2 * (2 * 28 + 1)  # added up: scattered and gathered
        step = (2 * weights / tensor + cache * heads / 4) / 1e12 + 2 * states * (1 - 1 / tensor) / 1e11
        assert compute_speed(config, model, chip).step == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize(
    "chip, rates",  # null, highest, high, default
    [("h100", (67, 67, 494.5, 494.5)), ("v5e", (197 / 6, 197 / 6, 197 / 3, 197))],
)
def test_float32_is_slower_than_bfloat16(chip, rates):
    chip = find_chip(chip)
    config, model = _seven(dict(fsdp=8), {})
    compute = {}
    for precision, rate in zip((None, "highest", "high", "default"), rates, strict=True):
        asked = config.model.model_copy(update={"matmul_precision": precision})
        speed = compute_speed(config.model_copy(update={"model": asked}), model, chip)
        compute[precision] = speed.compute
        assert chip.rate("float32", precision) == pytest.approx(1e12 * rate)
    narrow = compute_speed(config, dataclasses.replace(model, dtype=jnp.bfloat16), chip).compute
    for precision, rate in zip(compute, rates, strict=True):
        assert compute[precision] / narrow == pytest.approx(chip.flops / 1e12 / rate)


def test_what_is_kept_is_not_computed_again_but_for_the_logits():
    config, model = _seven(dict(fsdp=8), {})
    full, dots = (
        compute_speed(config, dataclasses.replace(model, remat=remat), find_chip("h100")).compute
        for remat in ("full", "dots")
    )
    head, rest = model.vocab_size * model.hidden_size, 7.07e9
    assert dots / full == pytest.approx((3 * rest + head) / (4 * rest), rel=0.01)


def test_a_pool_keeps_as_many_slots_busy_as_it_holds():
    """Of 40 slots of 256 tokens, half of which are live, 1,280 tokens hold ten."""
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)
    config, model = _seven(dict(fsdp=8), {"page_tokens": 16, "kv_tokens": 1280})
    model = dataclasses.replace(model, dtype=jnp.bfloat16)
    speed = compute_speed(config, model, chip)
    assert speed.step == pytest.approx((2 * 7.07e9 + 10 * 128 * 2 * 28 * 4 * 128 * 2) / 1e12, rel=0.01)
    assert (speed.busy, speed.decode_rate) == (10, pytest.approx(10 / speed.step))
    pool = ["rollout.page_tokens=16", "rollout.kv_tokens=1280"]
    told = plan(*pool, "--chip", "v5e").stdout
    assert "for a step of 10 busy slots of 128 (rollout.kv_tokens=1280)" in told


@pytest.mark.parametrize(
    "mesh, numbers",
    [
        (dict(fsdp=8), 0),
        # Per token: 5 sums of the states in each of 28 layers, one at either end; of 2 devices.
        (dict(fsdp=4, tensor=2), (5 * 28 + 2) * 3584 * 2 / 2 / 4),
        # 28 + 4 heads come and go in 3 passes of each layer; 3 of 4 parts leave the device.
        (dict(fsdp=2, sequence=4), 3 * 28 * 2 * (28 + 4) * 128 * 3 / 4 / 8),
        # 8 devices do not divide 28 heads: each sends its part of 4 key/value heads to the 7 others.
        (dict(sequence=8), 3 * 28 * 2 * 4 * 128 * 7 / 8),
    ],
)
def test_activations_are_exchanged_over_tensor_and_sequence(mesh, numbers):
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)
    config, model = _seven(mesh, {})
    speed = compute_speed(config, dataclasses.replace(model, dtype=jnp.bfloat16), chip)
    assert speed.waits == pytest.approx(40 * 256 * 2 * numbers / 1e11)
    assert 40 * 256 / speed.update_rate == pytest.approx(max(speed.compute, speed.exchange) + speed.waits)


def test_gpus_of_several_hosts_are_joined_by_their_network():
    """A ring over hosts leaves a host by the cards of all its devices there: of four, or of one."""
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9, network=1e10)

    def exchange(chip=chip, **mesh):
        config, model = _seven(mesh, {})
        config = config.model_copy(update={"hosts": config.hosts.model_copy(update={"num": 2})})
        return compute_speed(config, dataclasses.replace(model, dtype=jnp.bfloat16), chip).exchange

    inside, weights = exchange(fsdp=4, data=2, chip=dataclasses.replace(chip, network=None)), 7.07e9
    copies = 2 * 4 * weights / 4 / 2
    assert exchange(fsdp=4, data=2) == pytest.approx(inside + copies * (1 / 1e10 - 1 / 1e11), rel=0.01)
    assert exchange(fsdp=8) == pytest.approx(10 * weights * 7 / 8 / 4e10, rel=0.01)
    hosts = ["--devices", "4", "--hosts", "2", "--chip"]
    assert "links 450 GB/s, 50 GB/s (400 Gb/s) a device between hosts" in plan(*hosts, "h100").stdout
    assert "between hosts" not in plan(*hosts, "v5e").stdout


def test_all_experts_are_exchanged_and_those_that_slots_visit_are_read():
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)
    sections = {"model": {"preset": "qwen3-30b-a3b", "dtype": "bfloat16"}}

    def speed(rows):
        config = make_config(dict(fsdp=8), rows, 256, **sections)
        return compute_speed(config, find_shape(config), chip)

    experts, others = 48 * 128 * 3 * 2048 * 768, 1.23e9
    visited = others + experts / 16
    attention = 2 * 48 * 32 * 128 * 256
    compute = 4 * 128 * 256 * (2 * visited + attention) / 8 / 100e12
    assert speed(128).compute == pytest.approx(compute, rel=0.01)
    assert speed(128).exchange == pytest.approx((3 * 2 + 4) * (experts + others) * 7 / 8 / 1e11, rel=0.01)
    token = 2 * 48 * 4 * 128 * 2
    for rows, share in ((128, 1), (8, 1 / 2)):  # 8 slots visit at most 64 of 128 experts
        step = (2 * (others + share * experts) + rows * 128 * token) / 1e12
        assert speed(rows).step == pytest.approx(step, rel=0.01)


def test_frozen_weights_cost_less_and_quantized_ones_fewer_bytes():
    chip = Chip(flops=100e12, bandwidth=1e12, link=1e11, memory=80e9)

    def speed(**changes):
        sections = {"model": {"preset": "qwen2.5-7b", "dtype": "bfloat16", **changes}}
        config = make_config(dict(fsdp=8), 40, 256, **sections)
        return compute_speed(config, find_shape(config), chip)

    whole, frozen = speed(), speed(lora={"rank": 16})
    packed = speed(lora={"rank": 16}, quantize="nf4")
    assert frozen.compute == packed.compute == pytest.approx(3 / 4 * whole.compute, rel=0.02)
    assert frozen.exchange == pytest.approx(3 * 2 / 10 * whole.exchange)
    assert packed.exchange < 0.4 * frozen.exchange
    assert frozen.step == whole.step and packed.step < 0.5 * whole.step


def test_the_command_prints_the_plan():
    arguments = ["plan", "quickstart", "model.num_layers=4", "--devices", "8", "--memory-gib", "16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "with mesh.fsdp=8 train.micro_tokens=2048, to use 8 devices" in result.stdout
    assert "4 layers, remat=full" in result.stdout and "of 16 GiB" in result.stdout
    refused = CliRunner().invoke(app, ["plan", "quickstart", "mesh.tensor=4", "--devices", "6"])
    assert refused.exit_code == 2 and "does not divide it" in refused.stderr


def plan(*arguments):
    return CliRunner().invoke(app, ["plan", "quickstart", *arguments])


def test_the_hosts_of_a_plan_have_an_engine_each():
    """128 episodes at a time: 32 slots on each of 4 hosts, and a step of theirs takes less time."""
    found = {hosts: plan("--devices", "4", "--hosts", hosts, "--chip", "v5e").stdout for hosts in ("1", "4")}
    slots = {
        hosts: re.search(r"decode .* tokens/s (on .* hosts?): .* of (\d+) slots", text)
        for hosts, text in found.items()
    }
    assert slots["1"].groups() == ("on one host", "128")
    assert slots["4"].groups() == ("on each of 4 hosts", "32")
    assert "for 4 hosts, each with an engine of its own" in found["4"] and "hosts" not in found["1"]
    assert "32 slots of 256 tokens" in found["4"]
    keys = ["hosts.num=4", "hosts.index=0", "hosts.coordinator=node0:8476"]
    assert plan(*keys, "--devices", "4", "--chip", "v5e").stdout == found["4"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["rollout.data=2", "rollout.tensor=2", "--devices", "2"],
            "rollout.data=2 x rollout.tensor=2 needs 4 devices, but 2 devices are there (--devices 2)",
        ),
        (
            ["rollout.tensor=4", "--devices", "8", "--hosts", "4"],
            "rollout.tensor=4 needs 4 devices, but 2 devices are on each host (--devices 8)",
        ),
        (
            ["rollout.devices=2", "--devices", "2"],
            "rollout.devices=2 leaves the learner none of the 2 devices",
        ),
        (["--devices", "6", "--hosts", "4"], "--devices 6: 4 hosts need a multiple of 4, as many on each"),
        (
            ["mesh.data=3", "--hosts", "2"],
            "mesh.data=3 needs 3 devices, but 2 hosts with 2 each for the learner",
        ),
        (
            ["--hosts", "3", "--devices", "3"],
            "rollout.tasks_per_update=16 groups cannot be shared by 3 hosts",
        ),
        (["rollout.data=3"], "128 slots (rollout.slots) do not split over rollout.data=3 devices"),
        (["--memory-gib", "0"], "--memory-gib 0: a device has more than 0 GiB"),
        (["--memory-gib", "-1"], "--memory-gib -1: a device has more than 0 GiB"),
    ],
)
def test_what_training_would_refuse_is_refused_by_the_plan(arguments, told):
    refused = plan(*arguments)
    assert refused.exit_code == 2 and told in refused.stderr and refused.stdout == ""


def test_devices_of_the_engine_alone_are_among_those_of_the_plan():
    done = plan("rollout.devices=2", "--devices", "4", "--hosts", "1")
    assert done.exit_code == 0, done.stderr
    assert "with mesh.fsdp=2 train.micro_tokens=1024, to use 4 devices" in done.stdout


def test_a_small_memory_is_told_with_its_digits():
    assert "39% of 0.25 GiB" in plan("--memory-gib", "0.25").stdout


def test_another_program_has_no_rate_of_decoding_in_a_plan():
    server = ["rollout.engine=openai", "rollout.url=http://127.0.0.1:8000"]
    done = plan(*server, "--chip", "v5e")
    assert done.exit_code == 0 and "tokens/s: " in done.stdout
    assert done.stdout.endswith("  decode  unknown: rollout.engine=openai samples elsewhere\n")
