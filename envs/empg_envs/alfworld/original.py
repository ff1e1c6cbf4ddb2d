"""The original engine, TextWorld, behind the same interface: a reference for tests of the native engine.

It needs the extra ``alfworld`` (MIT; its planner, a separate package, is GPL). It is a thousand times slower,
and its library allows only one game per process. Entry point:
``env.entry_point=empg_envs.alfworld.original:OriginalEnv``.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from empg_envs.alfworld.env import MAX_TURNS, open_panels
from empg_envs.alfworld.game import TASK
from empg_envs.draw import Draw

_HOW = "the original ALFWorld engine needs its packages: in the clone, pip install -e '.[alfworld]'"


class OriginalEnv:
    """`AlfworldEnv` played by TextWorld, with the same options and texts but without an expert.

    Release 2.1.2 uses the domain and grammar of the installed ``alfworld`` package instead of those in the
    official files. Release 2.1.1 plays official files unchanged.
    """

    def __init__(
        self,
        source: str | None = None,
        data: str | None = None,
        level: str = "rooms",
        release: str = "2.1.2",
        max_turns: int = MAX_TURNS,
        win_reward: float = 1.0,
    ) -> None:
        """Take the options of `AlfworldEnv`.

        Raises:
          ImportError: the extra is not installed.
        """
        try:
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise ImportError(f"{_HOW} ({error})") from error
        self._make = lambda: AlfredDemangler(PddlEnv(EnvInfos(admissible_commands=True, won=True)))
        self._panels = open_panels(source, data, level)
        self._release, self._max_turns, self._win_reward = release, max_turns, float(win_reward)
        self._draw = Draw("alfworld", "reset", 0)
        self._env: Any = None
        self._task: dict[str, Any] = {}
        self._turn = 0
        self._is_done = True

    def list_splits(self) -> list[str]:
        """Return the names of the task panels."""
        return self._panels.list_splits()

    def num_tasks(self, split: str) -> int:
        """Return the size of a panel."""
        return self._panels.num_tasks(split)

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        """Return the task as `AlfworldEnv` describes it."""
        return self._panels.describe(split, index)

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Start an episode. It takes a fraction of a second, but up to a minute for the largest rooms."""
        if seed is not None:
            self._draw = Draw("alfworld", "reset", seed)
        split = self.list_splits()[0] if split is None else split
        index = self._draw.below(self.num_tasks(split)) if index is None else index
        self._task = self._panels.describe(split, index)
        content = self._panels.content(split, index)
        if self._release == "2.1.2" and self._task["source"] == "official":
            content = _convert(content)
        self._env = self._make()
        self._env.load(content)
        state = self._env.reset()
        self._turn, self._is_done = 0, False
        return state.feedback, self._info(state)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Pass the text to TextWorld.

        Raises:
          RuntimeError: before the first reset, or after the end of the episode.
        """
        if self._is_done:
            raise RuntimeError(
                "step() without a running episode (it ended, or never began): call reset() first"
            )
        state, _, _ = self._env.step(action)
        self._turn += 1
        won = bool(state["won"])
        truncated = not won and self._turn >= self._max_turns
        self._is_done = won or truncated
        return state.feedback, self._win_reward * won, won, truncated, self._info(state)

    def close(self) -> None:
        """End the episode."""
        self._env, self._is_done = None, True

    def _info(self, state: Any) -> dict[str, Any]:
        return {
            "task": self._task["task"],
            "group": self._task["group"],
            "admissible": list(state["admissible_commands"]),
            "won": bool(state["won"]),
        }


def _convert(content: dict[str, Any]) -> dict[str, Any]:
    """Replace the domain and grammar of a file by those of the installed package."""
    spec = importlib.util.find_spec("alfworld")
    assert spec is not None and spec.origin is not None  # it was imported above
    data = Path(spec.origin).parent / "data"
    task = TASK.search(content["grammar"])
    assert task is not None  # the panel parsed the file
    grammar = (data / "alfred.twl2").read_text().replace("UNKNOWN GOAL.", task.group(1))
    return {**content, "pddl_domain": (data / "alfred.pddl").read_text(), "grammar": grammar}
