"""The configuration: one strict object from a YAML file and dotted overrides.

Its names are looked up when they are first used, because they need pydantic: models, learner and engine run
without it, and so does training from a resolved configuration.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from empg_jax.config.load import Config as Config
    from empg_jax.config.load import check_resumable as check_resumable
    from empg_jax.config.load import describe as describe
    from empg_jax.config.load import list_choices as list_choices
    from empg_jax.config.load import load_config as load_config
    from empg_jax.config.load import make_config as make_config

__all__ = ["Config", "check_resumable", "describe", "list_choices", "load_config", "make_config"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("empg_jax.config.load"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
