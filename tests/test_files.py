"""Files that grow line by line: a disk that is full leaves whole lines."""

import json
import subprocess
import sys

import pytest

from empg_jax.files import append

# A limit of the file's size stands for the disk: the system writes what fits, and refuses the rest.
FULL = """
import resource, sys
from pathlib import Path
from empg_jax.errors import RunError
from empg_jax.metrics import MetricsLog
from empg_jax.report.events import EventLog
from empg_jax.run.consumed import write_consumed
from tests.run.test_consumed import batch

def limit(path, more):
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, resource.RLIM_INFINITY))

folder = Path(sys.argv[1])
events, metrics = EventLog(folder), MetricsLog(folder)
writes = {
    events.path: lambda: events.tell("rollback"),
    metrics.path: lambda: metrics.write(1, {"loss": 1.0}),
    folder / "consumed.jsonl": lambda: write_consumed(folder, 1, batch(0)),
}
for path, write in writes.items():
    limit(path, 2**20) if path.exists() else None
    write()
    limit(path, 10)
    try:
        write()
    except RunError as error:
        print(path.name)
        print(error, file=sys.stderr)
    limit(path, 2**20)
    write()
"""


def test_no_log_keeps_half_a_line(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], capture_output=True, text=True)
    names = ["events.jsonl", "metrics.jsonl", "consumed.jsonl"]
    assert (done.returncode, done.stdout.split()) == (0, names), done.stderr
    told = [f"{tmp_path / name} cannot be written: File too large" for name in names]
    assert done.stderr.splitlines() == told
    for name in names:
        lines = (tmp_path / name).read_text().splitlines()
        assert len(lines) == 2 and all(json.loads(line) for line in lines), name


class Short:
    """A file that takes a few bytes at a time, as many as it has room for."""

    name = "log"

    def __init__(self, room):
        self.content, self.room = b"old\n", room

    def write(self, content):
        taken = content[: min(4, self.room)]
        self.content, self.room = self.content + taken, self.room - len(taken)
        return len(taken)

    def tell(self):
        return len(self.content)

    def truncate(self, size):
        self.content = self.content[:size]


def test_what_a_short_write_left_out_is_written_or_the_line_is_removed():
    file = Short(room=100)
    append(file, b"0123456789\n")
    assert file.content == b"old\n0123456789\n"
    file = Short(room=7)
    with pytest.raises(OSError, match="No space left"):
        append(file, b"0123456789\n")
    assert file.content == b"old\n"
