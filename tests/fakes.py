"""Fakes for tests: environments that count, raise, hang, lie, crash, grow or take their time.

Each is reached from a worker process by entry point, for example ``tests.fakes:CountingEnv``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from typing import Any, ClassVar


class CountingEnv:
    """Every observation tells the task and how many steps were made, so a lost or doubled step shows.

    The reward of the last step is 1. ``pad`` characters are added to every observation.
    """

    def __init__(self, length: int = 10, tasks: int = 100, pad: int = 0):
        self.length, self.tasks, self.pad = length, tasks, pad
        self.key, self.count = "", -1

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.key, self.count = f"{split}/{index}/{seed}", 0
        return self._observe(""), {"task": f"count to {self.length}", "won": False}

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        self.count += 1
        won = self.count >= self.length
        return self._observe(action), float(won), won, False, {"won": won}

    def close(self) -> None:
        pass

    def list_splits(self) -> list[str]:
        return ["train", "test"]

    def num_tasks(self, split: str) -> int:
        return self.tasks

    def get_task(self, split: str, index: int) -> dict[str, Any]:
        return {"split": split, "index": index}

    def expert_action(self) -> str:
        return f"count {self.count + 1}"

    def _observe(self, action: str) -> str:
        return f"{self.key} step {self.count} after {action!r}" + "." * self.pad


class FaultyEnv(CountingEnv):
    """Does what the action says: ``raise``, ``exit``, ``crash``, ``kill``, ``hang``, ``noise``, ...

    A task index in ``broken`` raises at reset.
    """

    hoard: ClassVar[list[bytes]] = []  # a leak outlives the instance

    def __init__(self, broken: tuple[int, ...] = (), **options: Any):
        super().__init__(**options)
        self.broken = tuple(broken)

    def reset(self, seed: int | None = None, *, split: str | None = None, index: int | None = None) -> Any:
        result = super().reset(seed, split=split, index=index)
        if index in self.broken:
            raise RuntimeError(f"task {index} is broken")
        return result

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        observation, reward, terminated, truncated, info = super().step(action)
        match action.split():
            case ["raise"]:
                raise ValueError("the environment broke")
            case ["exit"]:
                raise SystemExit(3)
            case ["crash"]:
                print("last words", flush=True)
                os._exit(7)
            case ["kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["hang"]:
                time.sleep(3600)
            case ["raise-once", path] if not os.path.exists(path):
                open(path, "x").close()
                raise ValueError("the environment broke once")
            case ["hang-again", path]:  # the first time it only leaves a mark
                if os.path.exists(path):
                    time.sleep(3600)
                open(path, "x").close()
            case ["sleep", seconds]:
                time.sleep(float(seconds))
            case ["sleep-crash", seconds]:
                time.sleep(float(seconds))
                os._exit(7)
            case ["noise"]:
                print('{"id": 1, "ok": true}\n' * 50)
                os.write(1, b"raw noise on the first descriptor\n")
            case ["flood" | "flood-hang" as kind, megabytes]:
                for _ in range(int(megabytes)):
                    os.write(2, b"x" * (1 << 20))
                if kind == "flood-hang":
                    time.sleep(3600)
            case ["input"]:
                input()
            case ["grow", megabytes]:
                self.hoard.append(os.urandom(1) * (int(megabytes) << 20))
            case ["garbage", "observation"]:
                return 3, reward, terminated, truncated, info
            case ["garbage", "reward"]:
                return observation, float("nan"), terminated, truncated, info
            case ["garbage", "flag"]:
                return observation, reward, "no", truncated, info
            case ["garbage", "tuple"]:
                return observation, reward  # type: ignore[return-value]
            case ["garbage", "info"]:
                return observation, reward, terminated, truncated, {"env": self}
            case ["garbage", "won" | "milestone" as name]:
                return observation, reward, terminated, truncated, {**info, name: "False"}
            case ["garbage", "array"]:
                import numpy as np  # here alone, because a worker itself does without

                return observation, reward, terminated, truncated, {**info, "seen": [{"at": np.zeros(2)}]}
            case ["numpy"]:
                import numpy as np

                numbers = {"count": np.int64(3), "metrics": {"share": np.float32(0.5)}}
                flags = {"won": np.bool_(True), "milestone": np.bool_(True)}
                return observation, reward, terminated, truncated, {**flags, **numbers}
            case ["garbage", "metrics", kind]:
                values = {
                    "none": {"x": None},
                    "list": [1.0],
                    "word": {"x": "high"},
                    "nan": {"x": float("nan")},
                }
                return observation, reward, terminated, truncated, {**info, "metrics": values[kind]}
            case ["garbage", "answer"]:
                return observation, reward, terminated, truncated, {**info, "known_answer": "Oslo"}
            case ["garbage", "text"]:
                return "half a \ud83d", reward, terminated, truncated, info
            case ["garbage", "word"]:
                return observation, reward, terminated, truncated, {**info, "detail": ["half \udc80"]}
            case ["garbage", "words"]:
                raise ValueError("half \udc80 of a text")
            case ["garbage", "size"]:
                return "x" * (16 << 20), reward, terminated, truncated, info
        return observation, reward, terminated, truncated, info


class NondeterministicEnv(FaultyEnv):
    """Its observations depend on the process, so a replay elsewhere differs."""

    def _observe(self, action: str) -> str:
        return f"{super()._observe(action)} by {os.getpid()}"


class SlowEnv(CountingEnv):
    """Answers after ``latency`` seconds; takes ``start`` seconds to be built."""

    def __init__(self, latency: float = 0.005, start: float = 0.0, **options: Any):
        super().__init__(**options)
        self.latency = latency
        time.sleep(start)

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        time.sleep(self.latency)
        return super().step(action)


class ComputingEnv(CountingEnv):
    """Computes for some seconds of its process' time, and tells how long that took."""

    def __init__(self, seconds: float = 0.05, **options: Any):
        super().__init__(**options)
        self.seconds = seconds

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        start, spent = time.monotonic(), time.thread_time()
        while time.thread_time() < spent + self.seconds:
            pass
        *rest, info = super().step(action)
        return (*rest, {**info, "seconds": time.monotonic() - start})


