"""Write generated ALFWorld games as files, in the folders and format of the official ones.

They can be read back (``env.options.data=OUT``), and played by the original TextWorld engine.

    python scripts/make_alfworld_games.py --out games --count 1000
    python scripts/make_alfworld_games.py --out games --split valid_seen --panel valid --level kitchen
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "envs")]

from empg_envs.alfworld.generator import GeneratedPanels
from empg_envs.alfworld.rooms import PRESETS
from empg_envs.alfworld.writer import write_game


def main() -> None:
    """Parse the command line and write the games."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets json_2.1.2/<split>/…")
    parser.add_argument("--level", default="rooms", choices=sorted(PRESETS))
    parser.add_argument("--panel", default="train", choices=("train", "valid", "test"))
    parser.add_argument("--split", help="folder name of the split (default the panel's)")
    parser.add_argument("--first", type=int, default=0, help="index of the first game in its panel")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    panels, root = GeneratedPanels(args.level), args.out / "json_2.1.2"
    end = min(args.first + args.count, panels.num_tasks(args.panel))
    for index in range(args.first, end):
        name = f"trial_{args.level}_{args.panel}_{index:07d}"
        write_game(panels.make(args.panel, index), root, args.split or args.panel, name)
    print(f"{max(end - args.first, 0)} games in {root / (args.split or args.panel)}")


if __name__ == "__main__":
    main()
