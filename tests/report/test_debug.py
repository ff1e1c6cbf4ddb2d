"""Dumps of updates whose steps were left out: what is in them, how many there are, what `inspect` tells."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.report.debug import KEPT, dump_update, measure_leaves
from empg_jax.types import Credit, TurnCredit
from tests.algorithms.batches import make_batch

PARAMS = {"head": jnp.array([[1.0, -5.0]]), "norm": {"scale": jnp.array([1.0, jnp.nan, jnp.inf])}}
STEPS = [
    {"loss": 0.5, "grad_norm": 1.5, "nonfinite": 0.0, "kl_exceeded": 0.0, "tokens": 3.0},
    {"loss": float("nan"), "grad_norm": float("nan"), "nonfinite": 1.0, "kl_exceeded": 0.0},
]


def dump(run, update, *, spoil=False):
    batch, scores, *_ = make_batch()
    batch, scores = jax.device_get((batch, scores))
    mask = np.asarray(batch.loss_mask)
    entropies = np.array(scores.entropies)
    if spoil:
        entropies[tuple(np.argwhere(mask)[2])] = np.nan
    entropies[tuple(np.argwhere(~mask)[0])] = np.inf  # no token of the policy: of no meaning
    n, k = batch.turn_rewards.shape
    table = np.ones((n, k), np.float32)
    turns = TurnCredit(table, table, table, 0 * table, 2 * table, np.ones((n, k), bool))
    credit = Credit(np.zeros(mask.shape, np.float32), mask / mask.sum(), {"x": np.float32(1)}, turns)
    return dump_update(
        run, update, batch, scores=scores.replace(entropies=entropies), credit=credit,
        leaves=jax.device_get(measure_leaves(PARAMS)), steps=STEPS,
    )  # fmt: skip


def inspect(*arguments):
    result = CliRunner().invoke(app, ["inspect", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_what_was_not_finite_is_named_with_its_place_and_owner(tmp_path):
    path = dump(tmp_path, 7, spoil=True)
    code, out, err = inspect(path)
    assert (code, err) == (0, "") and out.startswith(f"{path}: update 7, 2 optimizer steps\n")
    assert "  step 1: loss 0.5, grad_norm 1.5\n" in out
    assert "  step 2: loss nan, grad_norm nan, left out: not finite\n" in out
    with np.load(path) as file:
        mask, owners, turns = file["loss_mask"], file["trajectory_ids"], file["turn_ids"]
    row, column = np.argwhere(mask)[2]
    place = f"the first at [{row}, {column}], of episode {owners[row, column]}, turn {turns[row, column]}"
    assert f"  scores.entropies: 1 of {mask.sum()} numbers, {place}\n" in out
    assert "  parameter ['norm']['scale']: 2 numbers\n" in out and "parameter ['head']" not in out
    largest = out.partition("largest parameters:\n")[2].splitlines()
    assert largest[:2] == ["  1  ['norm']['scale']", "  5  ['head']"]
    assert "  episode 0, group 0: return 1, " in out and "advantages 2 to 2, factors 1 to 1" in out
    report = json.loads(inspect(path, "--json")[1])
    assert report["not_finite"].keys() == {"scores.entropies"} and report["steps"][1]["loss"] is None


def test_the_first_dump_and_the_newest_stay(tmp_path):
    for update in range(3, 13):
        dump(tmp_path, update)
    kept = sorted(int(path.stem.rpartition("_")[2]) for path in (tmp_path / "debug").iterdir())
    assert kept == [3, *range(14 - KEPT, 13)] and len(kept) == KEPT
    code, out, _ = inspect(tmp_path)
    assert code == 0 and "bad_batch_3.npz: update 3" in out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no such file"),
        (b"nonsense", "is no dump of an update (bad_batch_N.npz): File is not a zip file"),
        (b"PK\x03\x04cut", "is no dump of an update"),
    ],
)
def test_what_is_no_dump_is_one_line(tmp_path, content, says):
    path = tmp_path / "bad_batch_1.npz"
    if content is not None:
        path.write_bytes(content)
    code, out, err = inspect(path)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1
    code, _, err = inspect(tmp_path)
    assert code == 2 and f"{tmp_path} holds no run (no config.yaml)" in err
    (tmp_path / "config.yaml").touch()
    code, _, err = inspect(tmp_path)
    assert code == 2 and "no optimizer step of this run was left out" in err
