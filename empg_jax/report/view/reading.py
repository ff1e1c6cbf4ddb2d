"""What the viewer reads of a run; whatever is damaged or missing becomes a note, never an error."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

from empg_jax.errors import ConfigError
from empg_jax.metrics import read_metrics
from empg_jax.report.curves import held_out_points
from empg_jax.report.statistics import finite

Record = dict[str, Any]

ROLLOUTS, HELD_OUT = "rollouts", Path("eval") / "after.jsonl.gz"
UPDATE_FILE = re.compile(r"update-(\d+)\.jsonl(\.gz)?")
PIECE = 1 << 20


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What the head of the page says of a run.

    Attributes:
      name: name of the run's folder.
      algorithm: name of the algorithm; empty where no configuration was found.
      modulation: ``empg``, ``aem``, ``none``, or empty.
      columns: every metric by name, aligned with ``updates``; None where it was not recorded.
      updates: the updates with a line of metrics.
      held_out: success on the held-out panel by update, before and after training included.
      notes: what is missing or damaged, for the reader.
    """

    name: str
    algorithm: str
    modulation: str
    updates: list[int]
    columns: dict[str, list[float | None]]
    held_out: dict[int, float]
    notes: list[str]


def check_is_run(run_dir: Path) -> None:
    """Check that a folder holds something of a run.

    Raises:
      ConfigError: it does not.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"{run_dir} is not a folder: name the folder of a run")
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", ROLLOUTS)):
        raise ConfigError(
            f"{run_dir} holds no run: expected config.yaml, metrics.jsonl or {ROLLOUTS}/update-*.jsonl.gz "
            "in it"
        )


def find_files(run_dir: Path) -> list[Path]:
    """Find the files of episodes: those of updates in order, then the held-out samples."""
    folder = run_dir / ROLLOUTS
    found = {path: match for path in folder.glob("*") if (match := UPDATE_FILE.fullmatch(path.name))}
    updates = sorted(found, key=lambda path: (int(found[path][1]), path.name))
    return [*updates, *([run_dir / HELD_OUT] if (run_dir / HELD_OUT).is_file() else [])]


def read_facts(run_dir: Path) -> RunFacts:
    """Read name, algorithm and metrics of a run."""
    notes: list[str] = []
    algorithm, modulation = _read_algorithm(run_dir, notes)
    path = run_dir / "metrics.jsonl"
    try:
        records = read_metrics(path, warn=notes.append)
    except FileNotFoundError:
        records = []
        notes.append("no curves: the run has no metrics.jsonl")
    names = sorted({name for record in records for name in record} - {"update", "time"})
    columns = {name: [_finite(record.get(name)) for record in records] for name in names}
    try:
        held_out = {
            update: value for update, value in held_out_points(run_dir, records).items() if value == value
        }
    except (ValueError, TypeError, AttributeError):
        held_out = {}
        notes.append("summary.json cannot be read: the evaluations before and after are left out")
    updates = [record["update"] for record in records]
    return RunFacts(run_dir.resolve().name, algorithm, modulation, updates, columns, held_out, notes)


def read_tolerantly(path: Path) -> tuple[list[Record], list[str]]:
    """Read the episodes of a file, as far as it can be read.

    Returns:
      ``(records, notes)``: the records in the order of the file, and what was left out.
    """
    content, notes = _read_bytes(path)
    *lines, rest = content.split(b"\n")
    if rest.strip():
        # A line without an end is whole if the file was written by hand; of a cut file it is a part.
        lines.append(rest)
    records, damaged = [], 0
    for line in filter(bytes.strip, lines):
        try:
            record = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if isinstance(record, dict) and isinstance(record.get("turns"), list):
            record["turns"] = [turn for turn in record["turns"] if isinstance(turn, dict)]
            records.append(record)
        else:
            damaged += 1
    if damaged:
        count = "1 line is" if damaged == 1 else f"{damaged} lines are"
        notes.append(f"{path.name}: {count} no episode and left out, {len(records)} are shown")
    return records, notes


def _read_bytes(path: Path) -> tuple[bytes, list[str]]:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                pieces, reason = _until_it_fails(file)
        else:
            pieces, reason = [path.read_bytes()], None
    except OSError as error:
        pieces, reason = [], str(error.strerror or error)
    notes = [] if reason is None else [f"{path.name} is cut or damaged ({reason}): what comes after is lost"]
    return b"".join(pieces), notes


def _until_it_fails(file: gzip.GzipFile) -> tuple[list[bytes], str | None]:
    """Read piece by piece, so that what stands before the damage is kept."""
    pieces: list[bytes] = []
    try:
        while piece := file.read1(PIECE):
            pieces.append(piece)
    except (OSError, EOFError, zlib.error) as error:
        return pieces, str(error)
    return pieces, None


def _read_algorithm(run_dir: Path, notes: list[str]) -> tuple[str, str]:
    import yaml

    path = run_dir / "config.yaml"
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))["algorithm"]
        return str(section.get("name") or section.get("entry_point") or ""), str(
            section.get("modulation") or ""
        )
    except FileNotFoundError:
        notes.append("no config.yaml: the name of the algorithm is not known")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        notes.append("config.yaml cannot be read: the name of the algorithm is not known")
    return "", ""


def _finite(value: Any) -> float | None:
    """Return a number rounded to what a picture shows; None for everything else."""
    known = finite(value)
    return None if known is None else float(f"{known:.6g}")
