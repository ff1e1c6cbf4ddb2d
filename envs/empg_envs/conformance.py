"""What every environment must do, as functions: for our own tests, and for ``empg-jax check-env``.

A check takes a `Subject` and raises an AssertionError that says what was wrong. As a program, the module
plays episodes in another process and prints them as JSON (`check_other_process`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from empg_envs import make_env, resolve_spec
from empg_envs.base import EnvSpec, TextEnv

MOVES = 12  # most actions of an episode that is played for a comparison
PATIENCE = 10_000  # actions after which an episode must have ended
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
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """An environment under test.

    Attributes:
      target: its name or entry point.
      options: keyword arguments of the environment.
      prompt_options: keyword arguments of its prompt builder and parser.
      episodes: number of tasks of each split that are played.
    """

    target: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    episodes: int = 3

    @functools.cached_property
    def spec(self) -> EnvSpec:
        """The environment's spec."""
        return resolve_spec(self.target)

    def make(self) -> TextEnv:
        """Build the environment."""
        return make_env(self.target, **self.options)

    def tasks(self, env: TextEnv) -> list[tuple[str, int]]:
        """Return the tasks that are played: the first ones of every split."""
        return [
            (split, index)
            for split in env.list_splits()
            for index in range(min(self.episodes, env.num_tasks(split)))
        ]


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of an environment.

    Attributes:
      run: the check.
      advice: what to do where it fails.
      is_required: whether training relies on it.
    """

    run: Callable[[Subject], None]
    advice: str
    is_required: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What a check found: no message where it passed."""

    name: str
    check: Check
    message: str = ""


def run_checks(subject: Subject) -> Iterator[Result]:
    """Run all checks; whatever an environment raises is a finding."""
    for name, check in CHECKS.items():
        try:
            check.run(subject)
        except AssertionError as error:
            yield Result(name, check, str(error) or _place_of(error))
        except Exception as error:
            yield Result(name, check, f"{type(error).__name__}: {error}{_place_of(error)}")
        else:
            yield Result(name, check)


def play(env: TextEnv, split: str, index: int, actions: int = MOVES) -> list[str]:
    """Play an episode by a fixed rule over admissible actions; return every reply as canonical JSON."""
    observation, info = env.reset(seed=0, split=split, index=index)
    log = [json.dumps([observation, info], sort_keys=True)]
    for turn in range(actions):
        admissible = info.get("admissible") or ["look"]
        reply = env.step(admissible[(7 * turn + index) % len(admissible)])
        log.append(json.dumps(reply, sort_keys=True))
        info = reply[4]
        if reply[2] or reply[3]:
            break
    return log


def check_types(subject: Subject) -> None:
    """Splits, tasks, observations, rewards and info have their types."""
    env = subject.make()
    splits = env.list_splits()
    _require(splits and all(isinstance(split, str) for split in splits), f"list_splits() returned {splits!r}")
    for split in splits:
        count = env.num_tasks(split)
        _require(isinstance(count, int) and count > 0, f"num_tasks({split!r}) returned {count!r}")
        task = env.get_task(split, count - 1)
        _require(_is_json(task), f"get_task({split!r}, {count - 1}) is no JSON: {task!r:.200}")
        _require(task.get("content_hash"), f"get_task({split!r}, {count - 1}) has no content_hash")
    for split, index in subject.tasks(env):
        check_opening(env.reset(seed=1, split=split, index=index))
        check_reply(env.step("look"))
    env.close()


def check_opening(result: Any) -> None:
    """Check what ``reset`` returned."""
    _require(isinstance(result, tuple) and len(result) == 2, f"reset returned {result!r:.200}")
    observation, info = result
    _require(isinstance(observation, str) and observation, f"the first observation is {observation!r:.200}")
    check_info(info)
    _require(isinstance(info.get("task"), str) and info["task"], 'the info of reset has no text "task"')


def check_reply(result: Any) -> None:
    """Check what ``step`` returned."""
    _require(isinstance(result, tuple) and len(result) == 5, f"step returned {result!r:.200}")
    observation, reward, terminated, truncated, info = result
    _require(isinstance(observation, str), f"the observation is {observation!r:.200}, no text")
    is_number = type(reward) in (float, int) and math.isfinite(reward)
    _require(is_number, f"the reward is {reward!r} ({type(reward).__name__}), no finite number")
    _require(type(terminated) is bool, f"terminated is {terminated!r} ({type(terminated).__name__})")
    _require(type(truncated) is bool, f"truncated is {truncated!r} ({type(truncated).__name__})")
    check_info(info)


