"""Lookup of WebShop's own data files, with instructions to get them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

DATA_VARIABLE = "WEBSHOP_DATA"
SIZES = {"small": "_1000", "full": ""}
GOALS = ("synthetic", "human")
_HOW = (
    "WebShop's data are not shipped. The authors' repository (princeton-nlp/WebShop, setup.sh) has links: "
    "put items_shuffle_1000.json and items_ins_v2_1000.json (small set), or items_shuffle.json and "
    "items_ins_v2.json (1.18 million products), and items_human_ins.json for human goals into one folder, "
    f"plain or gzipped, and name it by env.options.data or ${DATA_VARIABLE}"
)


class MissingData(FileNotFoundError):
    """Missing WebShop data files. The message tells how to get them."""


class Files(NamedTuple):
    """Paths of the official files; ``human`` is None for synthetic goals."""

    products: Path
    attributes: Path
    human: Path | None


def find_files(folder: str | None, size: str, goals: str) -> Files:
    """Find the files of a set in a folder.

    Args:
      folder: the data folder; None takes the environment variable ``WEBSHOP_DATA``.
      size: ``small`` or ``full``.
      goals: ``synthetic`` or ``human``.

    Raises:
      MissingData: the folder or a file does not exist.
      ValueError: the size or the goals are unknown.
    """
    if size not in SIZES or goals not in GOALS:
        raise ValueError(
            f"webshop size must be one of {', '.join(SIZES)} and goals one of {', '.join(GOALS)}; "
            f"got {size!r} and {goals!r}"
        )
    name = folder or os.environ.get(DATA_VARIABLE)
    if not name:
        raise MissingData(f"no WebShop data folder was named. {_HOW}")
    root = Path(name)
    if not root.is_dir():
        raise MissingData(f"the WebShop data folder {root} does not exist. {_HOW}")

    def find(stem: str) -> Path:
        found = [p for p in sorted(root.glob(f"{stem}.*")) if p.name.endswith((".json", ".json.gz"))]
        if not found:
            raise MissingData(f"the WebShop data folder {root} has no {stem}.json or {stem}.json.gz. {_HOW}")
        return found[0]

    products, attributes = find(f"items_shuffle{SIZES[size]}"), find(f"items_ins_v2{SIZES[size]}")
    return Files(products, attributes, find("items_human_ins") if goals == "human" else None)
