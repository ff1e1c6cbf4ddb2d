"""Servers in processes of their own, by the command that a user types."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_SECONDS = 240


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server; `process` is the command's."""

    process: subprocess.Popen
    url: str
    model: str


@contextlib.contextmanager
def serving(folder: Path | str, *command: object) -> Iterator[Server]:
    """Yield the server that ``empg-jax COMMAND`` starts; ``folder`` takes its files.

    Raises:
      RuntimeError: it does not start; the message is what it wrote.
    """
    ready = Path(folder) / "ready.json"
    errors = (Path(folder) / "stderr.txt").open("w+")
    # One device, as on a user's machine.
    environment = {
        **os.environ,
        "XLA_FLAGS": "",
        "EMPG_API_KEY": "",
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "envs"), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")]
        ),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "empg_jax", *map(str, command), "--ready-file", str(ready)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + START_SECONDS
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"{' '.join(map(str, command))} did not start: {Path(errors.name).read_text()}"
                )
            time.sleep(0.05)
        yield Server(process, **json.loads(ready.read_text()))
    finally:
        process.kill()
        process.communicate()
        errors.close()
