"""Checkpoints: everything comes back, damage and failures cost the newest only."""

import gc
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from empg_jax.learner.state import TrainState
from empg_jax.run import checkpoint
from empg_jax.run.checkpoint import CheckpointError, Checkpoints
from tests.episodes import Episodes

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_state(value):
    return TrainState(
        params={"w": jnp.full((64, 64), value, jnp.float32), "b": jnp.full(64, value, jnp.bfloat16)},
        opt_state=(jnp.full((64, 64), value + 1, jnp.float32), jnp.int32(value)),
        step=jnp.int32(value),
    )


SHAPES = jax.eval_shape(lambda: make_state(0))
SHARDINGS = jax.tree.map(lambda _: PLACE, SHAPES)


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def open_folder(tmp_path, warnings):
    """Opens the same folder, as often as wanted."""
    opened = []

    def open_folder(keep=3):
        opened.append(Checkpoints(tmp_path / "checkpoints", keep=keep, warn=warnings.append))
        return opened[-1]

    yield open_folder
    for each in opened:
        each.close()


def write(checkpoints, *steps, trajectories=()):
    for step in steps:
        checkpoints.save(step, make_state(step), {"update": step, "record": {"a": 0.1}}, list(trajectories))
    checkpoints.wait()


def test_everything_comes_back(open_folder):
    episodes = Episodes()
    held = [episodes.transcript([(3, 2), (1, 4)], group_id=g, metrics={"score": 0.5}) for g in range(2)]
    write(open_folder(), 4, trajectories=held)
    found = open_folder().restore(SHARDINGS, SHAPES)
    assert found.step == 4 and found.progress == {"update": 4, "record": {"a": 0.1}}
    jax.tree.map(np.testing.assert_array_equal, found.state, make_state(4))
    jax.tree.map(lambda got, want: got.dtype == want.dtype or pytest.fail(), found.state, make_state(4))
    assert len(found.trajectories) == 2
    for got, want in zip(found.trajectories, held, strict=True):
        assert (got.group_id, got.outcome, got.metrics) == (want.group_id, want.outcome, want.metrics)
        for ours, theirs in zip(got.turns, want.turns, strict=True):
            for name in ("prompt_tokens", "response_tokens", "behavior_logprobs", "entropies"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_the_newest_are_kept_and_any_can_be_named(open_folder):
    checkpoints = open_folder(keep=2)
    write(checkpoints, 1, 2, 3)
    assert checkpoints.steps == [2, 3]
    assert checkpoints.restore(SHARDINGS, SHAPES).step == 3
    assert int(checkpoints.restore(SHARDINGS, SHAPES, step=2).state.step) == 2
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        checkpoints.restore(SHARDINGS, SHAPES, step=1)


def test_the_state_may_be_donated_at_once(open_folder):
    checkpoints, state = open_folder(), make_state(7)
    checkpoints.save(7, state, {}, [])
    clear = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    jax.block_until_ready(clear(state))
    checkpoints.wait()
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(SHARDINGS, SHAPES).state, make_state(7))


def test_a_step_may_be_written_again(open_folder):
    checkpoints = open_folder()
    write(checkpoints, 1)
    checkpoints.save(1, make_state(9), {"again": True}, [])
    checkpoints.wait()
    found = checkpoints.restore(SHARDINGS, SHAPES)
    assert found.progress == {"again": True} and int(found.state.step) == 9


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def lose_arrays(folder):
    shutil.rmtree(folder / "state")


def lose_progress(folder):
    shutil.rmtree(folder / "progress")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# Orbax leaves a coroutine behind when it finds a file damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, lose_arrays, lose_progress, empty])
