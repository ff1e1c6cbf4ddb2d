"""Parsing of configuration files and dotted overrides from YAML into nested values."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from empg_jax.config.places import expand
from empg_jax.errors import ConfigError, nearest


class _Loader(yaml.SafeLoader):
    """A SafeLoader: 1e-3 is a number, 3:20 is text, keys that are no text or occur twice are refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                problem = f"the key {key!r} {'comes twice' if isinstance(key, str) else 'is no text'}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes a text which `_Loader` would read as a number."""


# YAML 1.1 requires a dot in a float, but learning rates are usually written without one.
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )
# YAML 1.1 reads 3:20 as a number to the base 60; here it is a range, an address, or the like.
_WHOLE = re.compile(r"^[-+]?(?:0b[01_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, _WHOLE if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def write_text(values: dict[str, Any]) -> str:
    """Write nested values as YAML that this module reads back to equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def find_file(name_or_path: str | Path) -> Path:
    """Find the file of a packaged name (``quickstart``, ``papers/aem_grpo_alfworld_7b``) or a path.

    Raises:
      ConfigError: there is no such file; the message lists the packaged names.
    """
    path = expand(name_or_path)
    packaged = _list_packaged()
    if str(name_or_path) in packaged:
        return packaged[str(name_or_path)]
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise ConfigError(f"no configuration file {path}")
    if (path / "config.yaml").is_file():
        raise ConfigError(
            f"{path} is a folder; its configuration is {path / 'config.yaml'} (to go on with the run: "
            f"empg-jax train --resume {path})"
        )
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, not a configuration")
    hint = nearest(str(name_or_path), packaged)
    raise ConfigError(
        f"no packaged configuration {str(name_or_path)!r}{hint}; there are: {', '.join(packaged)}; "
        "a file of your own is given as a path that ends in .yaml"
    )


def read_chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read a configuration file and the one that its key ``base`` names, if it has one.

    A base is a packaged name or a path relative to the file, and may have a base itself.

    Returns:
      Each file with its nested values, without the key ``base``: a base before the file that names it.

    Raises:
      ConfigError: a file of the chain is missing or malformed, or the chain is a circle.
    """
    chain: list[tuple[Path, dict[str, Any]]] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in [each.resolve() for each, _ in chain]:
            circle = " -> ".join(each.name for each in [*(each for each, _ in chain), current])
            raise ConfigError(f"{path}: the chain of base files is a circle: {circle}")
        values = read_yaml(current)
        base = values.pop("base", None)
        chain.append((current, values))
        current = None if base is None else _find_base(current, base)
    return chain[::-1]


def _find_base(path: Path, base: Any) -> Path:
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base={base!r} must be the name or the path of a configuration")
    try:
        return find_file(path.parent / base if base.endswith((".yaml", ".yml")) else base)
    except ConfigError as error:
        raise ConfigError(f"{path}: base={base}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the nested values of a file.

    Raises:
      ConfigError: the file cannot be read, is no YAML, is empty, or is no table of keys.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} has too many levels") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if values is None:
        raise ConfigError(f"{path} is empty; a file without keys of its own holds {{}}")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values (key: value), not {type(values).__name__}")
    return values


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one ``section.key=value`` in place; the value is YAML.

    Raises:
      ConfigError: no ``=``, an empty part in the key, a value that is no YAML, or a key below a plain value.
    """
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"override {key}=...: the value has too many levels") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    node = values
    for depth, part in enumerate(parts[:-1], start=1):
        if node.get(part) is None:
            node[part] = {}
        if not isinstance(node[part], dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(parts[:depth])} is {node[part]!r} and has no keys below it"
            )
        node = node[part]
    # A section given as a table is merged, so that `algorithm={empg: {k: 2}}` keeps the other keys; an empty
    # table removes them.
    if value and isinstance(value, dict) and isinstance(node.get(parts[-1]), dict):
        node[parts[-1]] = merge(node[parts[-1]], value)
    else:
        node[parts[-1]] = value


def check_option(option: str) -> None:
    """Refuse a value of ``--options`` that is not of the form ``KEY=VALUE``.

    Raises:
      ConfigError: it is not.
    """
    if "=" not in option:
        raise ConfigError(f"--options {option}: expected KEY=VALUE")


def drop_options(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Remove a file's environment options where an override names another environment.

    Args:
      values: the file's values; changed in place.
      overrides: the overrides, which are applied later; options among them stay.

    Returns:
      A note for the user if anything was removed, else an empty list.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        apply_override(given, override)
    env, named = values.get("env"), given.get("env")
    if not isinstance(env, dict) or not isinstance(named, dict):
        return []
    # An entry point stands in place of a name, which is then null.
    key = "entry_point" if named.get("entry_point") is not None else "name"
    other = named.get(key)
    if other is None or other == env.get(key) or (key == "name" and env.get(key) is None):
        return []
    dropped = [key for key in ("options", "prompt_options") if env.pop(key, None)]
    if not dropped:
        return []
    names = " and ".join(f"env.{key}" for key in dropped)
    return [f"env.{key}={other}: {names} of the configuration are left out"]


def find_packaged() -> dict[str, str]:
    """List the packaged configurations: name, and the first sentence of the comment at the file's top."""
    found = {}
    for name, path in _list_packaged().items():
        lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
        text = " ".join(line.removeprefix("#").strip() for line in lines)
        found[name] = re.split(r"(?<=\.)\s", text, maxsplit=1)[0]
    return found


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Lay nested values over others; tables are merged, and an empty table removes the old one."""
    merged = dict(old)
    for key, value in new.items():
        both = value and isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = merge(old[key], value) if both else value
    return merged


def _one_line(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    return f"line {mark.line + 1}: {problem}" if mark else problem


def is_packaged(path: Path) -> bool:
    """Return whether a file is one of the package's configurations."""
    return path.resolve().is_relative_to(_packaged_folder().resolve())


def _list_packaged() -> dict[str, Path]:
    """Return the packaged files by name; those of the papers have their folder in front."""
    folder = _packaged_folder()
    files = sorted(folder.glob("*.yaml")) + sorted(folder.glob("*/*.yaml"))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def _packaged_folder() -> Path:
    """Return the folder of the configurations: in an installed wheel, or in a source checkout."""
    here = Path(__file__).resolve().parents[1]
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"
