"""Opponents for games of two players of TextArena."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from empg_envs.adapters.rival import Rival
from empg_envs.names import import_function, suggest

OPPONENTS = ("random", "first")
_MOVE = re.compile(r"\[[^\[\]\n]{1,40}\]")

Opponent = Callable[[Any, random.Random], str]


def find_opponent(name: str, options: Mapping[str, Any] | None = None) -> Opponent:
    """Return a function from a game, in which it is the opponent's turn, and dice to a move.

    Args:
      name: ``random`` or ``first``, for a legal move among those that the game shows in brackets;
        ``package.module:function``, which gets the text of all that the opponent has seen, and dice; or the
        address of a server that speaks OpenAI's chat completions.
      options: further arguments of a `Rival`, the opponent at an address.

    Raises:
      ValueError: the name is unknown or cannot be imported, or the options do not fit.
    """
    if "://" in name:
        try:
            return Rival(name, **(options or {}))
        except TypeError as error:
            raise ValueError(f"opponent_options: {error}") from None
    if options:
        raise ValueError(f"opponent_options={dict(options)} are of an opponent at an address, not of {name}")
    if ":" in name:
        function = import_function("opponent", name)
        return lambda game, dice: str(function("\n".join(text for _, text, _ in _seen(game)), dice))
    if name not in OPPONENTS:
        raise ValueError(
            f"unknown opponent {name!r}{suggest(name, OPPONENTS)}; choose {', '.join(OPPONENTS)}, "
            "package.module:function or the address of a server"
        )
    return _choose_random if name == "random" else _choose_first


def _choose_random(game: Any, dice: random.Random) -> str:
    return _choose(game, lambda moves: dice.sample(moves, len(moves)))


def _choose_first(game: Any, dice: random.Random) -> str:
    return _choose(game, list)


def _choose(game: Any, order: Callable[[list[str]], list[str]]) -> str:
    """Return a legal move of the newest message of the game that shows one in brackets.

    Raises:
      ValueError: none does.
    """
    for _, text, kind in reversed(_seen(game)):
        if kind.name == "PLAYER_ACTION":  # a move of the policy's, which it would ape
            continue
        for move in order(list(dict.fromkeys(_MOVE.findall(text)))):
            if _is_legal(game, move):
                return move
    raise ValueError("the game shows no legal move in brackets: give opponent=package.module:function")


def _is_legal(game: Any, move: str) -> bool:
    """Try a move on a copy of the game."""
    trial, player = copy.deepcopy(game), game.state.current_player_id
    trial.step(move)
    return not trial.state.error_count and not trial.state.game_info[player].get("invalid_move")


def _seen(game: Any) -> list[Any]:
    """Return the messages (sender, text, kind) to the player on turn."""
    return game.state.observations[game.state.current_player_id]
