"""Catalogs from WebShop's own data files, which are read as a stream and built once.

Malformed rows are left out and counted, and the first of them are named. The finished catalog is stored in a
cache folder under a name that depends on the files and options (`empg_envs.cache`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import random
import sqlite3
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from empg_envs.cache import build_once, cache_folder
from empg_envs.webshop.files import Files, MissingData
from empg_envs.webshop.goals import PRICE_SEED, draw_price, human_goals, shuffled, synthetic_goals
from empg_envs.webshop.schema import HALF, BadRow, read_product
from empg_envs.webshop.store import VERSION, Store, StoreWriter, open_store
from empg_envs.webshop.stream import stream_json

LARGE_BYTES = 256 << 20  # building from larger product files takes longer than a worker may take to start
_NAMED_ROWS = 20
_SAMPLE = 1 << 16
_log = logging.getLogger(__name__)


def load(files: Files, cache_dir: str | None = None, *, build_large: bool = False) -> Store:
    """Open the catalog of these files; build it first if it is not in the cache.

    Args:
      files: the official files.
      cache_dir: folder of the catalogs; None is ``$XDG_CACHE_HOME/empg-jax/webshop``.
      build_large: whether a catalog may be built from a product file above `LARGE_BYTES`, which takes long.

    Raises:
      MissingData: the catalog is not in the cache and too large to be built now.
      ValueError: a file is no JSON of the expected form, or contains no goal.
      OSError: the cache folder cannot be written.
    """
    path = _catalog_path(files, cache_dir)
    folder = path.parent
    if path.exists():
        return open_store(path)
    if files.products.stat().st_size > LARGE_BYTES and not build_large:
        raise MissingData(
            f"the catalog of {files.products} is not in {folder} yet, and building it takes minutes: run "
            f"python -m empg_envs.webshop {files.products.parent} --size full "
            f"--goals {'human' if files.human else 'synthetic'} once"
        )
    return open_store(build_once(path, lambda unfinished: _build(files, unfinished)))


def load_order(
    files: Files, store: Store, seed: int, held_out: int, cache_dir: str | None = None
) -> Sequence[int]:
    """Return the positions of goals in the order of their numbers (`shuffled`).

    Behind the first ``held_out`` goals there are none of the same content: repeated option values make such
    goals.

    The order is kept beside the catalog and mapped into memory, because to shuffle a million goals takes
    every worker a second and its own memory. Where nothing can be written, each worker does that.
    """
    path = _catalog_path(files, cache_dir).with_suffix(f".order-{seed}")
    try:
        build_once(path, lambda unfinished: _write_order(unfinished, _make_order(store, seed, held_out)))
    except OSError:
        return _make_order(store, seed, held_out)
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("I")


def _make_order(store: Store, seed: int, held_out: int) -> array[int]:
    order = shuffled(store.num_goals, seed)
    copies = store.find_copies(order[:held_out])
    return array("I", [*order[:held_out], *(goal for goal in order[held_out:] if goal not in copies)])


def _write_order(path: Path, order: array[int]) -> None:
    path.write_bytes(order.tobytes())


def _catalog_path(files: Files, cache_dir: str | None) -> Path:
    folder = Path(cache_dir) if cache_dir else cache_folder("webshop")
    return folder / f"{_fingerprint(files)}.sqlite"


def _build(files: Files, path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        fill(StoreWriter(connection), connection, files)


def fill(writer: StoreWriter, connection: sqlite3.Connection, files: Files) -> None:
    """Read the official files into the database ``connection`` of ``writer``."""
    skipped: list[str] = []
    connection.execute("CREATE TEMP TABLE attributes (asin TEXT PRIMARY KEY, record TEXT)")
    connection.executemany(
        "INSERT OR REPLACE INTO temp.attributes VALUES (?, ?)",
        (
            (key, json.dumps(value))
            for key, value in stream_json(files.attributes, dict)
            if not HALF.search(key)
        ),
    )

    def attributes_of(asin: Any) -> Any:
        if HALF.search(str(asin)):
            return None
        row = connection.execute("SELECT record FROM temp.attributes WHERE asin = ?", (str(asin),)).fetchone()
        return json.loads(row[0]) if row else None

    rng = random.Random(PRICE_SEED)
    for number, row in stream_json(files.products, list):
        try:
            product = read_product(row, attributes_of(row.get("asin") if isinstance(row, dict) else None))
        except BadRow as error:
            asin = row.get("asin") if isinstance(row, dict) else None
            skipped.append(f"row {number} ({asin!r}): {error}")
            continue
        # Of several products with the same id the first one counts, and only it draws a price.
        state = rng.getstate() if len(product.prices) > 1 else None
        if not writer.add_product(product, draw_price(product, rng)) and state is not None:
            rng.setstate(state)
    instructions = dict(stream_json(files.human, dict)) if files.human is not None else None
    for product, price in writer.products():
        try:
            if instructions is None:
                writer.add_goals(synthetic_goals(product, attributes_of(product.asin) or {}, price, rng))
            else:
                writer.add_goals(human_goals(product, instructions.get(product.asin, ()), price, rng))
        except BadRow as error:
            skipped.append(f"instruction of {product.asin!r}: {error}")
    if not writer.num_goals:
        raise ValueError(
            f"{files.products} and {files.human or files.attributes} give no goal: do they belong together?"
        )
    if files.human is None:
        writer.weigh_goals()
    if skipped:
        _log.warning("%d rows of %s were skipped, first %s", len(skipped), files.products, skipped[0])
    writer.finish({"skipped": len(skipped), "skipped_rows": skipped[:_NAMED_ROWS]})


def _fingerprint(files: Files) -> str:
    """Return a hash of layout, files (name, size, time, both ends of their content) and kind of goals."""
    digest = hashlib.sha256(f"webshop/{VERSION}".encode())
    for path in files:
        if path is None:
            continue
        status = path.stat()
        digest.update(f"/{path.name}/{status.st_size}/{status.st_mtime_ns}/".encode())
        with open(path, "rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(status.st_size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:24]
