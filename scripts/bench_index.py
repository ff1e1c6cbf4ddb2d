"""Measure indexes on disk: build one over made-up passages, then open it from several processes at once.

Print one JSON object. The passages have 100 words whose frequencies fall as those of a language do (Zipf). An
index is built by one process that ends, so that its largest memory is told; opening counts the first search,
not the imports.

    PYTHONPATH=.:envs python scripts/bench_index.py --passages 1000000 --folder /tmp/index
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "envs")]

from empg_envs.deepsearch.ondisk import ENGINES, open_index
from empg_envs.deepsearch.pages import open_pages
from empg_envs.deepsearch.passages import find_retriever
from scripts.opening import measure_building, measure_opening, open_when_told

WORDS, TITLE_WORDS, TEXT_WORDS = 200_000, 3, 97


def write_corpus(path: Path, count: int) -> None:
    """Write made-up passages in the format of wiki-18."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 10))) for _ in range(WORDS)]
    weights = list(itertools.accumulate(1 / (rank + 10) for rank in range(WORDS)))
    with path.open("w") as file:
        for number in range(count):
            drawn = rng.choices(words, cum_weights=weights, k=TITLE_WORDS + TEXT_WORDS)
            title, text = " ".join(drawn[:TITLE_WORDS]), " ".join(drawn[TITLE_WORDS:])
            file.write(json.dumps({"id": str(number), "contents": f'"{title}"\n{text}'}) + "\n")


def use_index(name: str, corpus: str, folder: str, with_pages: bool) -> object:
    """Open an index, which builds it at first, and search for the words of a title; or read its page."""
    engine, passages = open_index(name, corpus, folder)
    wanted = passages[len(passages) // 2].title
    if with_pages:
        pages = open_pages(passages)
        assert pages.read_page(wanted), f"{name}: no page {wanted!r}"
        return pages
    (hits,) = engine.search([wanted], 3)
    assert len(hits) == 3, f"{name}: {wanted!r} finds {len(hits)} passages"
    return engine, passages


def measure_index(name: str, corpus: Path, folder: Path, *more: str) -> dict[str, Any]:
    """Build an index and open it."""
    command = [sys.executable, __file__, "--use", name, str(corpus), str(folder), *more]
    built = measure_building(command, folder)
    print(json.dumps({name: built}), file=sys.stderr, flush=True)
    return {"built": built, "opened": [measure_opening([*command, "--told"], count) for count in (1, 2, 8)]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--retrievers", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--folder", help="where corpus and indexes are written and removed again")
    parser.add_argument("--use", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--pages", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--told", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.use:
        if chosen.told:
            find_retriever(chosen.use[0])  # imports come before the opening
            open_when_told(lambda: use_index(*chosen.use, chosen.pages))
        else:
            use_index(*chosen.use, chosen.pages)
        return
    if chosen.folder:
        Path(chosen.folder).mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"passages": chosen.passages, "cpus": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as scratch:
        corpus = Path(scratch) / "corpus.jsonl"
        write_corpus(corpus, chosen.passages)
        found["corpus_mb"] = round(corpus.stat().st_size / 2**20)
        for name in chosen.retrievers:
            (folder := Path(scratch) / name).mkdir()
            found[name] = measure_index(name, corpus, folder)
            if name == chosen.retrievers[-1]:
                found["pages, once the index is there"] = measure_index(name, corpus, folder, "--pages")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
