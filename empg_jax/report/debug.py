"""What an update was made of whose optimizer steps were left out: written beside the run, and read again."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.lib.npyio import NpzFile

from empg_jax.errors import ConfigError
from empg_jax.files import as_json, replacing
from empg_jax.types import BATCH_FIELDS, Batch, Credit, Params, Scores

FOLDER = "debug"  # in the run's folder
KEPT = 5  # dumps of a run: the first one, which shows the cause, and the newest
SHOWN = 12  # lines of a list
STEP_NUMBERS = ("loss", "grad_norm", "approx_kl", "ratio", "nonfinite", "kl_exceeded", "empty")


@jax.jit
def measure_leaves(params: Params) -> dict[str, dict[str, jax.Array]]:
    """Measure every array: the largest finite size of a number, and how many are not finite."""

    def measure(leaf: jax.Array) -> dict[str, jax.Array]:
        is_finite = jnp.isfinite(leaf)
        size = jnp.where(is_finite, jnp.abs(leaf.astype(jnp.float32)), jnp.float32(0))
        return {"largest": size.max(), "not_finite": jnp.sum(jnp.logical_not(is_finite))}

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): measure(leaf) for path, leaf in leaves}


def dump_update(
    run_dir: Path,
    update: int,
    batch: Batch,
    *,
    scores: Scores,
    credit: Credit,
    leaves: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> Path:
    """Write an update for `empg-jax inspect`; return the path.

    Args:
      run_dir: the run's folder; of its dumps the first and the newest stay.
      update: number of the update.
      batch: its batch, on the host.
      scores: of the batch, on the host.
      credit: of the batch, on the host.
      leaves: `measure_leaves` of the parameters after the update.
      steps: metrics of its optimizer steps.
    """
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"bad_batch_{update}.npz"
    arrays = {name: np.asarray(getattr(batch, name)) for name in BATCH_FIELDS}
    for prefix, tree in (("scores", scores), ("credit", credit)):
        for place, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[prefix + re.sub(r"\['(\w+)'\]", r".\1", jax.tree_util.keystr(place))] = np.asarray(leaf)
    numbers = [{name: float(step[name]) for name in STEP_NUMBERS if name in step} for step in steps]
    measured = {name: {key: float(value) for key, value in leaf.items()} for name, leaf in leaves.items()}
    about = {"update": update, "steps": numbers, "leaves": measured}
    # JSON with NaN: only this module reads it.
    with replacing(path) as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    _, *later = sorted(folder.glob("bad_batch_*.npz"), key=lambda each: int(each.stem.rpartition("_")[2]))
    for old in later[: 1 - KEPT]:
        old.unlink()
    return path


def inspect_dump(path: Path) -> dict[str, Any]:
    """Read a dump and find what is not finite.

    Args:
      path: a dump, or the folder of a run, of which the first dump is read.

    Returns:
      ``update``; ``steps``: numbers of each optimizer step; ``not_finite``: array → count and the first
      place; ``leaves``: parameter → its largest number and how many are not finite, largest first;
      ``episodes``: group, return, number of turns, range of advantages and factors.

    Raises:
      ConfigError: there is no dump, or it cannot be read.
    """
    if path.is_dir():
        dumps = list(path.glob(f"{FOLDER}/bad_batch_*.npz"))
        if not dumps and not (path / "config.yaml").is_file():
            raise ConfigError(f"{path} holds no run (no config.yaml)")
        if not dumps:
            raise ConfigError(
                f"{path} has no {FOLDER}/bad_batch_N.npz: no optimizer step of this run was left out"
            )
        path = min(dumps, key=lambda each: int(each.stem.rpartition("_")[2]))
    try:
        with path.open("rb") as stream, NpzFile(stream) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        found = {
            "path": str(path),
            "update": about["update"],
            "steps": about["steps"],
            "not_finite": dict(_find_faults(arrays)),
            "leaves": dict(sorted(about["leaves"].items(), key=lambda item: _badness(item[1]))),
            "episodes": list(_describe_episodes(arrays)),
        }
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no dump of an update (bad_batch_N.npz): {error}") from None
    return found


def _badness(leaf: Mapping[str, float]) -> tuple[bool, float]:
    return leaf["not_finite"] == 0, -leaf["largest"]


def _find_faults(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every array with numbers that are not finite, those of tokens that are not sampled left out."""
    mask = arrays["loss_mask"]
    for name, values in arrays.items():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        wrong = ~np.isfinite(values) & (mask if values.shape == mask.shape else True)
        if not wrong.any():
            continue
        place = [int(each[0]) for each in np.nonzero(np.atleast_1d(wrong))]
        fault: dict[str, Any] = {"count": int(wrong.sum()), "of": int(values.size), "first": place}
        if values.shape == mask.shape:
            row, column = place
            fault["of"] = int(mask.sum())
            fault["episode"] = int(arrays["trajectory_ids"][row, column])
            fault["turn"] = int(arrays["turn_ids"][row, column])
        yield name, fault


