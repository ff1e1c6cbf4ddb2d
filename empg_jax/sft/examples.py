"""The examples of a warm start: conversations from files, or demonstrations of the environment's expert."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from empg_jax.config.places import expand
from empg_jax.errors import ConfigError
from empg_jax.report.progress import Progress
from empg_jax.report.record import RunRecord
from empg_jax.run.assembly import Language
from empg_jax.sft.chat_data import epoch_batch, load_chat_data
from empg_jax.sft.demonstrations import record_demonstrations
from empg_jax.text.chatfile import ChatDataError
from empg_jax.types import Trajectory

if TYPE_CHECKING:
    from empg_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Examples:
    """The training and held-out examples of a warm start.

    Attributes:
      train: training episodes or conversations.
      draw: function from the index of an update to the indices of its examples. It depends on nothing else.
      max_turns: largest number of turns of an example.
      rows: largest number of rows of an example.
      held_out: examples for the held-out loss.
      fingerprint: hash of the data. It is empty for an expert's demonstrations, which are recorded again on
        resume.
    """

    train: Sequence[Trajectory]
    draw: Callable[[int], Sequence[int]]
    max_turns: int
    rows: int = 1
    held_out: Sequence[Trajectory] = ()
    fingerprint: str = ""

    def note(self, record: RunRecord) -> None:
        """Write the fingerprint to a run's record.

        Raises:
          ChatDataError: the record has a fingerprint of other data.
        """
        if record.sft_data not in (None, self.fingerprint):
            raise ChatDataError("sft.data was changed since this run began: resume needs the same files")
        record.sft_data = self.fingerprint


def gather_examples(
    config: Config, language: Language, progress: Progress, *, check: Callable[[], None] = lambda: None
) -> Examples:
    """Read the conversations of ``sft.data``, or record demonstrations if it is not set.

    Args:
      config: the run's configuration.
      language: the run's language.
      progress: the display.
      check: called for every line and every recorded episode; it may raise to end the work.

    Raises:
      ConfigError: a file of ``sft.data`` does not exist.
      ChatDataError: a file has lines that are no conversations, or there are no training examples.
      DemonstrationError: the demonstrations cannot be recorded.
    """
    s = config.sft
    if s.data is not None:
        return _read_examples(config, s.data, language, progress, check)
    progress.phase("demonstrations", s.demonstrations, "episodes")

    def advance(count: int, values: dict[str, float]) -> None:
        check()
        progress.advance(count, values)

    demonstrations = record_demonstrations(config, language, s.demonstrations, advance=advance)
    count = len(demonstrations)

    def draw(update: int) -> list[int]:
        rng = np.random.default_rng((config.seed, 2, update))
        return rng.choice(count, size=min(s.batch_size, count), replace=False).tolist()

    turns = config.env.max_turns
    return Examples(demonstrations, draw, turns, rows=turns if config.env.context == "window" else 1)


def _read_examples(
    config: Config,
    paths: Sequence[str],
    language: Language,
    progress: Progress,
    check: Callable[[], None],
) -> Examples:
    s = config.sft
    for path in paths:
        if not expand(path, "sft.data").is_file():
            raise ConfigError(f"sft.data={path}: there is no such file (JSON lines, one conversation each)")
    progress.phase("chat data", _count_lines(paths, check), "lines")
    data = load_chat_data(
        paths,
        language.renderer,
        max_tokens=config.rollout.max_tokens,
        loss_on=s.loss_on,
        too_long=s.too_long,
        holdout=s.holdout,
        advance=progress.advance,
        check=check,
    )
    progress.close()  # the phase ends here, before the next phase's compilation
    size = min(s.batch_size, len(data.train))  # as `epoch_batch` draws them
    progress.message(
        f"{data.describe(config.rollout.max_tokens, s.too_long)}; {s.updates} updates of {size} are "
        f"{s.updates * size / len(data.train):.2g} epochs"
    )
    return Examples(
        data.train,
        functools.partial(epoch_batch, len(data.train), s.batch_size, config.seed),
        max_turns=max(data.train.max_turns, data.held_out.max_turns),
        held_out=data.held_out,
        fingerprint=data.train.fingerprint,
    )


def _count_lines(paths: Sequence[str], check: Callable[[], None]) -> int:
    count = 0
    for path in paths:
        with expand(path, "sft.data").open("rb") as file:
            for line in file:
                count += bool(line.strip())
                check()
    return count
