"""Tasksets of `verifiers` as data, with the real package (for example in an environment of its own)."""

import gzip
import json
import re
import shlex

import pytest

from empg_envs import ENVS, make_env
from empg_envs.base import EnvFault
from empg_envs.conformance import CHECKS, Subject
from empg_jax.metrics import read_metrics
from tests import runs
from tests.adapters.needs import need
from tests.test_examples import CONSOLE, EXAMPLES, call

need("verifiers", install="pip install -e '.[verifiers]'")

# A taskset with a few tasks, each kind of them in need of something.
KINDS = """
import verifiers.v1 as vf
from verifiers.v1.errors import ProviderError

__all__ = ["KindsTaskset"]


class KindsConfig(vf.TasksetConfig):
    kind: str = "plain"
    shift: int = 0


class Plain(vf.Task[vf.TaskData]):
    @vf.reward
    async def exact(self, task, trace) -> float:
        if trace.last_reply == "break":
            raise KeyError("no such word")
        if trace.last_reply == "unplug":
            raise ProviderError("the judge is away")
        told = [(message.role, message.content) for message in trace.messages]
        assert told[-1] == ("assistant", trace.last_reply) and trace.num_turns == 1
        return float(trace.last_reply == told[-2][1])

    @vf.reward(weight=0.5)
    async def boxed(self, trace) -> float:
        return vf.verify_boxed_math_answer(trace.last_reply, "1/2")


class Boxed(Plain):
    NEEDS_CONTAINER = True


class Prepared(Plain):
    async def setup(self, trace, runtime):
        pass


class Watched(Plain):
    @vf.reward
    async def ran(self, runtime) -> float:
        return 1.0


PICTURE = vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url="data:,"))
PROMPTS = {
    "talk": [vf.UserMessage(content="a"), vf.AssistantMessage(content="b"), vf.UserMessage(content="c")],
    "quiet": None,
    "picture": [vf.UserMessage(content=[PICTURE])],
}


class KindsTaskset(vf.Taskset[Plain, KindsConfig]):
    INFINITE = True

    def load(self):
        number, kind = self.config.shift, self.config.kind
        while True:
            cls = {"boxed": Boxed, "prepared": Prepared, "watched": Watched}.get(kind, Plain)
            prompt = PROMPTS.get(kind, str(number))
            yield cls(vf.TaskData(prompt=prompt, image="x" if kind == "image" else None))
            number += 1
"""


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    (tmp_path / "kinds_taskset.py").write_text(KINDS)
    monkeypatch.chdir(tmp_path)
    return lambda **options: make_env("verifiers", **{"taskset": "kinds_taskset", "tasks": 10, **options})


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.chdir(EXAMPLES)


@pytest.mark.usefixtures("examples")
def test_the_taskset_is_the_data_and_its_rewards_score():
    env = make_env("verifiers", taskset="digit_taskset", config={"count": 50}, answer="answer")
    assert {split: env.num_tasks(split) for split in env.list_splits()} == {"train": 40, "test": 10}
    assert env.get_task("test", 1)["prompt"] == "9?"  # every fifth one
    observation, info = env.reset(split="train", index=3)
    assert observation == "3?" and info["before"] == [{"role": "system", "content": "Say the first digit."}]
    assert env.expert_action() == "3"
    observation, reward, terminated, truncated, info = env.step("3")
    assert (observation, terminated, truncated, info["won"]) == ("", True, False, True)
    assert reward == 1.0  # each with its weight
    assert info["metrics"] == {"right": 1.0, "near": 1.0, "letters": 1.0, "scorer_error": 0.0}
    env.reset(split="train", index=3)
    assert env.step("4")[1] == pytest.approx(0.25 * 8 / 9)
    first, *others = ENVS["verifiers"].prompts(instructions="Be brief.").start("3?", info)
    assert first["role"] == "system" and others == [{"role": "user", "content": "Be brief.\n\n3?"}]


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_it_is_an_environment_like_the_others(check):
    check.run(Subject("verifiers", {"taskset": "digit_taskset", "answer": "answer"}, episodes=1))


