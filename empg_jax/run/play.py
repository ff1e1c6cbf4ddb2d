"""Episodes of a policy without learning: the path of training up to the batch, and then a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError, writing
from empg_jax.files import try_folder
from empg_jax.rollout.record import describe_episodes
from empg_jax.run.announcing import say_once
from empg_jax.run.process import prepare_jax
from empg_jax.run.rollouts import write_records
from empg_jax.run.sampling import (
    make_pool,
    make_rollout,
    make_sampler,
)
from empg_jax.run.saved import SavedRun, open_new, open_saved
from empg_jax.run.server import closing_sampler
from empg_jax.run.storage import save_trajectories

if TYPE_CHECKING:
    from empg_jax.config import Config


def play_run(path: Path, overrides: list[str], episodes: int, out: Path, say: Callable[[str], None]) -> None:
    """Play training episodes with the newest weights of a run, and write their records.

    Args:
      path: run folder, or a step's folder inside its ``checkpoints``.
      overrides: dotted overrides of the run's configuration.
      episodes: number of episodes, rounded up to whole groups.
      out: the file to write: JSON lines, compressed if it ends in ``.gz``; or, if it ends in ``.npz``, the
        exact tokens, which ``rollout.stored`` trains on.
      say: receives messages for the user.

    Raises:
      CheckpointError: there is no run or no usable checkpoint at the path.
      ConfigError: an argument or override does not fit, or the run is being trained through the server of
        ``rollout.url``.
      PoolError: the environments keep failing.
      RunError: the file could not be written after all.
    """
    _check(episodes, out)
    play(open_saved(path, overrides, warn=say, samples=True), episodes, out, say)


def play_new(config: Config, episodes: int, out: Path, say: Callable[[str], None]) -> None:
    """Play training episodes with the weights that a configuration starts from; otherwise as `play_run`."""
    _check(episodes, out)
    play(open_new(config), episodes, out, say)


def play(saved: SavedRun, episodes: int, out: Path, say: Callable[[str], None]) -> None:
    """Play the first tasks of the training order, as one batch, and write its records."""
    config, step = saved.config, saved.step
    prepare_jax(config)
    engine = make_sampler(config, saved.model, saved.language.tokenizer, saved.base)
    groups = -(-episodes // config.rollout.group_size)
    with closing_sampler(engine), make_pool(config, say_once(say)) as pool:
        rollout = make_rollout(_as_one_batch(config, groups, step), engine, pool, saved.language)
        with rollout:
            rollout.publish(saved.params, step)
            trajectories = rollout.next_batch().trajectories
    with writing(out):
        if out.suffix == ".npz":
            save_trajectories(out, trajectories)
        else:
            write_records(out, describe_episodes(trajectories, None, update=step))
    outcomes = ", ".join(f"{name} {count}" for name, count in sorted(rollout.ledger.outcomes.items()))
    say(f"{len(trajectories)} episodes of {config.env.split} with the weights of update {step}: {outcomes}")


def _as_one_batch(config: Config, groups: int, step: int) -> Config:
    """Make all groups one update's, which takes every group as it comes."""
    rollout = {"tasks_per_update": groups, "filter_groups": False, "publish": "turn"}
    rollout |= {"stored": None, "schedule": None}
    train = {"updates": step + 1, "max_lag": 0}
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update=rollout),
            "train": config.train.model_copy(update=train),
        }
    )


def _check(episodes: int, out: Path) -> None:
    if episodes < 1:
        raise ConfigError(f"--episodes {episodes}: expected at least 1")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: expected a file in a folder that exists")
    with writing(f"--out {out}", ConfigError):
        try_folder(out.parent)
