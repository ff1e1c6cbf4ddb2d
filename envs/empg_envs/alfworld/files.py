"""Panels of official games, from a folder that ``alfworld-download`` has written.

The filters are those of ALFWorld's own loader: paths with ``movable`` or ``Sliced`` are left out, and so are
games whose file does not say that they are solvable. In addition, every file is parsed once on a machine. A
file that cannot be played is left out, named in a warning, and counted. What the parsing found is kept in an
index, whose name is a hash of the files' content: the next worker, or run, opens the folder without parsing.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs.alfworld.game import Game, load_game, parse_game, read_game
from empg_envs.alfworld.problem import GameFileError
from empg_envs.cache import build_once, cache_folder

VARIABLE = "ALFWORLD_DATA"
GAME_FILE = "game.tw-pddl"
# The newer release first; both have the same problems.
FOLDERS = ("json_2.1.2", "json_2.1.1")
# Order of the splits; ALFWorld's papers call the last two "seen" and "unseen".
SPLITS = ("train", "valid_train", "valid_seen", "valid_unseen")
UNSUPPORTED = ("movable", "Sliced")
VERSION = 1  # of the index below and of the parser: a game that is read otherwise needs another one
_NAMED = 5  # number of skipped files that a warning names


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A game file that was left out.

    Attributes:
      path: the file.
      kind: ``unsupported`` (by its path), ``unsolvable`` or ``malformed``.
      reason: the problem.
    """

    path: Path
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True)
class GameFile:
    """A playable game: its id inside the data (``split/task/trial``) and its file."""

    id: str
    path: Path
    content_hash: str


class OfficialPanels:
    """The splits found in a data folder.

    A panel is ordered by a hash of the games' ids. Its beginning is therefore a fair sample of task families,
    and the order depends neither on the folder's location nor on the file system.

    Attributes:
      root: the folder of the splits.
      skipped: files that were left out.
    """

    def __init__(self, data: str | os.PathLike[str] | None = None) -> None:
        """Open a data folder; every game in it is parsed once (about 1 ms each) and listed in an index.

        Args:
          data: the folder that contains ``json_2.1.1`` (or ``json_2.1.2``), or that folder itself. The
            default is the folder in ``ALFWORLD_DATA``.

        Raises:
          FileNotFoundError: the folder does not exist or contains no game. The message tells how to get the
            data.
        """
        self.root = find_root(data)
        self._panels, self.skipped = _scan(self.root)
        if not self._panels:
            raise FileNotFoundError(f"no playable {GAME_FILE} under {self.root}. {_count(self.skipped)}")
        _warn(self.root, self.skipped)

    def list_splits(self) -> list[str]:
        """Return the names of the splits with games, ``train`` first."""
        return list(self._panels)

    def num_tasks(self, split: str) -> int:
        """Return the number of playable games of a split."""
        return len(self._panel(split))

    def load(self, split: str, index: int) -> Game:
        """Return one game; it is cached, because a group plays the same game several times."""
        file = self._file(split, index)
        return _load(file.path, file.content_hash)

    def content(self, split: str, index: int) -> dict[str, Any]:
        """Return the content of the game's file."""
        return read_game(self._file(split, index).path)

    def describe(self, split: str, index: int) -> dict[str, Any]:
        """Return the game's origin, its goal and its task sentence."""
        file, game = self._file(split, index), self.load(split, index)
        return {
            "source": "official",
            "id": file.id,
            "split": split,
            "index": index,
            "task": game.task,
            "group": game.goal.family,
            "thing": game.goal.thing,
            "target": game.goal.target,
            "content_hash": file.content_hash,
        }

    def panel_hash(self, split: str) -> str:
        """Return the hash of the ordered content hashes."""
        hashes = "".join(file.content_hash for file in self._panel(split))
        return hashlib.sha256(hashes.encode()).hexdigest()

    def _panel(self, split: str) -> tuple[GameFile, ...]:
        if split not in self._panels:
            raise ValueError(
                f"unknown split {split!r} of the ALFWorld data in {self.root}; "
                f"the splits are {', '.join(self._panels)}"
            )
        return self._panels[split]

    def _file(self, split: str, index: int) -> GameFile:
        panel = self._panel(split)
        if not 0 <= index < len(panel):
            raise IndexError(f"task index {index} of split {split!r} is outside [0, {len(panel)})")
        return panel[index]


