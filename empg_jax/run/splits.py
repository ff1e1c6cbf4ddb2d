"""The splits of an environment that a run names: a check that they exist, and the order of their tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError
from empg_jax.parallel.hosts import ALONE, Hosts
from empg_jax.rollout.adaptive import AdaptiveOrder
from empg_jax.rollout.order import Order, TaskOrder
from empg_jax.run.environment import eval_panels
from empg_jax.workers.pool import EnvPool

if TYPE_CHECKING:
    from empg_jax.config import Config


def check_splits(config: Config, pool: EnvPool, hosts: Hosts = ALONE) -> None:
    """Check every split that a run will take tasks from, before anything is compiled.

    Raises:
      ConfigError: the environment has no such split, no tasks in it, or too few for the hosts.
    """
    if config.sft.updates and config.sft.data is None:
        check_split(pool, "sft.split", config.sft.split)
    check_split(pool, "env.split", config.env.split)
    make_order(config, pool.splits[config.env.split], hosts)
    count_panels(config, pool)


def check_split(pool: EnvPool, key: str, split: str) -> None:
    """Check that the environment has a split.

    Args:
      pool: environment workers.
      key: the key that names the split.
      split: its name.

    Raises:
      ConfigError: there is no such split, or it has no tasks.
    """
    if split not in pool.splits:
        raise ConfigError(f"{key}={split} does not exist; the environment has {', '.join(pool.splits)}")
    if not pool.splits[split]:
        raise ConfigError(f"{key}={split} has no tasks")


def count_panels(config: Config, pool: EnvPool) -> dict[str, int]:
    """Return the number of tasks to attempt of each panel in ``env.eval_split``.

    Raises:
      ConfigError: the environment has no such split, or no tasks in it.
    """
    splits = eval_panels(config)
    for split in splits:
        check_split(pool, "env.eval_split", split)
    return {split: min(config.eval.tasks, pool.splits[split]) for split in splits}


def make_order(config: Config, num_tasks: int, hosts: Hosts) -> Order:
    """Make the order of a host's tasks in ``env.split``, by ``env.sampler``.

    Raises:
      ConfigError: there are too few tasks for the hosts.
    """
    if config.env.sampler == "uniform":
        return TaskOrder(config.env.split, num_tasks, config.seed)
    try:
        return AdaptiveOrder(config.env.split, num_tasks, config.seed, (hosts.index, hosts.num))
    except ValueError as error:
        raise ConfigError(f"env.split={config.env.split} with env.sampler=adaptive: {error}") from None
