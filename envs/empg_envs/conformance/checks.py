"""The checks: each takes a `Subject` and raises an AssertionError that says what was wrong."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs import options_of
from empg_envs.conformance.replies import check_opening, check_reply, is_json, require
from empg_envs.conformance.subject import MOVES, Subject, advance, play

PATIENCE = 10_000  # actions after which an episode must have ended
LIVE = 4  # episodes that are played at the same time
TEXTS = (
    "",
    " ",
    "\n",
    "look",
    "0",
    "-1",
    "{}",
    "[",
    "]]",
    "<action>",
    "null",
    "é\u4e00\U0001f600",
    "\x00",
    "x" * 5000,
    "[" + "9" * 5000 + "]",  # more digits than int() reads
    "\ud83d",  # half of a character: UTF-8 cannot say it
)


def check_types(subject: Subject) -> None:
    """Splits, tasks, observations, rewards and info have their types."""
    with subject.open() as env:
        splits = env.list_splits()
        is_fine = splits and all(isinstance(split, str) for split in splits)
        require(is_fine, f"list_splits() returned {splits!r}")
        for split in splits:
            count = env.num_tasks(split)
            require(isinstance(count, int) and count > 0, f"num_tasks({split!r}) returned {count!r}")
            task = env.get_task(split, count - 1)
            require(is_json(task), f"get_task({split!r}, {count - 1}) is no JSON: {task!r:.200}")
            require(task.get("content_hash"), f"get_task({split!r}, {count - 1}) has no content_hash")
        for split, index in subject.tasks(env):
            check_opening(env.reset(seed=1, split=split, index=index))
            check_reply(env.step("look"))


def check_repetition(subject: Subject) -> None:
    """Two instances tell the same episode."""
    if not _is_replayable(subject):
        return
    with subject.open() as one, subject.open() as two:
        for split, index in subject.tasks(one):
            message = f"two instances differ in {split}/{index}"
            _same(play(one, split, index), play(two, split, index), message)


def check_live_episodes(subject: Subject) -> None:
    """Episodes that are played a move of each in turn go as they go alone."""
    _play_together(subject, map)


def check_threads(subject: Subject) -> None:
    """Episodes that are played in several threads go as they go alone."""
    with subject.open() as env:
        if not getattr(env, "threads", True):
            return
    with concurrent.futures.ThreadPoolExecutor(LIVE) as pool:
        _play_together(subject, pool.map)


def _play_together(subject: Subject, run: Callable[..., Iterator[None]]) -> None:
    """Play several episodes at the same time, the last one of the first one's task.

    Args:
      subject: the environment.
      run: ``map``, or that of a pool of threads, for the moves of a round.
    """
    with subject.open() as env:
        tasks = subject.tasks(env)[: LIVE - 1]
    tasks.append(tasks[0])
    logs: list[list[str]] = [[] for _ in tasks]
    with contextlib.ExitStack() as stack:
        envs = [stack.enter_context(subject.open()) for _ in tasks]
        for _ in range(1 + MOVES):
            list(run(advance, envs, *zip(*tasks, strict=True), logs))
    if not _is_replayable(subject):
        return
    for (split, index), log in zip(tasks, logs, strict=True):
        with subject.open() as env:
            alone = play(env, split, index)
        _same(alone, log, f"{split}/{index} differs alone and among {len(tasks)} episodes at a time")


def check_snapshots(subject: Subject) -> None:
    """An episode goes on in a new instance from a snapshot as it would have gone on without."""
    with subject.open() as one:
        if not (hasattr(one, "snapshot") and hasattr(one, "restore")):
            return
        for split, index in subject.tasks(one):
            whole = play(one, split, index)
            half = len(whole) // 2
            with subject.open() as two, subject.open() as three:
                log = play(two, split, index, half - 1)
                state = two.snapshot()  # type: ignore[attr-defined]
                require(is_json(state), f"snapshot() returned no JSON values: {state!r:.300}")
                three.restore(json.loads(json.dumps(state)))  # type: ignore[attr-defined]
                for _ in whole[half:]:
                    advance(three, split, index, log)
            if getattr(one, "replayable", True):
                _same(whole, log, f"{split}/{index} goes on differently from a snapshot")


def check_other_process(subject: Subject) -> None:
    """Another process, with another hash seed and without JAX, tells the same episodes."""
    if not _is_replayable(subject):
        return
    with subject.open() as env:
        tasks = subject.tasks(env)
        here = [play(env, split, index) for split, index in tasks]
    request = json.dumps([subject.target, dict(subject.options), tasks])
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "empg_envs.conformance", request],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    require(done.returncode == 0, f"it fails in a process of its own: {done.stderr.strip()[-800:]}")
    there, modules = json.loads(done.stdout)
    require("jax" not in modules, "it imports jax, which makes every worker large and slow to start")
    for (split, index), mine, other in zip(tasks, here, there, strict=True):
        _same(mine, other, f"another process differs in {split}/{index}")


def check_forgetting(subject: Subject) -> None:
    """An instance forgets its last episode."""
    if not _is_replayable(subject):
        return
    with subject.open() as env:
        split = env.list_splits()[0]
        first = play(env, split, 0, 5)
        play(env, split, min(1, env.num_tasks(split) - 1), 9)
        _same(first, play(env, split, 0, 5), f"{split}/0 differs after an episode of another task")


def check_seeds(subject: Subject) -> None:
    """A reset without an index is decided by the seed."""
    if not _is_replayable(subject):
        return
    with subject.open() as one, subject.open() as two:
        require(one.reset(seed=5) == two.reset(seed=5), "reset(seed=5) differs between two instances")
        is_same = one.reset() == two.reset()
        require(is_same, "the reset() after reset(seed=5) differs between two instances")


def check_splits(subject: Subject) -> None:
    """No task is in two splits."""
    owner: dict[str, str] = {}
    with subject.open() as env:
        for split in env.list_splits():
            for index in range(min(50, env.num_tasks(split))):
                found = env.get_task(split, index)["content_hash"]
                other = owner.setdefault(found, split)
                require(other == split, f"{split}/{index} has the content_hash of a task of {other}")


def check_order(subject: Subject) -> None:
    """A step without an episode is refused."""
    with subject.open() as env:
        _refuses(RuntimeError, "reset", lambda: env.step("look"), "step() before reset()")
        split = env.list_splits()[0]
        env.reset(split=split, index=0)
        for _ in range(PATIENCE):
            if any(env.step("look")[2:4]):
                break
        else:
            raise AssertionError(f"{PATIENCE} actions do not end the episode {split}/0")
        _refuses(RuntimeError, "reset", lambda: env.step("look"), "step() after the end")
        env.reset(split=split, index=0)
        env.step("look")


def check_unknown_tasks(subject: Subject) -> None:
    """Tasks that do not exist are refused by name."""
    with subject.open() as env:
        calls: list[Callable[[], Any]] = [
            lambda: env.num_tasks("nowhere"),
            lambda: env.get_task("nowhere", 0),
            lambda: env.reset(split="nowhere", index=0),
        ]
        for call in calls:
            message = _refuses(ValueError, "nowhere", call, "the split 'nowhere'")
            missing = [split for split in env.list_splits() if split not in message]
            require(not missing, f"the refusal of the split 'nowhere' does not name {missing}: {message}")
        split = env.list_splits()[0]
        count = env.num_tasks(split)
        for index in (-1, count):
            call = functools.partial(env.reset, split=split, index=index)
            _refuses(IndexError, str(count), call, f"task {split}/{index} of {count}")


def check_any_text(subject: Subject, actions: Sequence[str] = TEXTS) -> None:
    """Every text is an action with a defined reply."""
    with subject.open() as env:
        for split, index in subject.tasks(env):
            env.reset(split=split, index=index)
            for action in actions:
                try:
                    reply = env.step(action)
                except Exception as error:
                    where = f"{type(error).__name__}: {error}{place_of(error)}"
                    raise AssertionError(f"step({action!r:.60}) raised {where}") from None
                check_reply(reply)
                if reply[2] or reply[3]:
                    env.reset(split=split, index=index)


def check_parser(subject: Subject, responses: Sequence[str] = TEXTS) -> None:
    """The parser gives an action for every response."""
    build = subject.spec.parser
    parser = build(**options_of(build, subject.prompt_options))
    with subject.open() as env:
        _, info = env.reset(split=env.list_splits()[0], index=0)
    for response in responses:
        parsed = parser(response, info)
        is_fine = isinstance(parsed.action, str) and isinstance(parsed.is_valid, bool)
        require(is_fine, f"the parser made {parsed!r:.200} of {response!r:.60}")


def check_prompts(subject: Subject) -> None:
    """Prompts of both contexts end with a user's message."""
    build = subject.spec.prompts
    prompts = build(**options_of(build, subject.prompt_options))
    with subject.open() as env:
        observation, info = env.reset(split=env.list_splits()[0], index=0)
    for messages in (
        prompts.start(observation, info),
        prompts.window([], observation, info, 0),
        prompts.window([(observation, "look")], observation, info, 4),
    ):
        require(messages[-1]["role"] == "user", f"a prompt ends with {messages[-1]!r:.200}")
        require(all(set(each) == {"role", "content"} for each in messages), f"a prompt is {messages!r:.200}")
    follow = prompts.follow(observation, info)
    require(isinstance(follow, str), f"follow() of the prompt builder returned {follow!r:.200}")


