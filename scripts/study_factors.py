"""Tell how turn entropies and the factors of EMPG (g) and AEM (alpha) are spread over the turns of runs.

    python scripts/study_factors.py runs/studies/smollm2/alfworld-*    # one table; each argument is a run
    python scripts/study_factors.py RUN --updates 1 10                 # of these updates alone

Reads the episodes that a run wrote (``rollouts/``, ``log.rollouts_every``); a run without modulation has
factors of 1. A group whose factors are all exactly 1 is in AEM's dead zone: its entropies differ by less
than ``algorithm.aem.min_range``.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from empg_jax.errors import ConfigError, UserError
from empg_jax.report.statistics import correlation
from empg_jax.rollout.record import read_episodes

QUANTILES = {"least": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "most": 1.0}
HEADS = ("run", "turns", "of each turn", "mean", "sd", *QUANTILES)


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line and print the tables; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--updates", type=int, nargs="+", metavar="N", help="updates to read (all there are)")
    arguments = parser.parse_args(words)
    names = [run.resolve().name for run in arguments.runs]
    if len(set(names)) < len(names):
        names = list(map(str, arguments.runs))
    try:
        turns = [read_turns(run, arguments.updates) for run in arguments.runs]
        print(describe(dict(zip(names, turns, strict=True))))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def read_turns(run: Path, updates: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Read the turns of a run's episodes, each with its ``update`` and its ``group_id``.

    Raises:
      ConfigError: there are no episodes, or not of an update that was asked for.
    """
    found = {int(path.name[7:13]): path for path in sorted((run / "rollouts").glob("update-*.jsonl.gz"))}
    if missing := set(updates or ()) - found.keys():
        there_are = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"{run} has no episodes of update {min(missing)}; there are {there_are}")
    if not found:
        raise ConfigError(f"{run} has no episodes: set log.rollouts_every=1 and run it again")
    return [
        turn | {"update": update, "group_id": episode["group_id"]}
        for update in updates or found
        for episode in read_episodes(found[update])
        for turn in episode["turns"]
    ]


def describe(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Describe the spread of entropies and factors: one table of quantiles, one of shares, as Markdown."""
    spreads, shares = [], []
    for name, turns in runs.items():
        entropies, factors, lengths = (
            np.array([turn[key] for turn in turns], np.float64) for key in ("entropy", "factor", "tokens")
        )
        rows = {"H, nats per token": entropies, "factor": factors, "tokens": lengths}
        spreads += [[name, str(len(turns)), what, *spread(values)] for what, values in rows.items()]
        inside = mean_inner_variance(turns)
        shares.append(
            [
                name,
                f"{np.mean(factors > 1):.3f}",
                f"{dead_share(turns):.3f}",
                number(correlation(factors, entropies)),
                number(correlation(factors, lengths)),
                f"{inside:.3f}",
                f"{entropies.var():.3f}",
            ]
        )
    heads = ["run", "share of factors above 1", "in groups where all are 1", "factor with H, r"]
    heads += ["factor with tokens, r", "variance of H inside turns", "between turns"]
    return "\n\n".join(table(*each) for each in ((HEADS, spreads), (heads, shares)))


def spread(values: np.ndarray) -> list[str]:
    """Format mean, standard deviation and quantiles."""
    numbers = [values.mean(), values.std(), *np.quantile(values, list(QUANTILES.values()))]
    return [f"{each:.3f}" for each in numbers]


def dead_share(turns: Sequence[dict[str, Any]]) -> float:
    """Compute the share of turns in groups whose factors are all exactly 1."""
    groups = collections.defaultdict(list)
    for turn in turns:
        groups[turn["update"], turn["group_id"]].append(turn["factor"])
    return sum(len(factors) for factors in groups.values() if set(factors) == {1.0}) / len(turns)


def mean_inner_variance(turns: Sequence[dict[str, Any]]) -> float:
    """Compute the variance of token entropies around the mean of their turn, over all tokens; NaN if unknown.

    A record has them with ``log.rollouts_tokens``.
    """
    inner = [np.array(turn["token_entropies"]) for turn in turns if turn.get("token_entropies")]
    if not inner:
        return float("nan")
    return float(np.mean(np.concatenate([(values - values.mean()) ** 2 for values in inner])))


def number(value: float) -> str:
    """Format a correlation; that of a constant is none."""
    return "-" if np.isnan(value) else f"{value:.2f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a table as Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    sys.exit(main())
