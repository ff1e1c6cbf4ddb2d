"""Read the episodes of a run with plain Python (and with pandas, where it is installed). Say:

python read_rollouts.py runs/NAME
"""

import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path


def read_turns(run):
    """Yields one flat record per turn: the episode's fields, and the turn's with its credit."""
    for path in sorted(Path(run).glob("rollouts/update-*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                episode = json.loads(line)
                turns = episode.pop("turns")
                for number, turn in enumerate(turns):
                    yield episode | turn | {"turn": number, "num_turns": len(turns)}


def average(turns, key, by):
    """Means of a field, by another one."""
    groups = defaultdict(list)
    for turn in turns:
        groups[turn[by]].append(turn[key])
    return {name: sum(values) / len(values) for name, values in sorted(groups.items())}


def main(run):
    turns = list(read_turns(run))
    print(f"{len(turns)} turns of {len({(t['update'], t['group_id'], t['member']) for t in turns})} episodes")
    for key in ("entropy", "advantage"):
        print(f"mean {key} by turn:", {k: round(v, 3) for k, v in average(turns, key, "turn").items()})
    pushed = max(turns, key=lambda turn: abs(turn["advantage"] - turn["advantage_base"]))
    print(
        f"moved most: {pushed['response']!r} from {pushed['advantage_base']:.2f} to {pushed['advantage']:.2f}"
    )
    try:
        import pandas
    except ImportError:
        return
    table = pandas.DataFrame(turns)
    print(table.groupby(["update", "success"])[["entropy", "factor", "advantage"]].mean().round(3))


if __name__ == "__main__":
    main(sys.argv[1])