def check_info(info: Any) -> None:
    """Check an info: JSON values only, a verdict, sorted commands, metrics that are numbers."""
    _require(
        isinstance(info, dict) and _is_json(info), f"the info is no object of JSON values: {info!r:.300}"
    )
    _require(isinstance(info.get("won"), bool), f'info["won"] is {info.get("won")!r}; expected true or false')
    admissible = info.get("admissible", [])
    _require(admissible == sorted(set(admissible)), 'info["admissible"] is not sorted, or repeats a command')
    metrics = info.get("metrics", {})
    bad = {name: value for name, value in metrics.items() if not isinstance(value, float)}
    _require(not bad, f'info["metrics"] has values that are no float: {bad}')


def check_repetition(subject: Subject) -> None:
    """Two instances tell the same episode."""
    if not _is_replayable(subject):
        return
    one, two = subject.make(), subject.make()
    for split, index in subject.tasks(one):
        _same(play(one, split, index), play(two, split, index), f"two instances differ in {split}/{index}")


def check_other_process(subject: Subject) -> None:
    """Another process, with another hash seed and without JAX, tells the same episodes."""
    if not _is_replayable(subject):
        return
    env = subject.make()
    tasks = subject.tasks(env)
    here = [play(env, split, index) for split, index in tasks]
    request = json.dumps([subject.target, dict(subject.options), tasks])
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "empg_envs.conformance", request],
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    _require(done.returncode == 0, f"it fails in a process of its own: {done.stderr.strip()[-800:]}")
    there, modules = json.loads(done.stdout.splitlines()[-1])
    _require("jax" not in modules, "it imports jax, which makes every worker large and slow to start")
    for (split, index), mine, other in zip(tasks, here, there, strict=True):
        _same(mine, other, f"another process differs in {split}/{index}")


def check_forgetting(subject: Subject) -> None:
    """An instance forgets its last episode."""
    if not _is_replayable(subject):
        return
    env = subject.make()
    split = env.list_splits()[0]
    first = play(env, split, 0, 5)
    play(env, split, min(1, env.num_tasks(split) - 1), 9)
    _same(first, play(env, split, 0, 5), f"{split}/0 differs after an episode of another task")


def check_seeds(subject: Subject) -> None:
    """A reset without an index is decided by the seed."""
    if not _is_replayable(subject):
        return
    one, two = subject.make(), subject.make()
    _require(one.reset(seed=5) == two.reset(seed=5), "reset(seed=5) differs between two instances")
    _require(one.reset() == two.reset(), "the reset() after reset(seed=5) differs between two instances")


def check_splits(subject: Subject) -> None:
    """No task is in two splits."""
    env = subject.make()
    owner: dict[str, str] = {}
    for split in env.list_splits():
        for index in range(min(50, env.num_tasks(split))):
            found = env.get_task(split, index)["content_hash"]
            other = owner.setdefault(found, split)
            _require(other == split, f"{split}/{index} has the content_hash of a task of {other}")


def check_order(subject: Subject) -> None:
    """A step without an episode is refused."""
    env = subject.make()
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
    env = subject.make()
    calls: list[Callable[[], Any]] = [
        lambda: env.num_tasks("nowhere"),
        lambda: env.get_task("nowhere", 0),
        lambda: env.reset(split="nowhere", index=0),
    ]
    for call in calls:
        message = _refuses(ValueError, "nowhere", call, "the split 'nowhere'")
        missing = [split for split in env.list_splits() if split not in message]
        _require(not missing, f"the refusal of the split 'nowhere' does not name {missing}: {message}")
    split = env.list_splits()[0]
    count = env.num_tasks(split)
    for index in (-1, count):
        call = functools.partial(env.reset, split=split, index=index)
        _refuses(IndexError, str(count), call, f"task {split}/{index} of {count}")


def check_any_text(subject: Subject, actions: Sequence[str] = TEXTS) -> None:
    """Every text is an action with a defined reply."""
    env = subject.make()
    for split, index in subject.tasks(env):
        env.reset(split=split, index=index)
        for action in actions:
            try:
                reply = env.step(action)
            except Exception as error:
                where = f"{type(error).__name__}: {error}{_place_of(error)}"
                raise AssertionError(f"step({action!r:.60}) raised {where}") from None
            check_reply(reply)
            if reply[2] or reply[3]:
                env.reset(split=split, index=index)


def check_parser(subject: Subject, responses: Sequence[str] = TEXTS) -> None:
    """The parser gives an action for every response."""
    parser = subject.spec.parser(**subject.prompt_options)
    for response in responses:
        parsed = parser(response, {"admissible": ["look"]})
        is_fine = isinstance(parsed.action, str) and isinstance(parsed.is_valid, bool)
        _require(is_fine, f"the parser made {parsed!r:.200} of {response!r:.60}")


