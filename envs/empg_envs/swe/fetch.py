"""Download of source distributions from the package index, stored by their SHA-256."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class FetchError(RuntimeError):
    """A source distribution that cannot be downloaded or has another hash."""


def fetch_sdist(name: str, version: str, sha256: str | None, folder: Path, python: str | None = None) -> Path:
    """Download a source distribution with pip, unless the folder already has it.

    To get the metadata, pip runs the package's build code on this machine, outside of any sandbox. Fetch only
    packages that you would also install.

    Args:
      name: name of the project.
      version: its release.
      sha256: expected hash of the file; None accepts every file.
      folder: folder for the file ``SHA256.tar.gz`` (or ``.zip``).
      python: an interpreter with pip; None is the current one.

    Raises:
      FetchError: pip fails, or the hash differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sha256 is not None and (kept := sorted(folder.glob(f"{sha256}.*"))):
        return kept[0]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [python or sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-binary", ":all:", "--dest", scratch]
        found = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True)
        files = sorted(Path(scratch).iterdir())
        if found.returncode or len(files) != 1:
            said = [line for line in found.stderr.splitlines() if line.strip()]
            reason = said[-1] if said else f"{len(files)} files came"
            raise FetchError(f"pip cannot download the source of {name} {version}: {reason}")
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        if sha256 not in (None, digest):
            raise FetchError(f"{files[0].name} has SHA-256 {digest}, not {sha256}")
        target = folder / f"{digest}{'.zip' if files[0].suffix == '.zip' else '.tar.gz'}"
        os.replace(files[0], target)
    return target
