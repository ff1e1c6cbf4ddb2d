"""Lanes: a slow command holds up nobody, a hang is told from its neighbors, and order is kept."""

import collections
import json
import os
import signal
import threading
import time

import pytest

from empg_envs.lanes import Lanes
from empg_envs.worker import EnvHost
from empg_jax.workers.pool import EnvPool, PoolTimeouts
from tests.cages import need_cages
from tests.workers.pools import (
    PATIENT,
    SHORT,
    act,
    both,
    counts_in,
    gather,
    open_pool,
    reset_all,
    wait_for_exit,
)


def test_a_turn_of_64_slow_environments_takes_about_one_step():
    with open_pool("SlowEnv", num_workers=2, options={"latency": 0.3}) as pool:
        reset_all(pool, range(64))
        start = time.monotonic()
        replies = act(pool, dict.fromkeys(range(64), "x"))
        seconds = time.monotonic() - start
        assert seconds < 4.8  # one after another it takes 9.6 s
        assert [counts_in(replies[handle]) for handle in range(64)] == [1] * 64


@both
def test_one_lane_is_a_serial_worker():
    with open_pool("SlowEnv", lanes=1, options={"latency": 0.05}) as pool:
        reset_all(pool, range(4))
        start = time.monotonic()
        for handle in range(4):
            pool.step(handle, "x")
        order = []
        while len(order) < 4:
            order += [reply.handle for reply in pool.poll(None)]
        assert time.monotonic() - start >= 0.2 and order == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="lanes is 0"):
        open_pool(lanes=0)


def test_an_environment_that_shares_state_is_served_serially():
    with open_pool("SerialEnv", options={"latency": 0.02}) as pool:
        reset_all(pool, range(6))
        assert all(reply.failure is None for reply in act(pool, dict.fromkeys(range(6), "x")).values())


def test_quick_neighbors_of_a_slow_command_answer_at_once():
    with open_pool() as pool:
        reset_all(pool, range(4))
        pool.step(0, "sleep 2")
        start = time.monotonic()
        for turn in range(1, 6):
            replies = act(pool, dict.fromkeys(range(1, 4), "x"))
            assert [counts_in(replies[handle]) for handle in range(1, 4)] == [turn] * 3
        assert time.monotonic() - start < 1.9
        assert gather(pool, 1)[0].failure is None


def test_the_time_of_a_command_begins_when_it_is_sent():
    """However long the worker has been silent over another one, which may take longer."""
    with open_pool(timeouts=PoolTimeouts(start=30, reset=1.5, step=30)) as pool:
        reset_all(pool, [0])
        pool.step(0, "sleep 3")
        assert pool.poll(2) == []
        pool.reset(1, seed=1, split="train", index=1)
        assert all(reply.failure is None for reply in gather(pool, 2).values())
        assert pool.stats.restarts == 0


@pytest.mark.parametrize("lanes", [2, 3, 64])
def test_no_step_is_lost_or_doubled_where_slow_and_quick_ones_mix(lanes):
    handles, rounds = 12, 20
    with open_pool(lanes=lanes, options={"length": 10**9}) as pool:
        reset_all(pool, range(handles))
        done = dict.fromkeys(range(handles), 0)
        actions = {handle: "go" for handle in done}
        for handle, action in actions.items():
            pool.step(handle, action)
        while pool.stats.replies < handles * (rounds + 1):
            for reply in pool.poll(None):
                handle = reply.handle
                done[handle] += 1
                told = f"train/{handle}/1 step {done[handle]} after {actions[handle]!r}"
                assert reply.observation == told
                if done[handle] < rounds:
                    actions[handle] = "sleep 0.004" if (done[handle] + handle) % 3 == 0 else "go"
                    pool.step(handle, actions[handle])
        assert set(done.values()) == {rounds} and pool.poll(0.05) == []


