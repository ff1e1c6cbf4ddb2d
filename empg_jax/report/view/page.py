"""The page: its parts are put together here; all data lies in it, compressed."""

from __future__ import annotations

import base64
import html
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_jax.files import replacing
from empg_jax.report.view.packing import COLUMNS, SEARCH_BYTES, SEARCHED, Credit, Packed, compress, pack
from empg_jax.report.view.pieces import Decode
from empg_jax.report.view.reading import RunFacts, find_files, read_facts, read_tolerantly

HERE = Path(__file__).parent
SCRIPTS = ("data.js", "list.js", "episode.js", "group.js", "curves.js", "app.js")
FORMAT = 1
# Credit of other algorithms for the records of a file, and notes on what it assumes; raises ValueError with
# the reason where there is none.
WhatIf = Callable[[Path], tuple[Mapping[str, Credit], list[str]]]


class Book:
    """The packed episodes of a run, file by file; a file is packed again when it has changed.

    Args:
      run_dir: folder of the run.
      decode: maps token ids to text; None leaves the numbers of tokens out.
      what_if: computes what other algorithms would give; None without any.
      names: the algorithms that ``what_if`` computes.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        decode: Decode | None = None,
        what_if: WhatIf | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.run_dir = run_dir
        self._decode, self._what_if, self._names = decode, what_if, list(names)
        self._packed: dict[Path, tuple[tuple[int, int], Packed, list[str]]] = {}

    def state(self) -> str:
        """Return a word that changes when the files of the run change."""
        paths = [*find_files(self.run_dir), self.run_dir / "metrics.jsonl", self.run_dir / "summary.json"]
        return ",".join(
            f"{path.name}:{'-'.join(map(str, stamp))}" for path in paths if (stamp := _stamp(path))
        )

    def refresh(self) -> list[Packed]:
        """Pack what is new or has changed; return the files' episodes in order."""
        paths = find_files(self.run_dir)
        stamps = {path: stamp for path in paths if (stamp := _stamp(path))}
        self._packed = {path: entry for path, entry in self._packed.items() if stamps.get(path) == entry[0]}
        for path in stamps:
            if path not in self._packed:
                self._packed[path] = (stamps[path], *self._pack(path))
        return [self._packed[path][1] for path in stamps]

    def head(self) -> dict[str, Any]:
        """Return everything but the transcripts: facts, notes, metrics, and the list's columns."""
        files = self.refresh()
        facts = read_facts(self.run_dir)
        notes = [*facts.notes, *(note for _, _, notes in self._packed.values() for note in notes)]
        notes = list(dict.fromkeys(notes))  # what an algorithm assumes holds for every file
        if not files:
            notes.append(
                "no episodes: the run has no files rollouts/update-*.jsonl.gz (log.rollouts_every=0, an "
                "older version, or no update yet); the curves are shown"
            )
        columns = {name: [value for file in files for value in file.columns[name]] for name in COLUMNS}
        scale: dict[str, float] = {}
        for file in files:
            scale = {name: max(value, scale.get(name, 0.0)) for name, value in file.scale.items()}
        return {
            "format": FORMAT,
            **_facts(facts),
            "notes": notes,
            "what_if": self._names,
            "has_tokens": any(file.has_tokens for file in files),
            "searched": _searched(len(columns["update"])),
            "scale": scale,
            "columns": columns,
        }

    def search(self) -> list[str]:
        """Return the text to search in, one per episode."""
        texts = [text for file in self.refresh() for text in file.search]
        return [text[: _searched(len(texts))] for text in texts]

    def chunks(self) -> dict[str, bytes]:
        """Return the compressed transcripts by name."""
        return {name: content for file in self.refresh() for name, content in file.chunks.items()}

    def _pack(self, path: Path) -> tuple[Packed, list[str]]:
        records, notes = read_tolerantly(path)
        others: Mapping[str, Credit] = {}
        if self._what_if is not None and records and path.parent.name != "eval":
            try:
                others, assumed = self._what_if(path)
                notes += assumed
            except ValueError as error:
                notes.append(f"what-if is missing for {path.name}: {error}")
        name = path.name.partition(".")[0]
        packed = pack(name, records, decode=self._decode, others=others)
        return packed, notes


def write_page(book: Book, path: Path) -> tuple[int, list[str]]:
    """Write the whole run as one page.

    Args:
      book: the run's episodes.
      path: the file to write.

    Returns:
      Number of episodes, and the notes that the page shows.
    """
    head = book.head()
    data = {"head": compress(head), "search": compress(book.search()), **book.chunks()}
    with replacing(path) as file:
        for part in render(head["name"], data):
            file.write(part.encode("utf-8"))
    return len(head["columns"]["update"]), head["notes"]


def render(name: str, data: Mapping[str, bytes]) -> Iterator[str]:
    """Yield the page in parts: what is seen first, then the data; ``data`` is empty on a served page."""
    script = "\n".join((HERE / each).read_text(encoding="utf-8") for each in SCRIPTS)
    fill = {
        "TITLE": html.escape(name),
        "STYLE": (HERE / "page.css").read_text(encoding="utf-8"),
        "SCRIPT": f'"use strict";\n(() => {{\nconst LIVE = {json.dumps(not data)};\n{script}\n}})();',
    }
    names = iter(data)
    for number, part in enumerate(re.split("@([A-Z]+)@", (HERE / "page.html").read_text(encoding="utf-8"))):
        if number % 2 == 0:
            yield part
        elif part in fill:
            yield fill[part]
        elif part == "HEAD":
            # The script reads the head, and starts while the rest still comes.
            yield from (_embed(each, data[each]) for each in itertools.islice(names, 1))
        else:
            yield from (_embed(each, data[each]) for each in names)


def _embed(name: str, content: bytes) -> str:
    text = base64.b64encode(content).decode()
    return f'<script type="text/plain" id="data-{html.escape(name)}">{text}</script>\n'


def _searched(episodes: int) -> int:
    """Compute how many characters of each episode the search sees."""
    return min(SEARCHED, SEARCH_BYTES // max(episodes, 1))


def _facts(facts: RunFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        "algorithm": facts.algorithm,
        "modulation": facts.modulation,
        "updates": facts.updates,
        "metrics": facts.columns,
        "held_out": [[update, value] for update, value in facts.held_out.items()],
    }


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
