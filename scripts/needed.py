"""The packages that the checks and the study for accelerators need beside an image with JAX."""

from __future__ import annotations

import importlib.util
import sys

# By the module that is imported, the name that pip knows.
PACKAGES = {
    "jax": "jax",
    "flax": "flax",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "jaxtyping": "jaxtyping",
    "jinja2": "jinja2",
    "yaml": "pyyaml",
}


def check_packages() -> None:
    """End with one line that names the missing packages, before any time of a device is used.

    Raises:
      SystemExit: a package is missing.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        sys.exit(f"error: {sys.executable} lacks packages: pip install {' '.join(missing)}")
