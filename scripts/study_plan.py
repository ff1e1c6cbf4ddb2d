"""The file of a study: what is run, what is compared, and what was written down before.

A study lies in a folder of its own, ``study.yaml`` beside its results. `Study` is what the file says,
checked.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_line import SPENT

from empg_jax.config import Config, load_config
from empg_jax.config.yaml import read_yaml
from empg_jax.errors import ConfigError, nearest

FILENAME = "study.yaml"
KEYS = (
    "preregistration",
    "tasks",
    "overrides",
    "arms",
    "baseline",
    "comparisons",
    "seeds",
    "whole_seeds",
    "end_tasks",
    "measure",
)
UPDATES = "updates"
REGISTERED = ("question", "primary", "secondary", "stop_rule", "minimum_detectable_effect", "seeds")


@dataclasses.dataclass(frozen=True, order=True)
class Triple:
    """One run of a study."""

    task: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.task}-{self.arm}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Task:
    """A configuration, and what differs from it in this study: in every run, and in those of some arms."""

    config: str
    overrides: tuple[str, ...] = ()
    arms: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
      folder: the folder of the file and of its results.
      registration: the pre-registration block, letter for letter.
      planned_effect: the minimum detectable effect in it, in points of the primary measure.
      tasks: configurations by name.
      overrides: overrides of every run.
      arms: overrides of each arm.
      baseline: the arm that the others are compared with.
      comparisons: pairs of arms; the first is compared with the second.
      seeds: seeds, in the order in which they are run.
      whole_seeds: whether a seed of a task counts only when all arms have finished it.
      end_tasks: held-out tasks of an evaluation of its own at the end; None takes the run's last one.
      measure: what the primary measure is the area of the held-out curve over: ``updates``, or at equal
        amounts ``environment_steps`` or ``cpu_seconds``.
    """

    folder: Path
    registration: str
    planned_effect: float
    tasks: dict[str, Task]
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    baseline: str
    comparisons: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    whole_seeds: bool = False
    end_tasks: int | None = None
    measure: str = UPDATES

    @property
    def only_task(self) -> str | None:
        """The task of a study that has one; None where there are several."""
        return next(iter(self.tasks)) if len(self.tasks) == 1 else None

    def triples(self) -> Iterator[Triple]:
        """All runs; seeds are outermost, so that pairs are complete early."""
        for seed, task, arm in itertools.product(self.seeds, self.tasks, self.arms):
            yield Triple(task, arm, seed)

    def settings(self, triple: Triple) -> list[str]:
        """The configuration's name and the overrides of a run, as a command line takes them."""
        task = self.tasks[triple.task]
        return [
            task.config,
            *self.overrides,
            *task.overrides,
            *self.arms[triple.arm],
            *task.arms.get(triple.arm, ()),
            f"seed={triple.seed}",
        ]

    def load(self, triple: Triple) -> Config:
        """Resolve the configuration of a run.

        Raises:
          ConfigError: it is refused.
        """
        config, *overrides = self.settings(triple)
        return load_config(self.find(config), overrides)

    def find(self, config: str) -> str:
        """Return a packaged name as it is, and the path of a file relative to the study's folder."""
        return str(self.folder / config) if Path(config).suffix in (".yaml", ".yml") else config


def read_study(folder: Path) -> Study:
    """Read and check ``study.yaml``: its keys, its arms and the configuration of every cell.

    Raises:
      ConfigError: a key is unknown or missing, an arm is not there, or a configuration is refused.
    """
    path = Path(folder) / FILENAME
    values = read_yaml(path)
    for key in values.keys() - set(KEYS):
        raise ConfigError(
            f"{path}: {key} is no key of a study{nearest(key, KEYS)}; there are {', '.join(KEYS)}"
        )
    for key in {"preregistration", "tasks", "arms", "seeds"} - values.keys():
        raise ConfigError(f"{path} has no {key}")
    for key in ("tasks", "arms"):
        if not isinstance(values[key], dict) or not values[key]:
            raise ConfigError(f"{path}: {key} must give names and what they stand for, not {values[key]!r}")
    arms = {name: _words(words, f"{path}: arms.{name}") for name, words in values["arms"].items()}
    seeds = _seeds(values["seeds"], path)
    baseline = values.get("baseline", next(iter(arms)))
    study = Study(
        folder=Path(folder),
        registration=_block(path.read_text(encoding="utf-8"), "preregistration"),
        planned_effect=_check_registration(values["preregistration"], len(seeds), path),
        tasks={name: _task(value, arms, f"{path}: tasks.{name}") for name, value in values["tasks"].items()},
        overrides=_words(values.get("overrides", []), f"{path}: overrides"),
        arms=arms,
        baseline=baseline,
        comparisons=_comparisons(values.get("comparisons"), baseline, arms, path),
        seeds=seeds,
        whole_seeds=_typed(values, "whole_seeds", bool, False, path),
        end_tasks=_typed(values, "end_tasks", int, None, path),
        measure=values.get("measure", UPDATES),
    )
    if study.measure not in (UPDATES, *SPENT):
        raise ConfigError(f"{path}: measure: {study.measure} is none of {', '.join((UPDATES, *SPENT))}")
    _check_cells(study, path)
    return study


