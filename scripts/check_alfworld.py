"""Play games in the original TextWorld engine and in the native one side by side, and count differences.

Needs the extra: ``pip install -e '.[alfworld]'`` (builds a planner: C++ compiler, CMake, two minutes).
Every third command is the solver's, the others are random, some of them nonsense. Exits with 1 if a single
observation, list of admissible commands, reward or end differs.

    python scripts/check_alfworld.py --games 20 --steps 40                    # generated games
    python scripts/check_alfworld.py --data ../data --split valid_unseen --release 2.1.1
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "envs")]

from empg_envs.alfworld.env import AlfworldEnv
from empg_envs.alfworld.original import OriginalEnv

NONSENSE = ("sing a song", " look ", "GO TO BED 1", "go  to desk 1", "take apple 1 from fridge 1", "")


def choose(rng: random.Random, env: AlfworldEnv, info: dict[str, Any]) -> str:
    """Choose the next command to try."""
    roll = rng.random()
    if roll < 0.33:
        return env.expert_action()
    return rng.choice(NONSENSE) if roll < 0.4 else rng.choice(info["admissible"])


def compare(
    native: AlfworldEnv, original: OriginalEnv, split: str, index: int, steps: int
) -> tuple[int, list]:
    """Compare the engines in one game; return the number of steps and the first difference."""
    rng = random.Random(index)
    ours, theirs = (env.reset(split=split, index=index) for env in (native, original))
    if ours != theirs:
        return 0, ["reset", ours, theirs]
    info = ours[1]
    for count in range(steps):
        action = choose(rng, native, info)
        reply, expected = native.step(action), original.step(action)
        if reply != expected:
            return count, [action, reply, expected]
        info = reply[4]
        if reply[2] or reply[3]:
            return count + 1, []
    return steps, []


def main() -> None:
    """Parse the command line, compare, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="folder of official games; generated ones without it")
    parser.add_argument("--level", default="rooms", help="level of generated games")
    parser.add_argument("--split", default=None)
    parser.add_argument("--release", default="2.1.2", choices=("2.1.2", "2.1.1"))
    parser.add_argument("--games", type=int, default=20)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    options: dict[str, Any] = {"data": args.data, "level": args.level, "release": args.release}
    options["source"] = "official" if args.data else "generated"
    native, original = AlfworldEnv(**options), OriginalEnv(**options)
    split = args.split or native.list_splits()[0]
    games, steps, differences = min(args.games, native.num_tasks(split)), 0, []
    started = time.perf_counter()
    for index in range(games):
        count, difference = compare(native, original, split, index, args.steps)
        steps += count
        if difference:
            differences.append({"game": native.get_task(split, index), "step": count, "found": difference})
            print(json.dumps(differences[-1]), file=sys.stderr)
    seconds = round(time.perf_counter() - started, 1)
    report = {**options, "split": split, "games": games, "steps": steps, "seconds": seconds}
    print(json.dumps({**report, "differences": len(differences)}))
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