def _describe_episodes(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    turns = {key: arrays.get(f"credit.turns.{key}") for key in ("mask", "advantages", "factors")}
    for index in np.flatnonzero(arrays["trajectory_mask"]).tolist():
        episode: dict[str, Any] = {
            "episode": index,
            "group": int(arrays["group_ids"][index]),
            "return": float(arrays["returns"][index]),
        }
        mask = turns["mask"]
        if mask is not None and mask[index].any():
            episode["turns"] = int(mask[index].sum())
            for key in ("advantages", "factors"):
                table = turns[key]
                assert table is not None
                values = table[index][mask[index]]
                episode[key] = [float(values.min()), float(values.max())]
        yield episode


def format_dump(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that tell of a dump."""
    steps = found["steps"]
    yield f"{found['path']}: update {found['update']}, {len(steps)} optimizer steps"
    for number, step in enumerate(steps, start=1):
        marks = {"nonfinite": "left out: not finite", "kl_exceeded": "left out: beyond train.max_kl"}
        marks["empty"] = "left out: no token to train on"
        told = [f"{name} {value:g}" for name, value in step.items() if name not in marks]
        told += [text for name, text in marks.items() if step.get(name)]
        yield f"  step {number}: {', '.join(told)}"
    yield "not finite:"
    faults = [_describe_fault(name, fault) for name, fault in found["not_finite"].items()]
    faults += [
        f"  parameter {name}: {leaf['not_finite']:.0f} numbers"
        for name, leaf in found["leaves"].items()
        if leaf["not_finite"]
    ]
    yield from faults[:SHOWN] or [
        "  nothing in batch, scores, credit and parameters: the loss or its gradient overflowed; look at the "
        "largest parameters, and at train.learning_rate and model.dtype"
    ]
    yield "largest parameters:"
    for name, leaf in list(found["leaves"].items())[:SHOWN]:
        yield f"  {leaf['largest']:.3g}  {name}"
    yield "credit:"
    episodes = found["episodes"]
    for episode in episodes[:SHOWN]:
        ranges = "".join(
            f", {key} {episode[key][0]:.3g} to {episode[key][1]:.3g}"
            for key in ("advantages", "factors")
            if key in episode
        )
        turns = episode.get("turns", 0)
        yield (
            f"  episode {episode['episode']}, group {episode['group']}: return {episode['return']:g}, "
            f"{turns} turns{ranges}"
        )
    if len(episodes) > SHOWN:
        yield f"  and {len(episodes) - SHOWN} more (--json lists all)"


def _describe_fault(name: str, fault: Mapping[str, Any]) -> str:
    where = ", ".join(map(str, fault["first"]))
    owner = f", of episode {fault['episode']}, turn {fault['turn']}" if "episode" in fault else ""
    return f"  {name}: {fault['count']} of {fault['of']} numbers, the first at [{where}]{owner}"


def dump_as_json(found: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an inspection to JSON types; NaN and infinity become null."""
    converted: dict[str, Any] = as_json(dict(found))
    return converted
