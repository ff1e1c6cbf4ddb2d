"""Tests of adapters need the packages of the extra ``adapters``, which is not among those of ``test``."""

import pytest


def need(*packages, install="pip install -e '.[adapters]'"):
    """Skips where a package is absent."""
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is absent: {install}")
