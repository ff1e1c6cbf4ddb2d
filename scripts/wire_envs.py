"""Real environments of other packages, with words so few that a tiny policy learns them in seconds."""

from __future__ import annotations

import dataclasses

from empg_envs import ENVS

WORDS = [*"0123456789rps", "look", "go", "stay"]


def describe(observation) -> str:
    """Where the cart and its pole are."""
    return " ".join(f"{value:.1f}" for value in observation)


def _small(name: str):
    return dataclasses.replace(ENVS[name], name=f"small_{name}", phrases=lambda **options: WORDS)


GYMNASIUM = _small("gymnasium")
REASONING_GYM = _small("reasoning_gym")
TEXTARENA = _small("textarena")
OPENENV = _small("openenv")