def test_a_damaged_one_is_passed_over(open_folder, tmp_path, warnings, damage):
    write(open_folder(), 1, 2)
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = open_folder()
    found = checkpoints.restore(SHARDINGS, SHAPES)
    assert found.step == 1 and int(found.state.step) == 1
    assert damage is empty or any(line.startswith("checkpoint 2: ") for line in warnings)
    # The run comes to the same step again and replaces it.
    write(checkpoints, 2)
    assert open_folder().restore(SHARDINGS, SHAPES).step == 2
    damage(tmp_path / "checkpoints" / "1")
    damage(tmp_path / "checkpoints" / "2")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*checkpoints \("):
        open_folder().restore(SHARDINGS, SHAPES)
    gc.collect()


def test_what_was_not_finished_does_not_count(open_folder, tmp_path):
    write(open_folder(), 1)
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp")
    checkpoints = open_folder()
    assert checkpoints.steps == [1] and checkpoints.restore(SHARDINGS, SHAPES).step == 1


def test_an_empty_folder_is_named(open_folder):
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .* \(the folder holds none\)"):
        open_folder().restore(SHARDINGS, SHAPES)


def test_the_reference_is_kept_apart(open_folder, tmp_path):
    checkpoints, params = open_folder(), make_state(3).params
    with pytest.raises(CheckpointError, match="reference cannot be read"):
        checkpoints.load_reference(SHARDINGS.params, SHAPES.params)
    checkpoints.save_reference(params)
    jax.tree.map(
        np.testing.assert_array_equal, checkpoints.load_reference(SHARDINGS.params, SHAPES.params), params
    )
    # Inside: a sibling of the folder may be another run's.
    assert (tmp_path / "checkpoints" / "reference").is_dir() and checkpoints.steps == []
    (tmp_path / "checkpoints" / "reference").rename(tmp_path / "reference")  # as older versions left it
    found = open_folder().load_reference(SHARDINGS.params, SHAPES.params)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def threads_and_descriptors():
    gc.collect()
    return set(threading.enumerate()), len(os.listdir("/proc/self/fd"))


def test_a_checkpoint_leaves_no_thread_and_no_descriptor(open_folder):
    checkpoints = open_folder()
    write(checkpoints, 0, 1)  # orbax opens a few descriptors once
    threads, descriptors = threads_and_descriptors()
    for step in range(2, 12):
        write(checkpoints, step)
    # Threads and files of earlier tests may end meanwhile, so what counts is what is new.
    threads_after, descriptors_after = threads_and_descriptors()
    assert threads_after <= threads
    assert descriptors_after <= descriptors


def flip_a_byte(folder):
    """Changes one byte in the middle of the largest file of the state."""
    path = max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def test_a_changed_byte_is_refused_by_its_checksum(open_folder, warnings, monkeypatch):
    checkpoints = open_folder()
    write(checkpoints, 1, 2)
    real = checkpoint.ocp.load_checkpointables

    def load(path, wanted):
        parts = real(path, wanted)
        if path.name == "2":  # what a reader without checksums of its own would return
            weights = parts["state"].params["w"]
            parts["state"].params["w"] = weights.at[3, 4].add(1e-3)
        return parts

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", load)
    assert checkpoints.restore(SHARDINGS, SHAPES).step == 1
    assert "state.params['w'] is damaged: its checksum does not match" in warnings[0]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_byte_on_disk_costs_that_checkpoint_only(open_folder, tmp_path, warnings):
    write(open_folder(), 1, 2)
    flip_a_byte(tmp_path / "checkpoints" / "2")
    assert open_folder().restore(SHARDINGS, SHAPES).step == 1
    assert warnings[0].startswith("checkpoint 2: ")
    gc.collect()


def test_a_step_that_is_written_again_stays_until_the_new_one_is_good(open_folder, monkeypatch):
    checkpoints = open_folder(keep=1)
    write(checkpoints, 1)

    def damaged(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_load", damaged)
        checkpoints.save(1, make_state(9), {}, [])
        with pytest.raises(CheckpointError, match=r"checkpoint 1 could not be written .*usable: \[1\]"):
            checkpoints.wait()
    assert int(checkpoints.restore(SHARDINGS, SHAPES).state.step) == 1
    write(checkpoints, 1)
    assert [path.name for path in checkpoints.directory.iterdir()] == ["1"]


@pytest.mark.parametrize("left", ["2.new", "2.old"])
def test_a_swap_that_was_cut_short_is_finished(open_folder, left):
    checkpoints = open_folder()
    write(checkpoints, 1, 2)
    (checkpoints.directory / "2").rename(checkpoints.directory / left)
    checkpoints.recover()
    assert checkpoints.restore(SHARDINGS, SHAPES).step == 2
    shutil.copytree(checkpoints.directory / "1", checkpoints.directory / left)
    checkpoints.recover()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "2"]


def test_protected_steps_are_kept_beside_the_newest(open_folder):
    checkpoints = open_folder(keep=2)
    for step in range(1, 6):
        checkpoints.save(step, make_state(step), {}, [], protect=[2])
    checkpoints.wait()
    assert checkpoints.steps == [2, 4, 5]


def test_a_state_that_is_not_finite_is_never_written(open_folder):
    checkpoints = open_folder()
    write(checkpoints, 1)
    state = make_state(2)
    state.params["b"] = state.params["b"].at[7].set(jnp.nan)
    with pytest.raises(CheckpointError, match=r"params\['b'\] is not finite; usable: \[1\]"):
        checkpoints.save(2, state, {}, [])
    assert checkpoints.steps == [1]
