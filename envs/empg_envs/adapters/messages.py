"""What a player of a game of TextArena reads."""

from __future__ import annotations

from typing import Any

from empg_envs.adapters.foreign import import_package


def take_new(game: Any, player: int) -> str:
    """Take the messages that are new to a player, without its own; they are not shown again."""
    state, game_id = game.state, import_package("textarena").GAME_ID
    state.observations[player], messages = [], state.observations[player]
    names = state.role_mapping
    told = [
        text if sender == game_id else f"[{names.get(sender, sender)}] {text}"
        for sender, text, _ in messages
        if sender != player
    ]
    return "\n".join(told).strip() or "(nothing new)"