def find_root(data: str | os.PathLike[str] | None) -> Path:
    """Find the folder of the splits.

    Raises:
      FileNotFoundError: the folder does not exist. The message names it and tells how to get the data.
    """
    named = os.environ.get(VARIABLE) if data is None else os.fspath(data)
    if not named:
        raise FileNotFoundError(f"no ALFWorld data: neither env.options.data nor {VARIABLE} is set. {_HOW}")
    base = Path(os.path.expanduser(named))
    if not base.is_dir():
        origin = "env.options.data" if data is not None else VARIABLE
        raise FileNotFoundError(f"{origin}={named} is no folder. {_HOW}")
    for root in (*(base / folder for folder in FOLDERS), base):
        if any((root / split).is_dir() for split in SPLITS):
            return root
    raise FileNotFoundError(
        f"{base} holds neither {' nor '.join(FOLDERS)}, nor any of the splits {', '.join(SPLITS)}. {_HOW}"
    )


_HOW = (
    "To get the official games: pip install alfworld && alfworld-download, then set env.options.data (or "
    f"{VARIABLE}) to the folder that it fills (by default ~/.cache/alfworld). To play generated games "
    "instead: env.options.source=generated, or source=auto without data to fall back on them."
)


def _scan(root: Path) -> tuple[Mapping[str, tuple[GameFile, ...]], list[Skipped]]:
    listed = [path for split in SPLITS for path in sorted((root / split).rglob(GAME_FILE))]
    panels: dict[str, list[GameFile]] = {}
    skipped: list[Skipped] = []
    for path, (content_hash, kind, reason) in zip(listed, _examine(root, listed), strict=True):
        if kind:
            skipped.append(Skipped(path, kind, reason))
        else:
            game_id = path.parent.relative_to(root).as_posix()
            panels.setdefault(game_id.partition("/")[0], []).append(GameFile(game_id, path, content_hash))
    for found in panels.values():
        found.sort(key=lambda file: hashlib.sha256(file.id.encode()).digest())
    return {split: tuple(found) for split, found in panels.items()}, skipped


def _examine(root: Path, paths: Sequence[Path]) -> list[list[str]]:
    """Return [content hash, "", ""] of every game, or ["", kind, reason] of one that is left out."""
    digest = hashlib.blake2b(f"alfworld/{VERSION}".encode(), digest_size=16)
    for path in paths:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + _hash_file(path))
    index = cache_folder("alfworld") / f"{digest.hexdigest()}.json"

    def build(unfinished: Path) -> None:
        unfinished.write_text(json.dumps([_judge(root, path) for path in paths]), encoding="utf-8")

    try:
        return json.loads(build_once(index, build).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no cache can be written, or its disk is damaged: games are what counts
        return [_judge(root, path) for path in paths]


def _hash_file(path: Path) -> bytes:
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError as error:
        return str(error).encode()


def _judge(root: Path, path: Path) -> list[str]:
    try:
        content = _read(path, path.parent.relative_to(root).as_posix())
        return [parse_game(content).content_hash, "", ""]
    except GameFileError as error:
        return ["", error.kind, str(error)]


def _read(path: Path, game_id: str) -> dict[str, Any]:
    for word in UNSUPPORTED:
        if word in game_id:
            raise GameFileError(f"its path says {word!r}", "unsupported")
    content = read_game(path)
    if content["solvable"] is not True:
        raise GameFileError(f"the file says solvable={content['solvable']!r}", "unsolvable")
    return content


def _count(skipped: list[Skipped]) -> str:
    kinds = collections.Counter(each.kind for each in skipped)
    return "Left out: " + (", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none")


def _warn(root: Path, skipped: list[Skipped]) -> None:
    """Warn about broken files, but not about games that the official filters leave out."""
    broken = [each for each in skipped if each.kind == "malformed"]
    if broken:
        named = "; ".join(f"{each.path.relative_to(root)}: {each.reason}" for each in broken[:_NAMED])
        more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        warnings.warn(f"{_count(skipped)} of the games in {root}. Malformed: {named}{more}", stacklevel=3)


@functools.lru_cache(maxsize=256)
def _load(path: Path, content_hash: str) -> Game:
    return load_game(path)
