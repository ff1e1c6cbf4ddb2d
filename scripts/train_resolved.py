"""Train from a resolved configuration (a run's ``config.yaml``), without pydantic and typer.

For accelerator images that have JAX but not the command line's packages:

    empg-jax config quickstart > resolved.yaml        # where the command line is installed
    python scripts/train_resolved.py resolved.yaml run_dir=/tmp/run   # on the image
"""

from __future__ import annotations

import argparse
import types
from pathlib import Path
from typing import Any

import yaml

from empg_jax.config.yaml import apply_override
from empg_jax.trainer import train

# Values that are mappings by nature, not sections.
MAPPINGS = ("options", "prompt_options", "chat_options", "ray_resources")


class Resolved(types.SimpleNamespace):
    """A view of nested values as attributes."""

    def to_yaml(self) -> str:
        """Format the values as YAML."""
        return yaml.safe_dump(_plain(self), sort_keys=False)


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in vars(value).items()} if isinstance(value, Resolved) else value


def _resolve(name: str, value: Any) -> Any:
    if isinstance(value, dict) and name not in MAPPINGS:
        return Resolved(**{key: _resolve(key, inner) for key, inner in value.items()})
    return value


def main() -> None:
    """Read the file, apply the overrides and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="dotted overrides; nothing checks them here")
    args = parser.parse_args()
    values = yaml.safe_load(args.config.read_text())
    for override in args.overrides:
        apply_override(values, override)
    config = _resolve("", values)
    config.env.target = config.env.entry_point or config.env.name
    print(train(config))


if __name__ == "__main__":
    main()
