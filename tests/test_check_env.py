"""`empg-jax check-env`: what is right and what is wrong with a person's environment, as they run it."""

import atexit
import re
import sys

import pytest
from typer.testing import CliRunner

from empg_envs.conformance import CHECKS
from empg_jax.cli import app
from tests import runs

GOOD = '''
import atexit, hashlib, random, signal
from empg_envs import EnvSpec, PlainPrompts, PlainParser

class Good:
    """Say the number. Options of the class say what else it does."""

    threads = True

    def __init__(self, wrong="", replayable=True):
        self.wrong, self.replayable, self.number = wrong, replayable, None
    def list_splits(self): return ["train", "test"]
    def num_tasks(self, split):
        if split not in self.list_splits(): raise ValueError(f"no {split}; there are train, test")
        return 40
    def get_task(self, split, index):
        self.num_tasks(split)
        key = index if self.wrong == "leak" else f"{split}{index}"
        return {"content_hash": hashlib.sha256(str(key).encode()).hexdigest()}
    def reset(self, seed=None, *, split="train", index=0):
        index = (seed or 0) % 40 if index is None else index
        if not 0 <= index < self.num_tasks(split): raise IndexError("there are 40 tasks")
        self.number = random.random() if self.wrong == "random" else index
        if self.wrong == "hash": self.number = hash(f"{split}{index}")
        if self.wrong == "memory": self.log = [*getattr(self, "log", []), index]; self.number = self.log
        if self.wrong == "jax": import jax
        info = {"task": "say it", "won": False}
        if self.wrong == "answer": info["known_answer"] = "42"
        return f"say {self.number}" + chr(0xd83d) * (self.wrong == "half"), info
    def step(self, action):
        if self.number is None: raise RuntimeError("call reset first")
        if self.wrong == "nonsense": int(action or 0)
        number, self.number = self.number, None
        won = action == str(number)
        info = {"won": won}
        if self.wrong == "types": info["raw"] = object()
        return "", 1 if self.wrong == "reward" and won else float(won), True, False, info
    def close(self):
        if self.wrong == "close": del self.number
    def expert_action(self): return "-1" if self.wrong == "expert" else str(self.number)

class Turns(Good):
    """Say the number in the third turn."""

    shared = {}

    def reset(self, seed=None, *, split="train", index=0):
        self.turn = self.shared if self.wrong == "shared" else {}
        self.turn["count"] = 0
        return super().reset(seed, split=split, index=index)
    def step(self, action):
        if self.number is None: raise RuntimeError("call reset first")
        if self.wrong == "signal": signal.signal(signal.SIGUSR2, signal.getsignal(signal.SIGUSR2))
        self.turn["count"] += 1
        if self.turn["count"] == 3: return super().step(action)
        return f"turn {self.turn['count']}", 0.0, False, False, {"won": False}
    def snapshot(self): return [self.number, 0 if self.wrong == "lossy" else self.turn["count"]]
    def restore(self, state): self.number, self.turn = state[0], {"count": state[1]}

class Ended(Good):
    """It is of no use once it is closed."""

    is_closed = False

    def reset(self, *args, **kwargs):
        if self.is_closed: raise RuntimeError("it is closed")
        return super().reset(*args, **kwargs)
    def close(self): self.is_closed = True

class Sessions(Good):
    """Its server has four sessions."""

    held = set()

    def __init__(self):
        super().__init__()
        if len(self.held) == 4: raise RuntimeError("no session is free")
        self.held.add(self)
    def close(self): self.held.discard(self)

class Goodbye(Good):
    def __init__(self):
        super().__init__()
        atexit.register(print, "goodbye")

class Choices(Good):
    def reset(self, *args, **kwargs):
        observation, info = super().reset(*args, **kwargs)
        return observation, {**info, "choices": ["A", "B"]}

class Choosing(PlainParser):
    def __call__(self, response, info): return super().__call__(response + info["choices"][0], info)

CHOICES = EnvSpec("choices", Choices, PlainPrompts, Choosing)

class Raising(PlainParser):
    def __init__(self, quiet=False): pass
    def __call__(self, response, info): return super().__call__(response[0], info)

def prompts(quiet=False):
    class Odd(PlainPrompts):
        def follow(self, observation, info): return None if quiet else observation
    return Odd()

SPEC = EnvSpec("odd", Good, prompts, Raising)
BROKEN = 3
'''


def check(*arguments):
    """Runs the command; returns exit code, and what it said of every check."""
    result = CliRunner().invoke(app, ["check-env", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    said = dict(re.findall(r"^(?:pass|FAIL|advice) +(.*)\n((?: {8}.*\n)*)", result.stdout, re.M))
    verdicts = {name: word for word, name in re.findall(r"^(pass|FAIL|advice) +(.*)$", result.stdout, re.M)}
    return result.exit_code, verdicts, {name: " ".join(text.split()) for name, text in said.items()}, result


@pytest.fixture(autouse=True)
def mine(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "jax.py").write_text("")  # for the other process, which would take long to load the real one
    monkeypatch.chdir(tmp_path)
    yield
    atexit.unregister(print)
    sys.modules.pop("mine", None)
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path)]


