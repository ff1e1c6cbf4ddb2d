"""Gymnasium: environments whose observations and actions are text, or are told and named as text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from empg_envs.adapters.foreign import ForeignEnv, Reply, import_package, make_sizes
from empg_envs.names import import_function, suggest


class GymnasiumEnv(ForeignEnv):
    """An environment of Gymnasium as text (env.options.id names it).

    A task is a seed of the environment. An action that it does not have changes nothing and costs a turn.

    Args:
      id: the registered name, for example ``FrozenLake-v1``; ``my_module:My-v0`` imports a module first.
      describe: ``package.module:function`` from an observation to text; or ``render``, for the picture in
        characters that an environment draws with ``render_mode="ansi"``. None: observations are text.
      actions: names of the actions of a ``Discrete`` space, in their order. None: the numbers themselves, or
        text.
      kwargs: further arguments of ``gymnasium.make``.
      win_return: return from which an episode is won. None: ``is_success`` or ``success`` in Gymnasium's
        info, else a positive reward at the end.
      tasks: number of training tasks.
      held_out: number of tasks of ``valid`` and of ``test``.
      max_turns: number of steps after which an episode is truncated.

    Raises:
      ValueError: the package or the environment does not exist, or a space is no text.
    """

    threads = False  # nothing is known about the code

    def __init__(
        self,
        id: str = "",
        *,
        describe: str | None = None,
        actions: Sequence[str] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        win_return: float | None = None,
        tasks: int = 1024,
        held_out: int = 128,
        max_turns: int = 100,
    ) -> None:
        super().__init__(f"gymnasium {id}", make_sizes(tasks, held_out), max_turns)
        self._gymnasium = import_package("gymnasium")
        self._id, self._win_return = id, win_return
        options = {**({"render_mode": "ansi"} if describe == "render" else {}), **(kwargs or {})}
        self._env = self._make(id, options)
        self._describe = self._find_description(describe)
        self._actions = self._find_actions(actions)
        self._told, self._total = "", 0.0
        self._given: Mapping[str, Any] = {}

    def close(self) -> None:
        """End the episode, and release what the environment holds."""
        super().close()
        self._env.close()

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        seen, self._given = self._env.reset(seed=self._seed_of(split, index))
        self._told, self._total = self._describe(seen), 0.0
        return self._told, self._info()

    def _act(self, action: str) -> Reply:
        space = self._env.action_space
        chosen = action.strip() if self._actions is None else self._actions.get(action.strip().lower())
        if chosen is None or not space.contains(chosen):
            return f"no such action\n{self._told}", 0.0, False, False, self._info()
        seen, reward, terminated, truncated, self._given = self._env.step(chosen)
        self._told, self._total = self._describe(seen), self._total + float(reward)
        terminated, truncated = bool(terminated), bool(truncated)
        info = self._info(is_paid_end=terminated and float(reward) > 0)
        return self._told, float(reward), terminated, truncated, info

    def _info(self, *, is_paid_end: bool = False) -> dict[str, Any]:
        # Told at every step: any may be the last one, by a limit of the caller's.
        info: dict[str, Any] = {"task": self._id, "won": self._has_won(is_paid_end)}
        if self._actions is not None:
            mask, start = self._given.get("action_mask"), int(self._env.action_space.start)
            offered = [name for name, n in self._actions.items() if mask is None or mask[n - start]]
            info["admissible"] = sorted(offered)
        return info

    def _has_won(self, is_paid_end: bool) -> bool:
        if self._win_return is not None:
            return self._total >= self._win_return
        for key in ("is_success", "success"):
            if key in self._given:
                return bool(self._given[key])
        return is_paid_end

    def _make(self, id: str, options: Mapping[str, Any]) -> Any:
        gymnasium = self._gymnasium
        if not id:
            raise ValueError("env.options.id names no environment; for example id=FrozenLake-v1")
        try:
            return gymnasium.make(id, disable_env_checker=True, **options)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            message = " ".join(str(error).split())
            hint = "" if "Did you mean" in message else suggest(id, gymnasium.registry)
            raise ValueError(f"gymnasium cannot make {id!r}: {message}{hint}") from None

    def _find_description(self, describe: str | None) -> Callable[[Any], str]:
        if describe == "render":
            return lambda seen: _without_colors(str(self._env.render()))
        if describe is not None:
            function = import_function("describe", describe)
            return lambda seen: str(function(seen))
        space = self._env.observation_space
        if not isinstance(space, self._gymnasium.spaces.Text):
            raise ValueError(
                f"observations of {self._id} are {space}, no text: give env.options.describe="
                "package.module:function, or render where it draws with characters"
            )
        return str

    def _find_actions(self, names: Sequence[str] | None) -> dict[str, int] | None:
        space, spaces = self._env.action_space, self._gymnasium.spaces
        if isinstance(space, spaces.Text) and names is None:
            return None
        if not isinstance(space, spaces.Discrete):
            raise ValueError(f"actions of {self._id} are {space}: expected Text, or Discrete with names")
        numbers = range(int(space.start), int(space.start + space.n))
        names = [str(number) for number in numbers] if names is None else [str(name) for name in names]
        if len({name.strip().lower() for name in names}) != space.n:
            raise ValueError(
                f"actions={names}: {self._id} has {space.n} actions, each with a name of its own"
            )
        return {name.strip().lower(): number for name, number in zip(names, numbers, strict=True)}


def _without_colors(text: str) -> str:
    """Drop a terminal's colors; what has a background of its own (the agent, often) is put in ``<>``."""
    marked = re.sub(r"\x1b\[4\dm(.*?)\x1b\[0m", r"<\1>", text)
    return re.sub(r"\x1b\[[\d;]*m", "", marked).strip("\n")
