"""A server of the real OpenEnv package: say the number that the observation shows. Prints its address."""

import socket

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Say(Action):
    message: str


class Seen(Observation):
    say: str


class SayEnv(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state, self._secret = State(), 0

    def reset(self, seed=None, episode_id=None, **options):
        self._secret = (seed or 0) % 1000
        self._state = State(episode_id=episode_id)
        return Seen(say=str(self._secret))

    def step(self, action, timeout_s=None, **options):
        self._state.step_count += 1
        if action.message == "break":
            raise RuntimeError("broken")
        is_right = action.message == str(self._secret)
        return Seen(say=str(self._secret), reward=float(is_right), done=is_right)

    @property
    def state(self):
        return self._state


listener = socket.create_server(("127.0.0.1", 0))
print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
app = create_app(SayEnv, Say, Seen, env_name="say", max_concurrent_envs=2)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