@both
def test_a_hang_among_many_costs_one_episode_and_names_its_line():
    with open_pool(timeouts=SHORT, options={"length": 99}) as pool:
        reset_all(pool, range(8))
        for handle in range(8):
            pool.step(handle, "hang" if handle == 5 else "sleep 0.2")
        replies = gather(pool, 8)
        failure = replies.pop(5).failure
        assert failure.reason == "timeout" and "in step {'action': 'hang'} of train/5" in failure.detail
        assert "fakes.py" in failure.detail and failure.detail.count("Thread 0x") <= 1
        assert all(reply.failure is None for reply in replies.values())
        replies = act(pool, {handle: "x" for handle in range(8) if handle != 5})
        assert [counts_in(reply) for reply in replies.values()] == [2] * 7
        assert pool.stats.restarts == 1 and pool.stats.failures == {"timeout": 1}


def test_the_cause_of_a_death_among_many_is_found_and_nobody_else_pays():
    with open_pool(options={"length": 99}) as pool:
        reset_all(pool, range(6))
        for handle in range(5):
            pool.step(handle, "sleep 0.3")
        pool.poll(0.1)
        pool.step(5, "sleep-crash 0.1")
        replies = gather(pool, 6)
        assert replies.pop(5).failure.reason == "worker_died"
        assert [counts_in(reply) for reply in replies.values()] == [1] * 5
        # Once without anyone to blame, once with.
        assert pool.stats.restarts == 2


@both
def test_a_death_from_outside_among_many_costs_nothing():
    with open_pool(options={"length": 99}) as pool:
        reset_all(pool, range(4))
        for handle in range(4):
            pool.step(handle, "sleep 0.3")
        pool.poll(0.1)
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        wait_for_exit(pid)
        assert [counts_in(reply) for reply in gather(pool, 4).values()] == [1] * 4
        assert pool.stats.restarts == 1


def test_a_caller_that_is_away_blames_no_lane():
    with open_pool(timeouts=SHORT, options={"pad": 100_000}) as pool:
        reset_all(pool, range(6))
        for handle in range(6):
            pool.step(handle, "sleep 0.3")
        assert pool.poll(0.1) == []
        time.sleep(1.5)
        assert all(reply.failure is None for reply in gather(pool, 6).values())


def test_a_hang_is_found_by_a_caller_that_looks_only_now_and_then():
    """A large model decodes for seconds between two looks, and other episodes answer all the time."""
    with open_pool(timeouts=SHORT, options={"length": 999}) as pool:
        reset_all(pool, range(3))
        pool.step(0, "hang")
        end, failure = time.monotonic() + 60, None
        for handle in (1, 2):
            pool.step(handle, "x")
        while failure is None and time.monotonic() < end:
            time.sleep(0.6)
            for reply in pool.poll(0.0):
                failure = reply.failure or failure
                if reply.failure is None:
                    pool.step(reply.handle, "x")
        assert failure.reason == "timeout"


def test_computing_environments_are_not_stretched_by_threads():
    # Beside each other every step would take as long as all of them together, in every round.
    timeouts = PoolTimeouts(start=60, reset=60, step=60)
    with open_pool("ComputingEnv", timeouts=timeouts, options={"seconds": 0.05, "length": 99}) as pool:
        reset_all(pool, range(8))
        longest = []
        for _ in range(6):
            replies = act(pool, dict.fromkeys(range(8), "x"))
            longest.append(max(float(reply.info["seconds"]) for reply in replies.values()))
        assert min(longest) < 8 * 0.05


def run_lanes(commands, execute, limit):
    """Everything that lanes write, by kind."""
    lines = []
    Lanes(execute, iter(commands), lambda line: lines.append(json.loads(line)), limit).serve()
    end = time.monotonic() + 30
    while sum("id" in line for line in lines) < len(commands) and time.monotonic() < end:
        time.sleep(0.01)
    return lines


