"""The whole update of the papers' models, compiled for many devices from shapes alone, at full depth."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from empg_jax.config import Config
from empg_jax.hf.presets import make_preset
from empg_jax.plan.explain import find_shape
from empg_jax.plan.memory import compute_plan
from tests.plan.test_memory import update_bytes

pytestmark = pytest.mark.slow

# Nothing is run, so the code that a device would run need not be good.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ROOT = pathlib.Path(__file__).parents[2]
CASES = {
    "qwen2.5-7b": (dict(fsdp=4, tensor=2), dict(rows=8, length=1024)),
    "qwen2.5-32b": (dict(fsdp=16, tensor=4), dict(rows=32, length=1024)),
    "qwen3-32b": (dict(fsdp=8, tensor=4, sequence=2), dict(rows=16, length=2048)),
}


def find_problems(collectives, model, mesh):
    """Collective operations that move what must stay where it is.

    A device may be sent one matrix of one layer, a chunk of the table, or activations ``[tokens, D]`` of its
    own rows; never logits, and never the weights of several layers.
    """
    depth, tensor = model.hidden_size, mesh["tensor"]
    parts = mesh["fsdp"] * mesh.get("sequence", 1)
    matrix = depth * max(model.intermediate_size, model.num_heads * model.head_dim) // tensor
    entries = {model.vocab_size // n for n in range(1, 513) if model.vocab_size % n == 0} - {depth}
    for name, shape in collectives:
        numbers = math.prod(shape)
        others = {numbers // size for size in shape if size > 1000 and size in entries}
        if others and not others & {depth, depth // parts}:
            yield f"{name} {shape}: logits"
        elif name == "all-gather" and not others and numbers > matrix:
            yield f"{name} {shape}: more than one layer's matrix, which has {matrix} numbers"
        elif numbers > model.vocab_size // tensor * depth:
            yield f"{name} {shape}: more than this device's rows of the embedding"


def test_problems_are_found():
    model, mesh = make_preset("qwen2.5-7b"), dict(fsdp=4, tensor=2)
    innocent = [
        ["all-gather", [3584, 9472]],
        ["all-reduce", [76032, 896]],
        ["all-gather", [1, 12672, 3584]],
        ["all-reduce", [2, 1024, 3584]],
        ["all-reduce", []],
    ]
    guilty = [
        ["all-gather", [2, 1024, 152064]],
        ["all-gather", [2048, 12672]],
        ["all-reduce", [8192, 12672]],
        ["all-gather", [28, 3584, 9472]],
        ["all-gather", [3584, 18944]],
    ]
    assert list(find_problems(innocent, model, mesh)) == []
    assert len(list(find_problems(guilty, model, mesh))) == len(guilty)


def planned_bytes(preset, mesh, rows, length):
    """What the memory plan says that the update takes."""
    rollout = {"max_tokens": length, "tasks_per_update": 1, "group_size": 2 * rows}
    sections = {"mesh": mesh, "rollout": rollout, "train": {"micro_tokens": rows * length}}
    config = Config.model_validate({"model": {"preset": preset, "dtype": "bfloat16"}, **sections})
    return update_bytes(compute_plan(config, find_shape(config)))


@pytest.mark.parametrize(
    "preset",
    [pytest.param(name, marks=[] if name == "qwen3-32b" else pytest.mark.long) for name in CASES],
)
def test_update_splits_weights_and_gathers_one_layer_at_a_time(preset):
    mesh, sizes = CASES[preset]
    request = json.dumps({"preset": preset, "mesh": mesh, **sizes})
    flags = f"--xla_force_host_platform_device_count={math.prod(mesh.values())} {QUICKLY}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compile_update.py"), request],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Involuntary full rematerialization" not in done.stderr
    found = json.loads(done.stdout)
    shards = math.prod(mesh.values())
    assert found["params_total"] / shards <= found["params_each"] < 1.01 * found["params_total"] / shards
    # Weights and both moments, all of them split, and next to nothing else.
    assert 3 * found["params_each"] < found["arguments"] < 3.02 * found["params_each"]
    assert any(name == "all-gather" for name, _ in found["collectives"])
    assert list(find_problems(found["collectives"], make_preset(preset), mesh)) == []
    assert 0.7 < (found["arguments"] + found["temporary"]) / planned_bytes(preset, mesh, **sizes) <= 1.0
