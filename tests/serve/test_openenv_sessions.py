"""Sessions of environments, with a socket and an environment that the test controls."""

import asyncio
import json
import sys
import threading

import numpy as np
import pytest

from empg_jax.serve.openenv import MOST_EARLY, Sessions
from empg_jax.serve.tinker.worker import Worker
from empg_jax.serve.wire import ApiError


class Socket:
    """A client's end: messages to come, and what was answered."""

    def __init__(self):
        self.coming, self.answers = asyncio.Queue(), asyncio.Queue()

    async def accept(self):
        pass

    async def receive(self):
        return await self.coming.get()

    async def send_text(self, text):
        self.answers.put_nowait(json.loads(text.encode()))

    async def close(self, code=1000):
        pass

    def ask(self, kind, **data):
        self.coming.put_nowait(
            {"type": "websocket.receive", "text": json.dumps({"type": kind, "data": data})}
        )

    def leave(self):
        self.coming.put_nowait({"type": "websocket.disconnect"})


class Hanging:
    """An environment whose steps end when the test says so."""

    def __init__(self):
        self.began, self.goes_on, self.closed = threading.Event(), threading.Event(), threading.Event()

    def list_splits(self):
        return ["train"]

    def num_tasks(self, split):
        return 1

    def reset(self, seed, *, split, index):
        return "begin", {}

    def step(self, message):
        self.began.set()
        self.goes_on.wait(60)
        if message == "exit":
            sys.exit("the end")
        return message, 1.0, False, False, {}

    def close(self):
        self.closed.set()


@pytest.mark.parametrize("last", [(), ("close",), ("state", "close")])
def test_a_client_that_leaves_during_a_step_frees_its_session(last):
    async def play():
        env = Hanging()
        sessions, socket = Sessions(lambda: env, has_threads=True, limit=1, idle=60), Socket()
        served = asyncio.ensure_future(sessions.serve(socket))
        socket.ask("reset")
        assert (await asyncio.wait_for(socket.answers.get(), 60))["type"] == "observation"
        socket.ask("step", message="a")
        assert await asyncio.to_thread(env.began.wait, 60) and sessions.active == 1
        for kind in last:
            socket.ask(kind)
        socket.leave()
        await asyncio.wait_for(served, 20)
        assert sessions.active == 0 and not env.goes_on.is_set()
        env.goes_on.set()
        assert await asyncio.to_thread(env.closed.wait, 60)

    asyncio.run(play())


class Numpy(Hanging):
    """An environment that computes its reward and its end with NumPy."""

    def step(self, message):
        reward = np.float32(message) if message.isdecimal() else message
        return message, reward, np.bool_(message == "2"), np.bool_(False), {"won": np.bool_(True)}


async def say_at_once(*texts, env=None):
    """The answers of an episode whose client sends all its messages before it reads one."""
    env = env or Hanging()
    env.goes_on.set()
    sessions, socket = Sessions(lambda: env, has_threads=True, limit=1, idle=60), Socket()
    socket.ask("reset")
    for text in texts:
        socket.ask("step", message=text)
    socket.ask("close")
    await asyncio.wait_for(sessions.serve(socket), 60)
    return [socket.answers.get_nowait()["data"] for _ in range(1 + len(texts))]


def test_an_environment_that_exits_or_repeats_half_a_character_is_answered():
    _, half, error, last = asyncio.run(say_at_once("\ud800", "exit", "b"))
    assert half["observation"]["text"] == "\ud800" and last["observation"]["text"] == "b"
    assert (error["code"], error["message"]) == ("EXECUTION_ERROR", "SystemExit: the end")


def test_results_of_numpy_are_answered_and_wrong_types_are_named():
    _, first, wrong, last = asyncio.run(say_at_once("1", "one", "2", env=Numpy()))
    assert [(answer["reward"], answer["done"]) for answer in (first, last)] == [(1.0, False), (2.0, True)]
    assert first["observation"]["info"] == {"won": True}
    told = "GarbageError: reward is str 'one'; expected a finite number"
    assert (wrong["code"], wrong["message"]) == ("EXECUTION_ERROR", told)


def test_work_that_exits_is_an_error_and_the_thread_goes_on():
    async def play():
        with Worker() as worker:
            with pytest.raises(ApiError, match="SystemExit: 3"):
                await asyncio.wait_for(worker.run(lambda: sys.exit(3)), 60)
            assert await asyncio.wait_for(worker.run(lambda: "more"), 60) == "more"

    asyncio.run(play())


def test_messages_that_come_early_are_answered_in_order():
    texts = [answer["observation"]["text"] for answer in asyncio.run(say_at_once(*"abc"))]
    assert texts == ["begin", "a", "b", "c"]


def test_a_client_that_sends_on_and_on_during_a_step_ends_its_session():
    async def play():
        env = Hanging()
        sessions, socket = Sessions(lambda: env, has_threads=True, limit=1, idle=60), Socket()
        socket.ask("reset")
        for _ in range(MOST_EARLY + 3):
            socket.ask("step", message="a")
        await asyncio.wait_for(sessions.serve(socket), 60)
        answers = [socket.answers.get_nowait() for _ in range(socket.answers.qsize())]
        assert answers[-1]["data"]["code"] == "SESSION_ERROR" and "64 messages" in str(answers[-1])
        env.goes_on.set()

    asyncio.run(play())
