"""Build the official files' catalog ahead of time: ``python -m empg_envs.webshop FOLDER --size full``."""

from __future__ import annotations

import argparse
import json
import sys
import time

from empg_envs.webshop import files, official


def main(arguments: list[str] | None = None) -> int:
    """Build the catalog and report its size; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m empg_envs.webshop", description=__doc__)
    parser.add_argument("folder", nargs="?", help=f"data folder (default: ${files.DATA_VARIABLE})")
    parser.add_argument("--size", choices=files.SIZES, default="small")
    parser.add_argument("--goals", choices=files.GOALS, default="synthetic")
    parser.add_argument("--cache-dir", help="folder for built catalogs")
    chosen = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        found = files.find_files(chosen.folder, chosen.size, chosen.goals)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2  # refused before anything was built
    try:
        store = official.load(found, chosen.cache_dir, build_large=True)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({**store.meta, "seconds": round(time.perf_counter() - started, 1)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
