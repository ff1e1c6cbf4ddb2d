"""Fixed opponents for games of two players of TextArena."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

from empg_envs.adapters.foreign import import_function
from empg_envs.names import suggest

OPPONENTS = ("random", "first")
_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")

Opponent = Callable[[Any, random.Random], str]


def find_opponent(name: str) -> Opponent:
    """Return a function from a game, in which it is the opponent's turn, and dice to a move.

    Args:
      name: ``random`` or ``first``, for a legal move among those that the game shows in brackets; or
        ``package.module:function``, which gets the text of what the opponent has seen since its last move,
        and dice.

    Raises:
      ValueError: the name is unknown or cannot be imported.
    """
    if ":" in name:
        function = import_function("opponent", name)
        return lambda game, dice: str(function(_shown(game), dice))
    if name not in OPPONENTS:
        raise ValueError(
            f"unknown opponent {name!r}{suggest(name, OPPONENTS)}; choose {', '.join(OPPONENTS)} or "
            "package.module:function"
        )
    return _choose_random if name == "random" else _choose_first


def _choose_random(game: Any, dice: random.Random) -> str:
    moves = _moves(game)
    return _first_legal(game, dice.sample(moves, len(moves)))


def _choose_first(game: Any, dice: random.Random) -> str:
    return _first_legal(game, _moves(game))


def _moves(game: Any) -> list[str]:
    """Return the texts in brackets that the player on turn sees, without repetitions."""
    return list(dict.fromkeys(_MOVE.findall(_shown(game))))


def _first_legal(game: Any, moves: list[str]) -> str:
    """Return the first move that a copy of the game accepts.

    Raises:
      ValueError: it accepts none.
    """
    for move in moves:
        trial, player = copy.deepcopy(game), game.state.current_player_id
        trial.step(move)
        if not trial.state.error_count and not trial.state.game_info[player].get("invalid_move"):
            return move
    raise ValueError("the game shows no legal move in brackets: give opponent=package.module:function")


def _shown(game: Any) -> str:
    messages = game.state.observations[game.state.current_player_id]
    return "\n".join(text for _, text, _ in messages)
