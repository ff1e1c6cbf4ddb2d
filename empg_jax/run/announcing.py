"""What a run says of its model and of its conversations at the start, and keeps in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from empg_jax.hf.config import read_positions
from empg_jax.learner.fingerprint import TEXT, text_logprob
from empg_jax.learner.update import Learner
from empg_jax.parallel.hosts import ALONE, Hosts
from empg_jax.report.events import EventLog
from empg_jax.report.progress import Progress
from empg_jax.run.assembly import Language, make_rl_optimizer
from empg_jax.run.environment import find_spec
from empg_jax.run.folder import add_run_info
from empg_jax.text.probe import describe_rows
from empg_jax.types import Params
from empg_jax.workers.faults import Tell, tell_nobody

if TYPE_CHECKING:
    from empg_jax.config import Config

# Events of the user's own code that would come back at every turn: told once in a process, and said.
SAID_ONCE = ("parser_error", "prompt_error", "control_token_observed", "states_merged")


def say_once(say: Callable[[str], None], tell: Tell = tell_nobody) -> Tell:
    """Return a receiver that hands events on: of each in `SAID_ONCE` the first alone, which is also said."""
    said: set[str] = set()

    def tell_and_say(event: str, /, **fields: Any) -> None:
        if event in said:
            return
        tell(event, **fields)
        if event in SAID_ONCE:
            said.add(event)
            say(fields["detail"])

    return tell_and_say


def announce_model(
    config: Config,
    run_dir: Path,
    learner: Learner,
    language: Language,
    params: Params,
    *,
    say: Callable[[str], None],
    hosts: Hosts = ALONE,
) -> None:
    """Report the loaded model's log-probability of a fixed text, and record it in the run's folder.

    Random weights, of a configuration without ``model.path``, have none that is worth a line.
    """
    if config.model.path is None:
        return
    ids = language.tokenizer.encode(TEXT)
    value = round(text_logprob(params, learner.model, ids, learner.mesh, learner.base), 4)
    say(f"{config.model.path}: {value:.4f} nats per token on a fixed text")
    if hosts.is_first:
        add_run_info(run_dir, {"model": {"path": config.model.path, "text_logprob": value}})


def announce_length(
    config: Config, longest: int, *, say: Callable[[str], None], key: str = "rollout.max_tokens"
) -> None:
    """Warn of conversations that are longer than what the model's folder says that it was made for.

    Args:
      config: the configuration.
      longest: tokens of the longest conversation.
      say: receives the warning.
      key: the key that sets ``longest``.
    """
    if (path := config.model.path) is None:
        return
    positions = read_positions(path)
    if positions is not None and longest > positions:
        say(
            f"{key}={longest}, but {path} was made for {positions} tokens (max_position_embeddings): what "
            "lies behind them may come out poorly"
        )


def announce_rows(
    config: Config, run_dir: Path, language: Language, *, say: Callable[[str], None], hosts: Hosts = ALONE
) -> None:
    """Report how many training rows an episode has, and why, and record it in the run's folder."""
    if config.env.context == "window":
        line = "rows per episode: one per turn, because env.context=window gives every turn a fresh prompt"
    else:
        line = describe_rows(language.renderer)
        if find_spec(config).has_calls:
            line += " (where the program goes on with its conversation as it is)"
    say(line)
    if hosts.is_first:
        add_run_info(run_dir, {"rows": line})


def tell_other_length(config: Config, saved: str, step: int, *, say: Callable[[str], None]) -> None:
    """Report the learning rate that a resumed run goes on with, where a new length has changed it.

    Args:
      config: the configuration.
      saved: the configuration that the checkpoint was written with, in YAML.
      step: optimizer steps of RL that are made.
      say: receives the note.
    """
    before, now = yaml.safe_load(saved)["train"]["updates"], config.train.updates
    old, new = (float(make_rl_optimizer(config, updates)[1](step)) for updates in (before, now))
    if old != new:
        say(
            f"note: train.updates={now} (was {before}) changes the length of train.schedule="
            f"{config.train.schedule}: the learning rate goes on at {new:.3g}, where {old:.3g} was next"
        )


def tell_other_recipe(progress: Progress, events: EventLog, entry_point: str, update: int) -> None:
    """Report that the source of a recipe is not what it was, to the user and in the event log."""
    progress.message(
        f"the module of algorithm.entry_point={entry_point} is not what it was at update {update}: if it "
        "computes something else now, this run has two algorithms"
    )
    events.tell("recipe_changed", entry_point=entry_point)
