"""Scripted agents, honest and hostile, through the worker's own code: outcomes, limits and cages hold.

``SWE_EPISODES=500 python -m pytest tests/envs/swe/test_swe_agents.py`` plays that many episodes;
``SWE_FIRST=500`` begins with another one.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from empg_envs.swe.tools import SUBMIT
from empg_envs.worker import EnvHost, resident_mb
from tests.cages import need_cages

EPISODES = int(os.environ.get("SWE_EPISODES", "14"))
FIRST = int(os.environ.get("SWE_FIRST", "0"))
OPTIONS: dict[str, Any] = {
    "tools": "bash",
    "max_turns": 8,
    "command_timeout": 5,
    "grade_timeout": 60,
    "limits": {"processes": 24, "memory_mb": 256, "disk_mb": 8},
}
END = f"echo {SUBMIT}"
EXPERT = None  # asks the environment's expert
Script = list[str | None]

# What an agent does, then the reward and the reason that must come of it.
AGENTS: dict[str, tuple[Script, float, str]] = {
    "expert": ([EXPERT] * 3, 1.0, "resolved"),
    "idle": ([END], 0.0, "no_patch"),
    "loafer": (["ls"] * 8, 0.0, "turn_limit"),
    "spoiler": (
        [EXPERT, EXPERT, "for f in *.py; do echo 'raise SystemExit' >> $f; done", END],
        0.0,
        "unresolved",
    ),
    "cheat": (["echo 'import os; os._exit(0)' > conftest.py; rm -r tests", END], 0.0, "suspect"),
    "sleeper": (["sleep 60", EXPERT, EXPERT, EXPERT], 1.0, "resolved"),
    "fork bomb": (["f() { f | f & }; f; sleep 9", EXPERT, EXPERT, EXPERT], 1.0, "resolved"),
    "memory": (
        ["for i in 1 2 3; do tail -c 200M /dev/zero & done; wait", EXPERT, EXPERT, EXPERT],
        1.0,
        "resolved",
    ),
    "disk": (["head -c 20M /dev/zero > big; rm big", EXPERT, EXPERT, EXPERT], 1.0, "resolved"),
    "killer": (
        ["kill -9 1; kill -9 -1; exec >/proc/1/fd/4; echo x", EXPERT, EXPERT, EXPERT],
        1.0,
        "resolved",
    ),
    "garbage": (["\x00\x1b[2J\ud800é`$(", "printf '\\377\\000' > bin.dat", END], 0.0, "no_patch"),
    "chatty": (["yes", EXPERT, EXPERT, EXPERT], 1.0, "resolved"),
    "leaver": (["setsid sleep 600 & disown", END], 0.0, "no_patch"),
    "linker": (["ln -s /etc/passwd a; ln -s / b; mkfifo c", END], 0.0, "no_patch"),
}


@pytest.fixture
def host() -> Iterator[EnvHost]:
    need_cages()
    host = EnvHost("swe", OPTIONS)
    yield host
    host.close()


def ask(host: EnvHost, op: str, **args: Any) -> dict[str, Any]:
    reply = json.loads(host.execute({"id": 0, "env": 0, "op": op, "args": args}))
    assert reply["ok"], reply
    return reply


def play(host: EnvHost, index: int, script: Script) -> dict[str, Any]:
    ask(host, "reset", seed=None, split="train", index=index)
    for number, action in enumerate(script):
        reply = ask(host, "step", action=ask(host, "expert")["action"] if action is EXPERT else action)
        assert len(reply["observation"]) < 11_000
        if number + 1 < len(script):
            assert not reply["terminated"] and not reply["truncated"] and reply["reward"] == 0.0
    return reply


def children() -> set[int]:
    """Processes below this one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


@pytest.mark.slow
def test_agents(host: EnvHost) -> None:
    before = children()
    names, sizes = list(AGENTS), []
    for episode in range(FIRST, FIRST + EPISODES):
        name = names[episode % len(names)]
        script, reward, reason = AGENTS[name]
        reply = play(host, (7 * episode) % 91, script)
        info = reply["info"]
        assert (name, reply["reward"], info["reason"]) == (name, reward, reason)
        assert info["won"] == (reward == 1.0)
        assert (info.get("outcome") == "suspect") == (reason == "suspect") == ("detail" in info)
        assert reply["truncated"] == (reason == "turn_limit") != reply["terminated"]
        sizes.append(resident_mb())
    host.close()
    assert children() <= before
    # Nothing piles up in the worker, either (the first round loads what it needs).
    if 4 * len(names) < EPISODES:
        assert sizes[-1] < sizes[2 * len(names)] + 64
