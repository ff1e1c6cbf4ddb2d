"""Pages of passages on disk: the titles' hashes, sorted, in a file that all processes map into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from empg_envs.cache import allow_mapping, build_once
from empg_envs.deepsearch.ondisk import PassageFile
from empg_envs.deepsearch.passages import Passage


class DiskPages:
    """`Pages` of a folder of passages; the list of titles is written beside them when it is first needed."""

    def __init__(self, passages: PassageFile) -> None:
        """Open the list; write it first if it is not there."""
        self._passages = passages
        path = build_once(passages.folder / "titles.npy", self._write)
        allow_mapping(path)
        self._titles = np.load(path, mmap_mode="r")

    def read_page(self, title: str) -> Sequence[Passage]:
        """Return the passages of a title; see `empg_envs.deepsearch.pages.Pages`."""
        key = _hash_title(title)
        first, end = (
            np.searchsorted(self._titles["key"], np.uint64(key), side) for side in ("left", "right")
        )
        found = (self._passages[int(number)] for number in sorted(self._titles["number"][first:end]))
        return [passage for passage in found if passage.title == title]

    def _write(self, path: Path) -> None:
        kind = np.dtype([("key", np.uint64), ("number", np.uint32)])
        keys = np.fromiter(self._keys(), np.uint64, len(self._passages))
        titles = np.empty(len(keys), kind)
        order = np.argsort(keys, kind="stable")
        titles["key"], titles["number"] = keys[order], order
        with path.open("wb") as file:
            np.save(file, titles)

    def _keys(self) -> Iterator[int]:
        return (_hash_title(passage.title) for passage in self._passages)


def _hash_title(title: str) -> int:
    return int.from_bytes(hashlib.blake2b(title.encode("utf-8", "surrogatepass"), digest_size=8).digest())