def test_a_conversation_is_asked_and_test_tasks_may_come_from_elsewhere(kinds):
    env = kinds(test_config={"shift": 100})
    assert env.num_tasks("train") == env.num_tasks("test") == 10  # of a taskset without an end
    assert env.get_task("train", 0)["prompt"] == "0" and env.get_task("test", 0)["prompt"] == "100"
    env = kinds(config={"kind": "talk"})
    observation, info = env.reset(split="train", index=0)
    assert observation == "c" and [each["role"] for each in info["before"]] == ["user", "assistant"]
    assert env.step("c")[1] == 1.0


def test_a_scorer_that_fails_scores_nothing_and_an_absent_judge_is_a_fault(kinds):
    env = kinds()
    env.reset(split="train", index=0)
    _, reward, terminated, _, info = env.step("break")
    assert (reward, terminated, info["metrics"]["scorer_error"]) == (0.0, True, 1.0)
    env.reset(split="train", index=0)
    with pytest.raises(EnvFault, match="ProviderError: the judge is away") as caught:
        env.step("unplug")
    assert caught.value.reason == "verifiers_error"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taskset": ""}, "env.options.taskset=NAME is missing"),
        ({"taskset": "nowhere"}, "taskset nowhere: ModuleNotFoundError"),
        ({"config": {"knd": "x"}}, "taskset kinds_taskset: ValidationError: .*\n.*knd"),
        ({"tasks": 0}, "has no tasks"),
        ({"answer": "solution"}, "answer=solution: a task of kinds_taskset has idx, id, name"),
        ({"config": {"kind": "boxed"}}, "needs a container"),
        ({"config": {"kind": "image"}}, "needs a container"),
        ({"config": {"kind": "prepared"}}, "needs a machine to work on"),
        ({"config": {"kind": "watched"}}, "needs a machine to work on"),
        ({"config": {"kind": "quiet"}}, "needs a user who speaks first"),
        ({"config": {"kind": "picture"}}, "needs a policy that sees pictures"),
    ],
)
def test_what_cannot_be_is_told(kinds, options, message):
    with pytest.raises(ValueError, match=message):
        kinds(**options)


def test_scorers_with_an_alarm_work_in_a_worker(kinds, tmp_path):
    """The package's mathematics sets an alarm, and in another thread it gives 0 without a word."""
    options = {"taskset": "kinds_taskset", "tasks": 10}
    commands = []
    for number in range(2):
        where = {"seed": 0, "split": "train", "index": number}
        commands.append({"id": 2 * number, "env": number, "op": "reset", "args": where})
        action = {"action": "so it is \\boxed{0.5}"}
        commands.append({"id": 2 * number + 1, "env": number, "op": "step", "args": action})
    said = [{"env": "verifiers", "options": options, "lanes": 2}, *([each] for each in commands)]
    done = call(tmp_path, "-m", "empg_envs.worker", text_in="".join(json.dumps(x) + "\n" for x in said))
    replies = {each.get("id"): each for each in map(json.loads, done.stdout.splitlines())}
    assert replies[None]["threads"] is False
    assert [replies[1]["reward"], replies[3]["reward"]] == [0.5, 0.5], done.stdout + done.stderr


@pytest.mark.slow
def test_the_example_is_trained_as_its_first_lines_say(tmp_path):
    text = (EXAMPLES / "digit_taskset.py").read_text()
    (tmp_path / "digit_taskset.py").write_text(text)
    (line,) = re.findall(r"(?m)^empg-jax (train .*)$", text)
    small = [option for option in runs.TINY if not option.startswith(("rollout.", "train.updates"))]
    small += ["train.updates=2", "eval.tasks=2", "log.rollouts_every=1", "workers.reset_timeout=200"]
    small += ["rollout.tasks_per_update=2", "rollout.group_size=2", "run_dir=run"]
    done = call(tmp_path, "-P", "-c", CONSOLE, *shlex.split(line), *small)
    assert done.returncode == 0, done.stderr
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["update"] == 2 and {"env_right", "env_near", "env_scorer_error"} <= last.keys()
    with gzip.open(max((tmp_path / "run" / "rollouts").iterdir()), "rt") as file:
        episodes = [json.loads(each) for each in file]
    assert [len(episode["turns"]) for episode in episodes] == [1] * 4
    assert all(re.fullmatch(r"\d+\?", episode["turns"][0]["observation"]) for episode in episodes)
