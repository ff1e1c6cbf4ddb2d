"""OpenEnv: environments behind a server that speaks OpenEnv's WebSocket messages."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from typing import Any

from empg_envs.adapters.foreign import ForeignEnv, Reply, import_package, make_sizes
from empg_envs.base import EnvFault
from empg_envs.names import import_function

API_KEY = "OPENENV_API_KEY"  # the variable with the bearer token; workers.pass_env hands it on
MAX_BYTES = 16 << 20  # of one message


class OpenEnvEnv(ForeignEnv):
    """An environment behind an OpenEnv server, one session per episode.

    A task is the seed that the server's ``reset`` gets.

    Args:
      url: address of the server, for example ``http://127.0.0.1:8000``. Its bearer token, if it needs
        one, is the environment variable ``OPENENV_API_KEY``, which a run hands on to its workers with
        ``workers.pass_env=[OPENENV_API_KEY]``.
      action: name of the action's field that takes the policy's text; ``json``: the text is the whole action,
        an object.
      observe: name of the observation's field that the policy reads, or ``package.module:function`` from the
        observation to text. None: all fields, as JSON.
      task: description of the task, in front of the first observation.
      win_return: return from which an episode is won. None: the verdict of an environment behind
        ``empg-jax serve-env``, else a positive reward at the end.
      tasks: number of training tasks.
      held_out: number of tasks of ``valid`` and of ``test``.
      max_turns: number of steps after which an episode is truncated.
      timeout: seconds for an answer; keep it below ``workers.step_timeout``.

    Raises:
      ValueError: the package ``websockets`` is not installed, or there is no address.
    """

    replayable = False  # nothing is known about the server

    def __init__(
        self,
        url: str = "",
        *,
        action: str = "message",
        observe: str | None = None,
        task: str = "",
        win_return: float | None = None,
        tasks: int = 1024,
        held_out: int = 128,
        max_turns: int = 50,
        timeout: float = 8.0,
    ) -> None:
        super().__init__("openenv", make_sizes(tasks, held_out), max_turns)
        self._client = import_package("websockets.sync.client", "websockets")
        scheme, separator, place = url.partition("://")
        if not separator or scheme not in ("http", "https", "ws", "wss"):
            raise ValueError(f"env.options.url={url!r}: expected a server, for example http://127.0.0.1:8000")
        self._url = f"{scheme.replace('http', 'ws')}://{place.rstrip('/')}/ws"
        self._field, self._observe = action, _find_reader(observe)
        self._goal, self._win_return, self._timeout = task, win_return, timeout
        self._session = contextlib.ExitStack()
        self._socket: Any = None
        self._total, self._won = 0.0, False

    def close(self) -> None:
        """End the episode and its session."""
        super().close()
        with contextlib.suppress(Exception):  # the server may be gone
            if self._socket is not None:
                self._socket.send(json.dumps({"type": "close"}))
            self._session.close()
        self._socket = None

    def _begin(self, split: str, index: int) -> tuple[str, dict[str, Any]]:
        self.close()
        limits = {"open_timeout": self._timeout, "close_timeout": 1, "max_size": MAX_BYTES}
        key = os.environ.get(API_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            connection = self._client.connect(self._url, proxy=None, additional_headers=headers, **limits)
            self._socket = self._session.enter_context(connection)
        except Exception as error:
            detail = f"{self._url}: {type(error).__name__}: {error}"
            status = getattr(getattr(error, "response", None), "status_code", None)  # of a refused handshake
            if status in (401, 403):
                detail += f"; the token comes from {API_KEY} (workers.pass_env=[{API_KEY}])"
            raise EnvFault("openenv_unreachable", detail) from None
        result = self._ask("reset", {"seed": self._seed_of(split, index)})
        self._total, self._won = 0.0, False
        observation = self._observe(result["observation"])
        return f"{self._goal}\n\n{observation}" if self._goal else observation, self._info()

    def _act(self, action: str) -> Reply:
        text, reward, terminated, truncated = self._play(action)
        if terminated or truncated or self._turn + 1 >= self._max_turns:  # the server may have few sessions
            self.close()
        return text, reward, terminated, truncated, self._info()

    def _play(self, action: str) -> tuple[str, float, bool, bool]:
        """Return what `step` does, but for ``info``."""
        sent: Any = {self._field: action}
        if self._field == "json":
            try:
                sent = json.loads(action)
            except (ValueError, RecursionError):
                sent = None
            if not isinstance(sent, dict):
                return "error: an action is a JSON object", 0.0, False, False
        result = self._ask("step", sent)
        if "refusal" in result:
            return f"error: {result['refusal']}", 0.0, False, False
        reward, done = float(result.get("reward") or 0.0), bool(result.get("done", False))
        if not math.isfinite(reward):
            raise EnvFault("openenv_error", f"step: the reward is {reward}")
        self._total += reward
        won, is_cut = _read_verdict(result["observation"])
        self._won = won if won is not None else done and reward > 0
        return self._observe(result["observation"]), reward, done and not is_cut, done and is_cut

    def _info(self) -> dict[str, Any]:
        # Told at every step: any may be the last one, by a limit of the caller's.
        won = self._won if self._win_return is None else self._total >= self._win_return
        return {"task": self._goal or self._url, "won": won}

    def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the data of its answer.

        Raises:
          EnvFault: the answer is an error (but that an action does not fit the schema), or none comes.
        """
        try:
            with contextlib.suppress(Exception):  # a server that closed at once may have said why
                self._socket.send(json.dumps({"type": kind, "data": data}))
            answer = json.loads(self._socket.recv(timeout=self._timeout))
        except TimeoutError:
            raise EnvFault("openenv_timeout", f"no answer to {kind} in {self._timeout:g} s") from None
        except Exception as error:  # closed, or no JSON
            raise EnvFault("openenv_error", f"{kind}: {type(error).__name__}: {error}") from None
        found = answer.get("data") or {}
        if answer.get("type") == "error":
            message = str(found.get("message", "no message"))
            if kind == "step" and found.get("code") == "VALIDATION_ERROR":
                return {"refusal": message}  # the policy's own fault
            raise EnvFault("openenv_error", f"{kind}: {message} ({found.get('code')})")
        if "observation" not in found:
            raise EnvFault("openenv_error", f"{kind}: an answer without observation: {answer!r:.300}")
        return found


def _read_verdict(seen: Any) -> tuple[bool | None, bool]:
    """Return whether an observation of ``empg-jax serve-env`` is won, and truncated; else None and False."""
    if not isinstance(seen, dict):
        return None, False
    info, truncated = seen.get("info"), seen.get("truncated")
    # Both: elsewhere the one may be said of a long text.
    if not isinstance(info, dict) or not isinstance(truncated, bool):
        return None, False
    return bool(info.get("won", False)), truncated


def _find_reader(observe: str | None) -> Callable[[Any], str]:
    """Return the function from an observation to the policy's text."""
    if observe is not None and ":" in observe:
        function = import_function("observe", observe)
        return lambda seen: str(function(seen)) or "(nothing)"

    def read(seen: Any) -> str:
        if observe is not None:
            if not isinstance(seen, dict) or observe not in seen:
                raise EnvFault("openenv_error", f"the observation has no field {observe!r}: {seen!r:.300}")
            seen = seen[observe]
        text = seen if isinstance(seen, str) else json.dumps(seen, ensure_ascii=False)
        return text or "(nothing)"

    return read