def test_commands_of_a_handle_keep_their_order_and_never_overlap():
    inside, order, lock = collections.Counter(), collections.defaultdict(list), threading.Lock()

    def execute(command):
        with lock:
            inside[command["env"]] += 1
            assert inside[command["env"]] == 1
        time.sleep(command["wait"])
        with lock:
            inside[command["env"]] -= 1
            order[command["env"]].append(command["id"])
        return json.dumps({"id": command["id"]}).encode() + b"\n"

    commands = [{"id": n, "env": n % 3, "wait": 0.01 if n % 4 else 0.0} for n in range(40)]
    lines = run_lanes(commands, execute, 4)
    assert all(order[handle] == [n for n in range(40) if n % 3 == handle] for handle in range(3))
    # What runs beside others is told before it is answered.
    running = [line["running"] for line in lines if "running" in line]
    assert running and len(set(running)) == len(running)
    places = {line["id"]: place for place, line in enumerate(lines) if "id" in line}
    for place, line in enumerate(lines):
        if "running" in line:
            assert places[line["running"]] > place


def test_quick_commands_stay_in_one_thread():
    threads = collections.Counter()

    def execute(command):
        threads[threading.get_ident()] += 1
        return json.dumps({"id": command["id"]}).encode() + b"\n"

    lines = run_lanes([{"id": n, "env": n % 5} for n in range(2000)], execute, 8)
    # On a busy machine a command may lose its processor, and then looks like a slow one.
    assert threads[threading.get_ident()] > 1800
    assert sorted(line["id"] for line in lines if "id" in line) == list(range(2000))


def transcripts(name, options, lanes):
    """Twelve episodes by a fixed rule, all at once, two handles on each task."""
    told = collections.defaultdict(list)
    with EnvPool(name, options, num_workers=1, lanes=lanes, timeouts=PATIENT) as pool:
        for handle in range(12):
            pool.reset(handle, seed=0, split="train", index=handle // 2)
        live = 12
        while live:
            for reply in pool.poll(None):
                assert reply.failure is None, reply.failure
                told[reply.handle].append([reply.observation, reply.reward, reply.info])
                turn = len(told[reply.handle])
                if reply.terminated or reply.truncated or turn > 8:
                    pool.release(reply.handle)
                    live -= 1
                    continue
                choices = reply.info.get("admissible") or ["look"]
                pool.step(reply.handle, choices[(7 * turn + reply.handle) % len(choices)])
    return dict(told)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("household", {"level": "hard", "style": "alfworld"}),
        ("alfworld", {"source": "generated", "level": "rooms"}),
        ("webshop", {"level": "standard", "style": "page"}),
        ("deepsearch", {"level": "hard", "style": "terse"}),
        ("swe", {"tools": "terse", "max_turns": 7}),
    ],
)
def test_packaged_environments_answer_alike_in_lanes(name, options):
    if name == "swe":
        need_cages()
    assert transcripts(name, options, 8) == transcripts(name, options, 1)


class AlwaysSlow(Lanes):
    """Hands on the lead before every command, as if all were slow."""

    _is_slow = property(lambda self: True, lambda self, value: None)


@pytest.mark.parametrize(
    ("name", "options"), [("household", {"level": "medium"}), ("deepsearch", {}), ("alfworld", {})]
)
def test_packaged_environments_answer_alike_when_every_command_has_its_thread(name, options):
    texts = ("look", "inventory", "go to desk 1", "<search>a</search>")
    found = []
    for kind, limit in ((Lanes, 1), (AlwaysSlow, 8)):
        host, told = EnvHost(name, options), {}

        def write(line, told=told):
            reply = json.loads(line)
            if "id" in reply:
                told[reply["id"]] = reply

        commands = [
            {"env": handle, "op": "reset", "args": {"seed": 0, "split": "train", "index": handle % 4}}
            for handle in range(16)
        ]
        commands += [
            {"env": handle, "op": "step", "args": {"action": text}} for text in texts for handle in range(16)
        ]
        numbered = iter([{"id": number, **command} for number, command in enumerate(commands)])
        kind(host.execute, numbered, write, limit).serve()
        end = time.monotonic() + 60
        while len(told) < len(commands) and time.monotonic() < end:
            time.sleep(0.01)
        assert all(reply["ok"] for reply in told.values())
        found.append(dict(sorted(told.items())))
    assert found[0] == found[1] and len(found[0]) == 80