def check_closing(subject: Subject) -> None:
    """An environment can be closed twice."""
    env = subject.make()
    env.reset(split=env.list_splits()[0], index=0)
    env.close()
    env.close()


def check_expert(subject: Subject) -> None:
    """The expert, if there is one, wins with a return of 1."""
    with subject.open() as env:
        if not hasattr(env, "expert_action"):
            return
        for split in env.list_splits():
            env.reset(split=split, index=0)
            total, terminated, truncated = 0.0, False, False
            info: Mapping[str, Any] = {}
            for _ in range(PATIENCE):
                _, reward, terminated, truncated, info = env.step(env.expert_action())
                total += reward
                if terminated or truncated:
                    break
            require(info.get("won") and terminated, f"the expert does not win {split}/0")
            require(total == 1.0, f"the return of the expert in {split}/0 is {total}, not 1")


def _refuses(kind: type[Exception], word: str, call: Callable[[], Any], what: str) -> str:
    """Check that a call raises an exception with a word in its message; return the message."""
    try:
        call()
    except kind as error:
        require(word in str(error), f"the refusal of {what} does not say {word!r}: {error}")
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}, not {kind.__name__}: {error}") from error
    raise AssertionError(f"{what} was not refused")


def _same(one: Sequence[str], two: Sequence[str], message: str) -> None:
    for turn, (left, right) in enumerate(zip(one, two, strict=False)):
        require(left == right, f"{message}, reply {turn}: {left:.200} and {right:.200}")
    require(len(one) == len(two), f"{message}: {len(one)} and {len(two)} replies")


def _is_replayable(subject: Subject) -> bool:
    with subject.open() as env:
        return bool(getattr(env, "replayable", True))


def place_of(error: BaseException) -> str:
    """Return where an exception was raised, if not in the checks themselves."""
    here = str(Path(__file__).parent)
    frames = [
        each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(here)
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
