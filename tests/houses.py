"""A household that pays at random and breaks on request, for whole runs with a policy that knows nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from typing import Any

from empg_envs import EnvSpec
from empg_envs.household.env import HouseholdEnv
from empg_envs.household.prompt import make_parser, make_prompts, phrases


class NoisyHouse(HouseholdEnv):
    """Every third text wins, so that attempts at a task differ in return and in length.

    Args:
      trouble: what the last of the first two steps of an episode does: ``raise``, ``hang`` or ``kill``.
      times: how often, over all processes.
      diary: a file that counts the troubles.
      latency: seconds that a step takes.
      spy: a file that is told which packages this process has loaded.
      backend: a file without which every step raises.
      broken: every so many tasks of ``train``, one cannot be reset; 0 for none.
      wordy: number of first tasks of ``train`` that begin with a text that no small conversation holds.
      tasks: number of tasks of ``train``; None: the household's.
      **options: of the household.
    """

    def __init__(
        self,
        trouble: str | None = None,
        times: int = 1,
        diary: str | None = None,
        latency: float = 0.0,
        spy: str | None = None,
        backend: str | None = None,
        broken: int = 0,
        wordy: int = 0,
        tasks: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.trouble, self.times, self.diary, self.latency, self.spy = trouble, times, diary, latency, spy
        self.backend, self.broken, self.wordy, self.tasks = backend, broken, wordy, tasks

    def num_tasks(self, split: str) -> int:
        return self.tasks if self.tasks and split == "train" else super().num_tasks(split)

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        if self.broken and split == "train" and index is not None and index % self.broken == 0:
            raise RuntimeError("this house was never built")
        observation, info = super().reset(seed, split=split, index=index)
        is_wordy = split == "train" and index is not None and index < self.wordy
        return (" ".join([observation] * 99) if is_wordy else observation), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        time.sleep(self.latency)
        if self.backend and not os.path.exists(self.backend):
            raise ConnectionError("the backend does not answer")
        if self.spy:
            with open(self.spy, "w") as file:
                file.write(" ".join(sorted({name.partition(".")[0] for name in sys.modules})))
        observation, _, _, truncated, info = super().step(action)
        if self.trouble and self._turn == 2 and self._write_diary() <= self.times:
            match self.trouble:
                case "raise":
                    raise RuntimeError("the house burnt down")
                case "hang":
                    time.sleep(3600)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
        won = zlib.crc32(f"{self._turn} {action}".encode()) % 3 == 0
        told = {**info, "won": won, "metrics": {"steps": self._turn}}
        return observation, float(won), won, truncated and not won, told

    def _write_diary(self) -> int:
        """Counts one more; returns the count."""
        with open(str(self.diary), "a+") as file:
            file.write("x")
            file.flush()
            file.seek(0)
            return len(file.read())


HOUSE = EnvSpec(
    name="noisy-house",
    make=NoisyHouse,
    prompts=make_prompts,
    parser=make_parser,
    phrases=lambda level="tiny", style="terse", **options: phrases(level=level, style=style),
)


class _Mute:
    """A household whose expert says nothing."""

    def __init__(self, **options: Any) -> None:
        self._house = NoisyHouse(**options)

    def __getattr__(self, name: str) -> Any:
        if name == "expert_action":
            raise AttributeError(name)
        return getattr(self._house, name)


MUTE = EnvSpec(name="mute-house", make=_Mute, prompts=make_prompts, parser=make_parser)
