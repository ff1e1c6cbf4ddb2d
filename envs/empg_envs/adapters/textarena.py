"""TextArena: games of one player, and of two against an opponent, which may be the policy itself."""

from __future__ import annotations

import contextlib
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from empg_envs.adapters.chance import Chance
from empg_envs.adapters.foreign import ForeignEnv, Reply, import_package, make_sizes
from empg_envs.adapters.messages import take_new
from empg_envs.adapters.opponents import find_opponent
from empg_envs.base import EnvFault
from empg_envs.names import suggest

PATIENCE = 200  # moves of the opponent in a row
TRIALS, TRIAL_MOVES = 3, 100  # games that an opponent plays against itself at the start, and their longest
MAX_ACTION = 4_000  # characters; games raise where int() refuses more digits than about that


class TextArenaEnv(ForeignEnv):
    """A game of TextArena, alone or against an opponent, with the package's own rewards.

    Observations hold what is new to the player. Illegal moves are answered, and end the game, by the game's
    own rules; of an action the first `MAX_ACTION` characters count. A task is a seed of the game; in games of
    two the policy begins in every other task.

    Args:
      id: the game's registered name.
      opponent: who plays against the policy; see `find_opponent`.
      opponent_options: further arguments of an opponent at an address (`Rival`).
      kwargs: further arguments of ``textarena.make``.
      tasks: number of training tasks.
      held_out: number of tasks of ``valid`` and of ``test``.
      players: 1 or 2; None: as many as the game accepts.
      max_turns: number of moves of the policy after which the game is truncated.

    Raises:
      ValueError: the package, the game or the opponent does not exist, the game takes more than two players
        or needs word lists that are not here, or does not go on showing the opponent a legal move.
    """

    threads = False  # games draw from the process' random numbers
    _tried: ClassVar[set[str]] = set()  # games whose trials went well, once per process

    def __init__(
        self,
        id: str = "TicTacToe-v0",
        *,
        opponent: str = "random",
        opponent_options: Mapping[str, Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        tasks: int = 1024,
        held_out: int = 128,
        players: int | None = None,
        max_turns: int = 100,
    ) -> None:
        super().__init__(f"textarena {id}", make_sizes(tasks, held_out), max_turns)
        self._arena = import_package("textarena")
        registry = import_package("textarena.envs.registration").ENV_REGISTRY
        if id not in registry:
            raise ValueError(f"textarena has no game {id!r}{suggest(id, registry)}")
        self._id, self._kwargs = id, dict(kwargs or {})
        self._opponent = find_opponent(opponent, opponent_options)
        self.replayable = "://" not in opponent  # else another program answers
        self._chance, self._dice = Chance(), random.Random(0)
        self._game: Any = None
        self._player = 0
        with self._chance.reigning(0):
            self._players = self._count_players((1, 2) if players is None else (players,))
            if self._players == 2 and ":" not in opponent:
                try:
                    self._try_opponent()
                except ValueError as error:
                    raise ValueError(f"{id}, opponent={opponent}: {error}") from None

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        seed = self._seed_of(split, index)
        self._dice = random.Random(f"opponent {seed}")
        with self._chance.reigning(seed):
            self._game = self._start(self._players, seed)
            self._player = index % self._players
            if self._let_opponent_move():
                raise EnvFault("game_over", f"{self._id} ended before the policy's first move")
            return take_new(self._game, self._player), self._info(False)

    def _act(self, action: str) -> Reply:
        with self._chance.reigning():
            done = bool(self._game.step(action[:MAX_ACTION])[0]) or self._let_opponent_move()
            observation = take_new(self._game, self._player)
        if not done:
            return observation, 0.0, False, False, self._info(False)
        rewards, told = self._game.close()
        told = told[self._player]
        is_invalid = bool(told.get("invalid_move"))
        reward = (rewards or {}).get(self._player, 0.0)
        if isinstance(reward, str):  # in a few games an illegal move's message stands in the reward's place
            reward, told = -1.0, {**told, "reason": reward}
        won = reward > 0 if self._players == 2 else reward >= 1
        ended = "lost" if reward < 0 else "draw" if self._players == 2 else "ended"
        end = {"outcome": "won" if won else "invalid_move" if is_invalid else ended}
        end["detail"] = str(told.get("reason") or "")
        return observation, float(reward), True, False, {**self._info(won), **end}

    def _info(self, won: bool) -> dict[str, Any]:
        return {"task": self._id, "won": won}

    def _let_opponent_move(self) -> bool:
        """Let the opponent move until it is the policy's turn; return whether the game has ended.

        Raises:
          EnvFault: it finds no legal move, or the turn does not pass on.
        """
        for _ in range(PATIENCE):
            if self._game.state.current_player_id == self._player:
                return False
            try:
                move = self._opponent(self._game, self._dice)
            except ValueError as error:
                raise EnvFault("opponent_stuck", f"{self._id}: {error}") from None
            if self._game.step(move)[0]:
                return True
        raise EnvFault("opponent_stuck", f"{self._id}: {PATIENCE} moves of the opponent, and still its turn")

    def _try_opponent(self) -> None:
        """Let the random opponent play both seats: some games show no move, or only an example of one.

        Raises:
          ValueError: it finds no legal move.
        """
        name = f"{self._id} {self._kwargs}"
        if name in self._tried:
            return
        choose = find_opponent("random")
        for seed in range(TRIALS):
            game, dice = self._start(2, seed), random.Random(seed)
            for _ in range(TRIAL_MOVES):
                if game.step(choose(game, dice))[0]:
                    break
        self._tried.add(name)

    def _count_players(self, counts: Sequence[int]) -> int:
        """Return the first number of players that the game accepts."""
        self._make()  # what keeps it from being made is told first
        cause = ""
        for count in counts:
            try:
                self._start(count, 0)
            except Exception as error:  # games refuse a number of players in ways of their own
                cause = f"{type(error).__name__}: {error}"
            else:
                return count
        raise ValueError(f"{self._id} is no game of {' or '.join(map(str, counts))} players ({cause})")

    def _start(self, players: int, seed: int) -> Any:
        """Make the game without its observation wrappers, which repeat the history, and start it."""
        game, wrappers = self._make(), []
        while isinstance(game, self._arena.Wrapper):
            wrappers.append(type(game))
            game = game.env
        for wrapper in reversed(wrappers):
            if issubclass(wrapper, self._arena.ActionWrapper):
                game = wrapper(game)
        game.reset(num_players=players, seed=seed)
        return game

    def _make(self) -> Any:
        try:
            with _no_downloads():
                return self._arena.make(self._id, **self._kwargs)
        except Exception as error:  # some games do not even load with each version of Python
            missing = re.search(r"Resource '?(\S+?)'? not found", str(error))
            cause = f"{type(error).__name__}: {error}"
            if missing:
                cause = f"its word list is not here: python -m nltk.downloader {missing[1]}"
            raise ValueError(f"textarena cannot make {self._id}: {cause}") from None


@contextlib.contextmanager
def _no_downloads() -> Iterator[None]:
    """Keep games from fetching word lists: what they need is here, or an error says so."""
    nltk = sys.modules.get("nltk")
    if nltk is None:
        yield
        return
    download = vars(nltk)["download"]
    vars(nltk)["download"] = lambda *arguments, **options: False
    try:
        yield
    finally:
        vars(nltk)["download"] = download
