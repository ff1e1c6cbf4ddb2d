"""`empg-jax play ENV`: a person, a pipe or the expert as the agent."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from empg_envs import make_env
from empg_jax.cli import app
from tests import runs

OWN = '''
class Env:
    """Counts down."""

    def __init__(self, length=2): self.length = length
    def list_splits(self): return ["train"]
    def num_tasks(self, split): return 1
    def reset(self, seed=None, *, split=None, index=None):
        self.left = self.length
        return "left \\x1b[2J 2", {"task": "say <b>bye</b>"}
    def step(self, action):
        if action == "break": raise OSError("broken")
        self.left -= 1
        self.said = action
        return repr(action), 0.5, False, self.left == 0, {"won": False, "metrics": {"left": self.left}}
    def close(self): pass

class Empty(Env):
    def list_splits(self): return []
class Taskless(Env):
    def num_tasks(self, split): return 0
class Unread(Env):
    def list_splits(self): raise FileNotFoundError("data gone\\nfor good")
class Bytes(Env):
    def reset(self, seed=None, *, split=None, index=None): return b"hello", {}
class Bare(Env):
    def reset(self, seed=None, *, split=None, index=None): return "hello", None
class Offering(Env):
    def reset(self, seed=None, *, split=None, index=None): return "hello", {"admissible": 5}
class Unpaid(Env):
    def step(self, action): return "bye", None, True, False, {}
class Worded(Env):
    def step(self, action): return "bye", 1.0, True, False, {"metrics": {"x": "y"}}
class Sticky(Unpaid):
    def close(self): raise RuntimeError("stuck")
class Nothing: pass
'''


def call(*arguments, stdin=""):
    """Runs a command line; returns exit code, stdout, stderr."""
    result = CliRunner().invoke(app, ["play", *map(str, arguments)], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def solve(name, split, task, **options):
    """The expert's actions."""
    env = make_env(name, **options)
    env.reset(0, split=split, index=task)
    actions, is_done = [], False
    while not is_done:
        actions.append(env.expert_action())
        _, _, terminated, truncated, _ = env.step(actions[-1])
        is_done = terminated or truncated
    env.close()
    return actions


@pytest.fixture
def own(monkeypatch, tmp_path):
    (tmp_path / "counter.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "counter:Env"
    sys.modules.pop("counter", None)


def test_actions_from_a_pipe_win():
    actions = solve("household", "valid", 3, level="easy")
    code, out, err = call(
        "household", "level=easy", "--split", "valid", "--task", 3, stdin="\n".join(actions) + "\n"
    )
    assert (code, err) == (0, "")
    assert out.startswith("household, task 3 of valid: ") and "[1] " in out
    assert [line[2:] for line in out.splitlines() if line.startswith("> ")] == actions
    assert out.splitlines()[-1] == f"won after {len(actions)} actions, return 1"


@pytest.mark.parametrize("name", ["household", "alfworld", "webshop", "deepsearch"])
def test_the_expert_acts(name):
    code, out, err = call(name, "--expert", "--seed", 5)
    assert (code, err) == (0, "") and "\nwon after " in out and "Type an action" not in out
    assert call(name, "--expert", "--seed", 5)[1] == out


def test_an_action_by_its_number_and_the_end_of_the_input():
    env = make_env("household")
    _, info = env.reset(0, split="train", index=2)
    code, out, _ = call("household", "--task", 2, stdin="\n2\n")
    assert code == 0 and f"> {info['admissible'][1]}\n" in out
    assert out.splitlines()[-1] == "left after 1 action, return 0: there is no further action"


def test_a_limit_an_option_of_a_configuration_and_a_long_action(own):
    code, out, _ = call(own, "env.options.length=2", stdin="one\\\ntwo\n3\n")
    assert code == 0 and "'one\\ntwo'" in out
    assert out.endswith("out of turns after 2 actions, return 1\nleft 0\n")
    assert "\x1b" not in out and "left \\x1b[2J 2" in out and "<b>bye</b>" in out


def test_an_environment_that_breaks_is_one_line(own):
    code, _, err = call(own, stdin="break\n")
    assert code == 1 and err == "error: environment counter:Env failed at action 1: OSError: broken\n"


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("Empty", 2, "has no tasks: its list_splits() is empty"),
        ("Taskless", 2, "has no tasks in train: its num_tasks('train') is 0"),
        ("Unread", 1, "failed when asked for its splits: FileNotFoundError: data gone"),
        ("Nothing", 1, "failed when asked for its splits: AttributeError: 'Nothing' object has no attribute"),
        ("Bytes", 1, "failed at the start of task train/0: observation is bytes b'hello'; expected str"),
        ("Bare", 1, "failed at the start of task train/0: info is NoneType None; expected dict"),
        ("Offering", 1, "failed at the start of task train/0: info['admissible'] is int 5; expected a list"),
        ("Unpaid", 1, "failed at action 1: reward is NoneType None; expected a finite number"),
        ("Worded", 1, "failed at action 1: info['metrics']['x'] is str 'y'; expected a finite number"),
        ("Sticky", 1, "failed at action 1: reward is NoneType None; expected a finite number"),
    ],
)
def test_every_fault_of_an_environment_is_one_line(own, name, code, says):
    found, _, err = call(f"counter:{name}", stdin="go\n")
    assert found == code and err.startswith(f"error: environment counter:{name} {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["houshold"], "did you mean 'household'?"),
        (["household", "levle=easy"], "has no option 'levle' (did you mean 'level'?)"),
        (["household", "level=eazy"], "household: unknown household level"),
        (["household", "easy"], "is not of the form section.key=value"),
        (["household", "--task", "99999"], "--task 99999: train has the tasks 0 to 16383"),
        (["household", "--split", "tset"], "--split tset: unknown (did you mean test?)"),
        (["tests.houses:MUTE", "--expert"], "--expert: environment tests.houses:MUTE has no expert"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_line(arguments, says):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_a_process_with_a_pipe():
    code = "from empg_jax.cli import main; main()"
    command = [sys.executable, "-c", code, "play", "household", "--task", "0"]
    done = subprocess.run(
        command, cwd=runs.ROOT, input="look\nlook", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "left after 2 actions" in done.stdout and done.stderr == ""
