"""``empg-jax new-env`` and ``new-algorithm``: a folder that trains at once, for its owner to change."""

from __future__ import annotations

import importlib.util
import keyword
import shutil
import string
from pathlib import Path

from empg_jax.errors import ConfigError

STARTERS = Path(__file__).parent / "starters"
ENDING = ".txt"  # of the templates: no tool takes them for modules or configurations of this package


def write_starter(kind: str, name: str, parent: Path) -> Path:
    """Write a folder with code, configuration, test and README.

    Args:
      kind: ``env`` or ``algorithm``.
      name: name of the folder, which is a Python package.
      parent: where to make it; the commands in its README are said there.

    Returns:
      The folder.

    Raises:
      ConfigError: the name is no identifier or taken, or the folder exists or cannot be made.
    """
    _check_name(name)
    folder = parent / name
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"{folder} exists already: choose another name; nothing was written")
    if _is_module(name):
        raise ConfigError(f"{name} is the name of a Python module that is installed: choose another name")
    try:
        folder.mkdir()
        for template in sorted((STARTERS / kind).glob(f"*{ENDING}")):
            text = string.Template(template.read_text(encoding="utf-8")).substitute(name=name)
            (folder / template.name.removesuffix(ENDING)).write_text(text, encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None
    return folder


def _check_name(name: str) -> None:
    if name.isidentifier() and not keyword.iskeyword(name):
        return
    better = "".join(c if c.isalnum() else "_" for c in name)
    better = f"my_{better}" if better[:1].isdigit() or keyword.iskeyword(better) else better
    hint = f", for example {better}" if better.strip("_").isidentifier() else ""
    raise ConfigError(f"{name!r} is no Python identifier: use letters, digits and _, not a digit first{hint}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a module that is half loaded has no spec
        return True