def check_prompts(subject: Subject) -> None:
    """Prompts of both contexts end with a user's message."""
    env, prompts = subject.make(), subject.spec.prompts(**subject.prompt_options)
    observation, info = env.reset(split=env.list_splits()[0], index=0)
    for messages in (
        prompts.start(observation, info),
        prompts.window([], observation, info, 0),
        prompts.window([(observation, "look")], observation, info, 4),
    ):
        _require(messages[-1]["role"] == "user", f"a prompt ends with {messages[-1]!r:.200}")
        _require(all(set(each) == {"role", "content"} for each in messages), f"a prompt is {messages!r:.200}")
    follow = prompts.follow(observation, info)
    _require(isinstance(follow, str), f"follow() of the prompt builder returned {follow!r:.200}")


def check_closing(subject: Subject) -> None:
    """An environment can be closed twice."""
    env = subject.make()
    env.close()
    env.reset(split=env.list_splits()[0], index=0)
    env.close()
    env.close()


def check_expert(subject: Subject) -> None:
    """The expert, if there is one, wins with a return of 1."""
    env = subject.make()
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
        _require(info.get("won") and terminated, f"the expert does not win {split}/0")
        _require(total == 1.0, f"the return of the expert in {split}/0 is {total}, not 1")


CHECKS = {
    "types of everything that crosses": Check(
        check_types,
        "return the types that empg_envs.base.TextEnv names; info and tasks hold JSON values only",
    ),
    "two instances agree": Check(
        check_repetition,
        "draw only from generators that split, index and seed decide; or declare replayable = False, and "
        "episodes are lost with their worker",
    ),
    "another process agrees": Check(
        check_other_process,
        "sort what comes out of sets, and use neither hash() nor the clock; import heavy packages nowhere",
    ),
    "an instance forgets its last episode": Check(check_forgetting, "set every attribute anew in reset()"),
    "every text gets a reply": Check(
        check_any_text, "the policy may say anything: answer nonsense with an observation and reward 0"
    ),
    "the parser takes every response": Check(
        check_parser, "return ParsedAction(text, False) for a response without an action"
    ),
    "prompts end with the user": Check(
        check_prompts, "messages are {'role', 'content'}, and the last one is the user's"
    ),
    "splits share no task": Check(
        check_splits, "make content_hash of what the task is, and hold tasks out by it"
    ),
    "close twice": Check(check_closing, "let close() check what is still open"),
    "the seed decides a reset without an index": Check(
        check_seeds, "draw the index from a generator that reset(seed) seeds", is_required=False
    ),
    "steps without an episode are refused": Check(
        check_order,
        "raise RuntimeError('... call reset first') there, and end every episode",
        is_required=False,
    ),
    "unknown tasks are refused by name": Check(
        check_unknown_tasks,
        "raise ValueError with the splits, and IndexError with the number of tasks",
        is_required=False,
    ),
    "the expert wins": Check(
        check_expert,
        "a warm start learns from expert_action(): let it win, for a return of 1",
        is_required=False,
    ),
}


def _require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _refuses(kind: type[Exception], word: str, call: Callable[[], Any], what: str) -> str:
    """Check that a call raises an exception with a word in its message; return the message."""
    try:
        call()
    except kind as error:
        _require(word in str(error), f"the refusal of {what} does not say {word!r}: {error}")
        return str(error)
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}, not {kind.__name__}: {error}") from error
    raise AssertionError(f"{what} was not refused")


def _same(one: Sequence[str], two: Sequence[str], message: str) -> None:
    for turn, (left, right) in enumerate(zip(one, two, strict=False)):
        _require(left == right, f"{message}, reply {turn}: {left:.200} and {right:.200}")
    _require(len(one) == len(two), f"{message}: {len(one)} and {len(two)} replies")


def _is_replayable(subject: Subject) -> bool:
    return bool(getattr(subject.make(), "replayable", True))


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False


def _place_of(error: BaseException) -> str:
    """Where an exception was raised, if not here."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _tell(request: str) -> str:
    """Play the episodes of a request; return them, and the packages that are loaded, as JSON."""
    target, options, tasks = json.loads(request)
    env = make_env(target, **options)
    episodes = [play(env, split, index) for split, index in tasks]
    return json.dumps([episodes, sorted({name.partition(".")[0] for name in sys.modules})])


if __name__ == "__main__":
    print(_tell(sys.argv[1]))