def _task(value: Any, arms: Collection[str], where: str) -> Task:
    match value:
        case str():
            return Task(value)
        case {"config": str(config), **others} if not others.keys() - {"overrides", "arms"}:
            given = others.get("arms", {})
            if not isinstance(given, dict) or (unknown := [name for name in given if name not in arms]):
                told = given if not isinstance(given, dict) else unknown[0]
                raise ConfigError(f"{where}.arms: {told!r} is no arm; there are {', '.join(arms)}")
            more = {name: _words(words, f"{where}.arms.{name}") for name, words in given.items()}
            return Task(config, _words(others.get("overrides", []), f"{where}.overrides"), more)
    raise ConfigError(
        f"{where}: {value!r} is neither a configuration nor {{config: NAME, overrides: [...], arms: {{...}}}}"
    )


def _words(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) and "=" in word for word in value):
        raise ConfigError(f"{where}: {value!r} is no list of overrides such as [algorithm.name=grpo]")
    return tuple(value)


def _typed(values: Mapping[str, Any], key: str, kind: type, default: Any, path: Path) -> Any:
    value = values.get(key, default)
    if value is not default and (type(value) is not kind or (kind is int and value < 1)):
        raise ConfigError(
            f"{path}: {key}={value!r} is no {'positive number' if kind is int else 'true or false'}"
        )
    return value


def _seeds(value: Any, path: Path) -> tuple[int, ...]:
    """Read ``100..115``, both ends included, or a list of numbers."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", value) if isinstance(value, str) else None
    if found:
        value = list(range(int(found[1]), int(found[2]) + 1))
    if not isinstance(value, list) or not value or not all(type(seed) is int for seed in value):
        raise ConfigError(f"{path}: seeds={value!r} is neither a list of numbers nor FIRST..LAST")
    if len(set(value)) < len(value):
        raise ConfigError(f"{path}: a seed comes twice in {value}")
    return tuple(value)


def _comparisons(
    value: Any, baseline: str, arms: Mapping[str, Sequence[str]], path: Path
) -> tuple[tuple[str, str], ...]:
    """Read names, compared with the baseline, and pairs of names; by default every arm is compared."""
    given = [name for name in arms if name != baseline] if value is None else value
    if not isinstance(given, list) or not all(isinstance(each, str | list) for each in given):
        raise ConfigError(f"{path}: comparisons={given!r} is no list of arms and of [ARM, ARM]")
    pairs = [(each, baseline) if isinstance(each, str) else tuple(each) for each in given]
    for name in (baseline, *itertools.chain(*pairs)):
        if name not in arms:
            raise ConfigError(
                f"{path}: there is no arm {name}{nearest(str(name), arms)}; there are {', '.join(arms)}"
            )
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or pair[0] == pair[1]:
            raise ConfigError(f"{path}: {list(pair)} is no pair of two arms")
        if pair in pairs[:number]:
            raise ConfigError(f"{path}: the comparison {' with '.join(pair)} comes twice")
    return tuple(pairs)


def _check_registration(values: Any, seeds: int, path: Path) -> float:
    missing = [key for key in REGISTERED if not isinstance(values, dict) or key not in values]
    if missing:
        raise ConfigError(f"{path}: preregistration lacks {', '.join(missing)}")
    if values["seeds"] != seeds:
        raise ConfigError(f"{path}: preregistration.seeds={values['seeds']}, but the study has {seeds} seeds")
    effect = values["minimum_detectable_effect"]
    points = effect.get("points") if isinstance(effect, dict) else None
    if not isinstance(points, int | float) or not 0 < points < math.inf:
        raise ConfigError(
            f"{path}: preregistration.minimum_detectable_effect needs its size as points: NUMBER"
        )
    return float(points)


def _block(text: str, key: str) -> str:
    """Cut the block of a top-level key out of a YAML file, letter for letter."""
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith(f"{key}:"))
    after = (n for n, line in enumerate(lines) if n > first and re.match(r"[^\s#]", line))
    block = lines[first : next(after, len(lines))]
    while block and (not block[-1].strip() or block[-1].startswith("#")):
        block.pop()  # comments in the first column belong to what follows
    return "\n".join(block)


def _check_cells(study: Study, path: Path) -> None:
    """Check every cell before the first run: a mistake in the last arm must not cost a night."""
    for name in (*study.tasks, *study.arms):
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(f"{path}: {name!r} is no name of a folder: use letters, digits and _ . + -")
    names = collections.Counter(triple.name for triple in study.triples())
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"{path}: two runs would be called {twice[0]}: rename a task or an arm")
    for task in study.tasks:
        resolved: dict[str, str] = {}
        for arm in study.arms:
            try:
                config = study.load(Triple(task, arm, study.seeds[0]))
            except ConfigError as error:
                raise ConfigError(f"{path}: arm {arm} of {task} is refused: {error}") from None
            if config.eval.every == 0:
                raise ConfigError(f"{path}: {task}, {arm}: eval.every=0 leaves no curve; set eval.every=10")
            twin = resolved.setdefault(config.to_yaml(), arm)
            if twin != arm:
                raise ConfigError(f"{path}: the arms {twin} and {arm} are the same on {task}")
