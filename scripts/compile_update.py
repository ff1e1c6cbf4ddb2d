"""Compile the learner's update of a preset from shapes alone, and print what came out as one JSON object.

A program of its own, because the number of fake devices is fixed when JAX starts. It takes its mesh and sizes
as JSON, and changes of the model besides: ``{"preset": "qwen2.5-7b", "mesh": {"fsdp": 8}, "rows": 8,
"length": 1024, "num_layers": 2}``. The compiler counts what stands in a loop once, so flops and bytes are
those of one micro-batch, and of one layer unless ``scan_layers`` is false.
"""

import collections
import json
import math
import re
import sys

import jax
import jax.numpy as jnp

from empg_jax.algorithms import make_algorithm
from empg_jax.hf.presets import make_preset
from empg_jax.learner.batching import BatchShape, make_batch
from empg_jax.learner.state import make_optimizer, state_shapes
from empg_jax.learner.update import make_learner
from empg_jax.parallel.mesh import make_mesh

BYTES = {"bf16": 2, "pred": 1, "u8": 1, "s8": 1}
OPERATIONS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


def place(shapes, shardings):
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def compile_update(preset, mesh, rows, length, **changes):
    mesh = make_mesh(**mesh)
    model = make_preset(preset, dtype=jnp.bfloat16, **changes)
    optimizer, _ = make_optimizer(learning_rate=1e-6, final_learning_rate=1e-7, total_steps=10)
    learner = make_learner(
        model, make_algorithm("grpo", modulation="empg", num_minibatches=1), optimizer, mesh, micro_rows=rows
    )
    batch, _ = make_batch([], BatchShape(2 * rows, 4, length, rows, 2 * rows, 1), seed=(0,))
    shapes = jax.eval_shape(lambda x: x, batch)
    batch = place(shapes, jax.tree.map(lambda leaf: leaf.sharding, jax.eval_shape(learner.put, batch)))
    state = place(state_shapes(model, optimizer), learner.shardings)
    scores = learner.recorded_scores.eval_shape(batch)
    credit = learner.credit.eval_shape(batch, scores)
    index = jax.ShapeDtypeStruct((), jnp.int32)
    lowered = learner.update.lower(state, batch, scores, credit, index, index)
    return state, lowered.compile()


def split_bytes(state):
    """Bytes of the parameters: of all devices together, and of the fullest one."""
    leaves = jax.tree.leaves(state.params)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    each = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return total, each


def count_sent(text):
    """Bytes of the results of every kind of collective operation, on one device."""
    found = collections.Counter()
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({OPERATIONS})(-start)?\(", line):
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                numbers = math.prod(int(size) for size in sizes.split(",") if size)
                found[match[2]] += numbers * BYTES.get(kind, 4)
    return dict(found)


def list_collectives(text):
    """``[operation, shape]`` of every kind of array that a collective operation gives."""
    found = set()
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({OPERATIONS})(-start)?\(", line):
            found |= {(match[2], sizes) for sizes in re.findall(r"\w+\[([\d,]*)\]", match[1])}
    return sorted([name, [int(size) for size in sizes.split(",") if size]] for name, sizes in found)


def main():
    state, compiled = compile_update(**json.loads(sys.argv[1]))
    total, each = split_bytes(state)
    memory = compiled.memory_analysis()
    report = {
        "params_total": total,
        "params_each": each,
        "arguments": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "collectives": list_collectives(compiled.as_text()),
        "sent": count_sent(compiled.as_text()),
        "flops": compiled.cost_analysis()["flops"],
        "bytes": compiled.cost_analysis()["bytes accessed"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
