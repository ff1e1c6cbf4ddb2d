"""Tests that run commands in a cage need bubblewrap; under CI its absence is a failure."""

import os

import pytest

from empg_envs.swe.bubblewrap import probe
from empg_envs.swe.sandbox import SandboxError


def has_cages() -> bool:
    try:
        probe()
    except SandboxError:
        return False
    return True


def need_cages() -> None:
    """Skips the present test where no sandbox runs; fails it under CI=true."""
    if has_cages():
        return
    message = "bubblewrap cannot run here: install it and allow user namespaces"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)
