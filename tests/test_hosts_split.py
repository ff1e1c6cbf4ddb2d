"""A run whose weights are split over two hosts: what one process reads of it, and how damage is found."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from empg_jax.hf.load import load_hf
from tests import hosts, runs

pytestmark = pytest.mark.slow

SPLIT = [*hosts.BOTH, "mesh.data=1", "mesh.fsdp=2", "model.num_layers=2", "train.updates=2"]
# Notes for each publication of weights what lies on the device beside what was there before: the replica so
# far, and the piece that is gathered.
WATCHED = hosts.START.replace(
    "main()\n",
    """
import json, math, jax
from empg_jax.engine import weights
from empg_jax.engine.engine import Engine
place, place_piece, beside = Engine.place, weights.place_piece, []
def live():
    sizes = [(leaf.dtype.itemsize, leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.live_arrays()]
    return sum(size * math.prod(shape) for size, shape in sizes)
def watch(self, params):
    before, pieces = live(), []
    def piece(params, **where):
        part = place_piece(params, **where)
        pieces.append((live(), sum(leaf.nbytes for leaf in jax.tree.leaves(params))))
        return part
    weights.place_piece = piece
    placed = place(self, params)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(placed))
    beside.append([kept, [(there - before, size) for there, size in pieces]])
    with open(os.environ["PIECES"], "w") as file:
        json.dump(beside, file)
    return placed
Engine.place = watch
main()
""",
    1,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run that two hosts trained, and beside it what the second one noted of its weights."""
    folder = tmp_path_factory.mktemp("split")
    os.environ["PIECES"] = str(folder / "pieces.json")
    try:
        hosts.succeed(*hosts.start_both(runs.command(folder / "run", *SPLIT), code=WATCHED))
    finally:
        del os.environ["PIECES"]
    return folder / "run"


def test_one_process_exports_what_two_wrote(run, tmp_path):
    ((code, err),) = hosts.finish(hosts.start(["export", run, "--out", tmp_path / "model"]))
    assert code == 0, err
    assert "the run's mesh has 2 devices, and here are 1: mesh.fsdp=1" in err
    state = runs.restored(run).state  # split over two devices of one process
    _, exported = load_hf(tmp_path / "model")
    assert len(state.params["layers"]["q_proj"]["kernel"].sharding.device_set) == 2
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(exported))


def test_one_process_evaluates_what_two_wrote(run, tmp_path):
    command = ["eval", run, "eval.tasks=4", "--out", tmp_path / "eval"]
    process = hosts.start(command)
    out, err = process.communicate(timeout=hosts.PATIENCE)
    assert process.returncode == 0, err
    found, summary = json.loads(out), json.loads((run / "summary.json").read_text())
    assert found["eval_success"] == summary["eval_success_after"] and found["step"] == 2


def test_weights_come_layer_by_layer(run):
    """Beside the old weights there is never more than one replica and one gathered piece."""
    published = json.loads((run.parent / "pieces.json").read_text())
    assert published
    for kept, pieces in published:
        assert len(pieces) == 5  # embedding, norm, head, two layers
        layer = pieces[-1][1]
        assert layer < kept / 2
        assert max(beside for beside, _ in pieces) <= kept + layer + 1024, (kept, layer, pieces)


@pytest.mark.parametrize("num", [pytest.param(1, marks=pytest.mark.long), 2])
def test_damage_to_split_weights_is_found(run, tmp_path, num):
    """Weights of the newest checkpoint are not those that were saved; a file of the one before is damaged."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    flip_a_byte(copy / "checkpoints" / "1")
    code = hosts.START.replace("main()\n", f"{CHANGED}\nmain()\n", 1)
    command = ["train", "--resume", copy, "train.updates=3"]
    if num == 1:
        processes = [hosts.start(command, devices=2, code=code)]
    else:
        processes = hosts.start_both(command, code=code)
    for code, err in hosts.finish(*processes):
        assert code == 0, err
        assert "checkpoint 2: CheckpointError: state.params['layers']['q_proj']['kernel'] is damaged" in err
        assert "checkpoint 1: " in err
    hosts.check_consumed(copy, 3)


def test_a_second_write_is_read_back_by_parts(tmp_path):
    """Each host reads its own half of the state, and no copy of it whole."""
    table = tmp_path / "chats.jsonl"
    chat = {"prompt": "look", "completion": "go north"}
    table.write_text(f"{json.dumps(chat)}\n" * 16)
    code = hosts.START.replace("main()\n", f"{READ_BACK}\nmain()\n", 1)
    warm_start = ["sft.updates=3", f"sft.data={table}", "checkpoint.every=1", "train.updates=0"]
    processes = hosts.start_both(
        runs.command(tmp_path / "run", *SPLIT, *warm_start), code=code.replace("NOTES", str(tmp_path))
    )
    hosts.succeed(*processes)
    notes = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert len(notes) == 2
    for held, whole in notes:
        assert held < 0.6 * whole


def flip_a_byte(folder):
    """Changes one byte in the middle of the largest file of the state."""
    path = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


# The reader of this process returns one number otherwise than the file has it.
CHANGED = """
from empg_jax.run import checkpoint
real = checkpoint.ocp.load_checkpointables
def load(path, wanted):
    parts = real(path, wanted)
    if path.name == "2" and "state" in wanted:
        import jax
        kernel = parts["state"].params["layers"]["q_proj"]["kernel"]
        parts["state"].params["layers"]["q_proj"]["kernel"] = kernel.at[0, 3, 1].add(1e-3)
    return parts
checkpoint.ocp.load_checkpointables = load
"""

# Notes of the step that was written a second time what this process holds of its state, and its whole size.
READ_BACK = """
from empg_jax.run import checkpoint
real = checkpoint.ocp.load_checkpointables
def load(path, wanted):
    import jax, json
    parts = real(path, wanted)
    if "state" in wanted:
        leaves = jax.tree.leaves(parts["state"])
        held = [leaf.addressable_shards if isinstance(leaf, jax.Array) else [None] for leaf in leaves]
        bytes_held = sum(
            leaf.nbytes if shard is None else shard.data.nbytes
            for leaf, shards in zip(leaves, held, strict=True) for shard in shards
        )
        with open(f"NOTES/{jax.process_index()}.json", "w") as file:
            json.dump([bytes_held, sum(leaf.nbytes for leaf in leaves)], file)
    return parts
checkpoint.ocp.load_checkpointables = load
"""