def test_a_good_one_passes_everything():
    code, verdicts, _, result = check("mine:Good", "--episodes", "5")
    assert code == 0 and verdicts == dict.fromkeys(CHECKS, "pass")
    assert result.stdout.endswith("mine:Good: 0 failures, 0 pieces of advice\n")


@pytest.mark.parametrize(
    ("wrong", "name", "message"),
    [
        ("types", "types of everything that crosses", "found: info is not JSON-able: info['raw'] is object"),
        ("half", "types of everything that crosses", r"found: observation has the character '\ud83d', which"),
        ("answer", "types of everything that crosses", "found: info['known_answer'] is str '42'; expected"),
        ("random", "two instances agree", "found: two instances differ in train/0, reply 0: "),
        ("hash", "another process agrees", "found: another process differs in train/0, reply 0: "),
        ("jax", "another process agrees", "found: it imports jax, which makes every worker large"),
        (
            "memory",
            "an instance forgets its last episode",
            "found: train/0 differs after an episode of another",
        ),
        ("nonsense", "every text gets a reply", "found: step(' ') raised ValueError: invalid literal"),
        ("leak", "splits share no task", "found: test/0 has the content_hash of a task of train"),
        ("close", "close twice", "found: AttributeError"),
    ],
)
def test_what_training_relies_on_is_a_failure(wrong, name, message):
    code, verdicts, said, _ = check("mine:Good", "--options", f"wrong={wrong}")
    assert code == 1 and verdicts[name] == "FAIL"
    assert message in said[name] and f"do: {CHECKS[name].advice}"[:60] in said[name]


@pytest.mark.parametrize(
    ("wrong", "name", "message"),
    [
        ("shared", "episodes at the same time stay apart", "found: train/0 differs alone and among 4"),
        ("signal", "episodes in threads stay apart", "found: ValueError: signal only works in main thread"),
        ("lossy", "a snapshot restores an episode", "found: train/0 goes on differently from a"),
    ],
)
def test_what_a_worker_with_many_episodes_does(wrong, name, message):
    assert check("mine:Turns")[0] == 0
    code, verdicts, said, _ = check("mine:Turns", "--options", f"wrong={wrong}")
    assert code == 1 and verdicts[name] == "FAIL" and message in said[name]


@pytest.mark.parametrize("attribute", ["Ended", "Sessions", "Goodbye", "CHOICES"])
def test_what_the_contract_leaves_open_is_no_failure(attribute):
    code, verdicts, *_ = check(f"mine:{attribute}")
    assert code == 0 and verdicts == dict.fromkeys(CHECKS, "pass")


def test_the_place_in_the_users_code_is_told():
    _, _, said, _ = check("mine:Good", "--options", "wrong=nonsense")
    line = next(n for n, text in enumerate(GOOD.splitlines(), 1) if "int(action or 0)" in text)
    assert f"mine.py, line {line})" in said["every text gets a reply"]


def test_advice_is_no_failure():
    code, verdicts, said, result = check("mine:Good", "--options", "wrong=expert")
    assert code == 0 and verdicts["the expert wins"] == "advice"
    assert "found: the expert does not win train/0" in said["the expert wins"]
    assert "0 failures, 1 piece of advice" in result.stdout


def test_what_is_not_replayable_need_not_repeat():
    code, *_ = check("mine:Good", "--options", "wrong=random", "--options", "env.options.replayable=false")
    assert code == 0


def test_parser_and_prompts_of_a_spec():
    code, verdicts, said, _ = check("mine:SPEC", "--options", "env.prompt_options.quiet=true")
    assert code == 1 and verdicts["the parser takes every response"] == "FAIL"
    assert "IndexError" in said["the parser takes every response"]
    assert "follow() of the prompt builder returned None" in said["prompts end with the user"]


def test_the_example_and_a_packaged_one_pass(monkeypatch):
    assert check("household", "--options", "level=easy", "--episodes", "1")[0] == 0
    monkeypatch.chdir(runs.ROOT / "scripts" / "examples")
    assert check("own_env:GuessEnv")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["houshold"], "unknown environment 'houshold'; did you mean 'household'?"),
        (["mine:Goood"], "did you mean 'Good'?"),
        (["mine:BROKEN"], "is a int; expected an EnvSpec or a callable"),
        (["mine:Good", "--options", "worng=1"], "has no option 'worng' (did you mean 'wrong'?)"),
        (["household", "--options", "level=x"], "household level 'x'. Known: tiny, "),
        (["household", "--options", "turns"], "error: --options turns: expected KEY=VALUE"),
        (["household", "--options", "env.prompt_options.styl=x"], "has no prompt option 'styl'"),
    ],
)
def test_what_cannot_be_checked_is_refused(arguments, message):
    code, _, _, result = check(*arguments)
    assert code == 2 and result.stdout == "" and message in result.stderr