class UnreliableEnv(CountingEnv):
    """Crashes the worker or hangs with a given chance per step, unrelated to the episode's seed."""

    def __init__(self, crash: float = 0.01, hang: float = 0.01, **options: Any):
        super().__init__(**options)
        self.crash, self.hang = crash, hang
        self.chance = random.Random(os.getpid() * 1_000_003 + time.monotonic_ns())

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        draw = self.chance.random()
        if draw < self.crash:
            os._exit(9)
        if draw < self.crash + self.hang:
            time.sleep(3600)
        return super().step(action)


class EndingEnv(CountingEnv):
    """``cut`` truncates an episode with a reward that is no victory; ``win`` is one without a reward."""

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        if action not in ("cut", "win"):
            return super().step(action)
        is_cut = action == "cut"
        return self._observe(action), 0.5 * is_cut, not is_cut, is_cut, {"won": not is_cut}


class TailEnv(UnreliableEnv):
    """Every fourth task takes ``stretch`` times as long; a step takes ``latency`` seconds."""

    def __init__(self, stretch: int = 4, latency: float = 0.0, **options: Any):
        super().__init__(**options)
        self.stretch, self.usual, self.latency = stretch, self.length, latency

    def reset(
        self, seed: int | None = None, *, split: str | None = None, index: int | None = None
    ) -> tuple[str, dict[str, Any]]:
        self.length = self.usual * (1 if index % 4 else self.stretch)
        return super().reset(seed, split=split, index=index)

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        time.sleep(self.latency)
        return super().step(action)


class UnstartableEnv(CountingEnv):
    """Ends its process while it is being built."""

    def __init__(self) -> None:
        super().__init__()
        print("no licence found", flush=True)
        os._exit(4)


class FlakyStartEnv(CountingEnv):
    """Cannot be built the first ``failures`` times; the file ``path`` remembers the attempts."""

    def __init__(self, path: str, failures: int):
        super().__init__()
        with open(path, "a+") as file:
            file.write("x")
            file.flush()
            file.seek(0)
            attempts = len(file.read())
        if attempts <= failures:
            raise ConnectionError(f"attempt {attempts}: the server does not answer yet")


class UnreplayableEnv(FaultyEnv):
    """Tells the process that it runs in, and declares that it cannot be replayed."""

    replayable = False

    def _observe(self, action: str) -> str:
        return f"{super()._observe(action)} by {os.getpid()}"


class SnapshotEnv(UnreplayableEnv):
    """Cannot be replayed either, but tells its state; ``restores`` counts how often it was restored."""

    restores = 0

    def snapshot(self) -> dict[str, Any]:
        return {"key": self.key, "count": self.count}

    def restore(self, state: dict[str, Any]) -> None:
        self.key, self.count = state["key"], state["count"]
        self.restores += 1

    def _observe(self, action: str) -> str:
        return f"{self.key} step {self.count} after {action!r}, restored {self.restores} times"


class SerialEnv(SlowEnv):
    """Keeps its state in the module and says so; any overlap of two steps shows."""

    threads = False
    inside = 0

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        SerialEnv.inside += 1
        assert SerialEnv.inside == 1
        try:
            return super().step(action)
        finally:
            SerialEnv.inside -= 1


class BackendEnv(CountingEnv):
    """Needs a backend, a file, ``at``: ``reset``, ``step``, ``start``, or ``silent`` (a step that hangs)."""

    def __init__(self, path: str, at: str = "step", **options: Any):
        super().__init__(**options)
        self.path, self.at = path, at
        if at == "start":
            self._ask()

    def reset(self, seed: int | None = None, *, split: str | None = None, index: int | None = None) -> Any:
        if self.at == "reset":
            self._ask()
        return super().reset(seed, split=split, index=index)

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        if action == "crash":
            os._exit(7)
        if self.at in ("step", "silent"):
            self._ask()
        return super().step(action)

    def _ask(self) -> None:
        if not os.path.exists(self.path):
            if self.at == "silent":
                time.sleep(3600)
            raise ConnectionError("the backend does not answer")


class ParentEnv(CountingEnv):
    """Starts a child that leaves its session, and tells its process id; ``orphan`` loses its parent, too."""

    def step(self, action: str) -> tuple[Any, Any, Any, Any, Any]:
        command = "exec sleep 3600"
        if action == "orphan":
            command = "setsid sleep 3600 & echo $!; sleep 0.2"
        variables = {"PATH": os.environ["PATH"]} if action == "nameless" else None
        child = subprocess.Popen(
            ["sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=variables,
        )
        number = child.pid
        if action == "orphan":
            assert child.stdout is not None
            number = int(child.stdout.readline())
            child.wait()
        _, *rest = super().step(action)
        return (str(number), *rest)


class TellingEnv(CountingEnv):
    """Its observations are the environment variables of its process."""

    def _observe(self, action: str) -> str:
        return json.dumps(dict(os.environ))
