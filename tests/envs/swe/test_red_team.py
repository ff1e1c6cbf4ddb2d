"""The red team: every attack ends as suspect, with all layers and with each that is said to catch it."""

import dataclasses
import random
import tempfile
import venv
from pathlib import Path
from typing import Any

import pytest

from empg_envs.swe import patches
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.env import SweEnv
from empg_envs.swe.grading import Grade
from empg_envs.swe.judge.trial import LAYERS
from empg_envs.swe.tasks import Task, broken_tree, load_panels
from empg_envs.swe.tree import File
from tests.cages import need_cages
from tests.envs.swe.attacks import ALL_ASSERTS, ATTACKS, Attack

SEED = 3  # the known name goes to the twin, as in nine of ten draws


def patch_of(attack: Attack, task: Task) -> str:
    broken = broken_tree(task)
    now = {**broken, **{name: File(text.encode()) for name, text in attack.files}}
    names = repr([*task.fail_to_pass, *task.pass_to_pass])
    now["spans.py"] = File(broken["spans.py"].data + attack.code.replace("NAMES", names).encode())
    return patches.diff(broken, now)[0]


def judged(backend: TreeBackend, attack: Attack, task: Task) -> Grade:
    backend._draw = random.Random(SEED)  # type: ignore[assignment]
    return backend.grade(dataclasses.replace(task, runner=attack.runner), patch_of(attack, task), 60)


def test_there_are_enough_of_them() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 40
    assert sum(attack.works for attack in ATTACKS) >= 20


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_suspect(backend: TreeBackend, task: Task, attack: Attack) -> None:
    grade = judged(backend, attack, task)
    assert (grade.resolved, grade.reason) == (False, "suspect") and grade.doubts
    assert grade.metrics["suspect"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_each_layer_alone(task: Task, attack: Attack) -> None:
    need_cages()
    # The attacks are real: without the layers most of them solve the task.
    assert judged(TreeBackend(layers=frozenset()), attack, task).resolved == attack.works
    for layer in attack.caught_by:
        assert judged(TreeBackend(layers=frozenset((layer,))), attack, task).reason == "suspect", layer


def test_every_layer_catches_something() -> None:
    assert {layer for attack in ATTACKS for layer in attack.caught_by} == LAYERS


@pytest.mark.parametrize("runner", ["unittest", "pytest"])
def test_honest_work_is_not_suspect(backend: TreeBackend, task: Task, runner: str) -> None:
    task = dataclasses.replace(task, runner=runner)
    assert backend.grade(task, task.patch, 60).reason == "resolved"
    broken = broken_tree(task)

    def grade(**files: bytes) -> Grade:
        now = {**broken, **{name.replace("__", "/") + ".py": File(data) for name, data in files.items()}}
        return backend.grade(task, patches.diff(broken, now)[0], 60)

    # Wrong in every way, but honest: other answers, no import, an exit, an error, tests of its own.
    module = broken["spans.py"].data
    for text in (
        b"x = 1\n",
        b"import sys\nsys.exit(1)\n",
        b"raise KeyError\n",
        b"def f(:\n",
        module + b"\n#\n",
    ):
        assert grade(spans=text).reason == "unresolved", text
    fixed = patches.apply(broken, task.patch)
    more = {
        "tests__test_more": b"import unittest\n\nclass T(unittest.TestCase):\n    def test_x(self): pass\n"
    }
    assert grade(spans=fixed["spans.py"].data, **more).reason == "resolved"
    fixture = b"import pytest\n\n@pytest.fixture\ndef rows():\n    return []\n"
    assert grade(spans=fixed["spans.py"].data, conftest=fixture).reason == "resolved"


# A module that loads all scripts beside it, without a word that the reading knows.
LOADS_ALL = """
import os, pkgutil
for _found in pkgutil.iter_modules([os.getcwd()]):
    if _found.name not in ("spans", "tests"):
        _found.module_finder.find_spec(_found.name).loader.load_module()
"""


def test_a_script_that_is_left_behind_neither_counts_nor_acts(backend: TreeBackend, task: Task) -> None:
    broken = broken_tree(task)
    fixed = patches.apply(broken, task.patch)["spans.py"].data.decode()
    script = "import unittest\nfrom spans import *\nprint('reproduce.py ran')\n"

    def grade(backend: TreeBackend, **texts: str) -> Grade:
        names = {name: name.replace("__", "/").replace("_bug", "-bug") for name in texts}
        files = {f"{names[name]}.py": File(text.encode()) for name, text in texts.items()}
        return backend.grade(task, patches.diff(broken, {**broken, **files})[0], 60)

    left = grade(backend, spans=fixed, reproduce=script)
    assert (left.reason, left.dropped) == ("resolved", ("reproduce.py",))
    left = grade(backend, spans=fixed, reproduce_bug=script)
    assert (left.reason, left.dropped) == ("resolved", ("reproduce-bug.py",))
    # What another file of the patch names is judged as a part of it, and so is what lies in a package.
    named = "try:\n    import reproduce\nexcept ImportError:\n    pass\n"
    for more in (
        {"spans": fixed + named, "reproduce": script},
        {"spans": fixed + "NAME = 'reproduce-bug.py'\n", "reproduce_bug": script},
        {"spans": fixed, "conftest": named, "reproduce": script},
        {"spans": fixed, "pack__reproduce": script},
        {"spans": fixed, "sitecustomize": script},
    ):
        assert grade(backend, **more).reason == "suspect", more
    # A script that is found otherwise is not there.
    attack = {"spans": broken["spans.py"].data.decode() + LOADS_ALL, "reproduce": ALL_ASSERTS}
    assert grade(TreeBackend(layers=frozenset()), **attack).resolved
    assert grade(backend, **attack).reason == "unresolved"


def test_gold_resolves_and_nothing_does_not(backend: TreeBackend) -> None:
    every = [task for panel in load_panels("tiny").values() for task in panel]
    chosen = every[:: len(every) // 25][:25]
    assert len(chosen) == 25 and len({task.repo for task in chosen}) == 6
    golds = [backend.grade(task, task.patch, 60) for task in chosen]
    assert [(grade.reason, grade.doubts) for grade in golds] == [("resolved", ())] * 25
    touched = (
        "diff --git a/NOTES b/NOTES\nnew file mode 100644\n--- /dev/null\n+++ b/NOTES\n@@ -0,0 +1,1 @@\n+x\n"
    )
    for task in chosen:
        assert backend.grade(task, "", 60).reason == "no_patch"
    # The judge's second bug stands beside the task's own here, and two bugs may run for ever.
    assert {backend.grade(task, touched, 60).reason for task in chosen} <= {"unresolved", "timeout"}


def test_an_interpreter_below_tmp_is_no_litter_of_a_session(task: Task) -> None:
    need_cages()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="with space ") as folder:
        venv.create(f"{folder}/venv", with_pip=False, system_site_packages=True)
        backend = TreeBackend(python=f"{folder}/venv/bin/python")
        grade = backend.grade(task, task.patch, 60)
        assert (grade.reason, grade.doubts) == ("resolved", ())
        # What a session leaves beside the interpreter is removed for the next one.
        left = "import os, sys\nopen(os.path.dirname(sys.prefix) + '/word', 'w').close()\n"
        broken = broken_tree(task)
        now = {**broken, "spans.py": File(left.encode() + broken["spans.py"].data)}
        assert backend.grade(task, patches.diff(broken, now)[0], 60).reason in ("unresolved", "suspect")


def test_files_and_runner_cannot_be_written_while_tests_run(backend: TreeBackend, task: Task) -> None:
    writer = """
import os, pathlib
wrote = []
for folder in (".", "tests", "..", "/run", "/run/empg_envs/swe/guest", "/usr", os.path.dirname(os.__file__)):
    try:
        pathlib.Path(folder, "planted.py").write_text("x")
        wrote.append(folder)
    except OSError:
        pass
for file in ("spans.py", "tests/test_spans.py", "/run/empg_envs/swe/guest/runner.py"):
    for act in (lambda: open(file, "a"), lambda: os.chmod(file, 0o777), lambda: os.unlink(file)):
        try:
            act()
            wrote.append(file)
        except OSError:
            pass
try:
    wrote.append(os.listdir(".."))  # other trees of the judge
except OSError:
    pass
print("WROTE", wrote)
"""
    fixed = patches.apply(broken_tree(task), task.patch)
    now = {**fixed, "spans.py": File(fixed["spans.py"].data + writer.encode())}
    grade = backend.grade(task, patches.diff(broken_tree(task), now)[0], 60)
    assert "WROTE []" in grade.output and grade.reason == "resolved"


def test_a_suspect_episode_is_worth_nothing_and_says_why(tmp_path: Path) -> None:
    need_cages()
    env = SweEnv(tools="bash", predictions=str(tmp_path / "p.jsonl"))
    env.reset(split="train", index=0)
    repo = env.get_task("train", 0)["repo"]
    env.step(f"printf 'import unittest\\nunittest.TestCase.run = 1\\n' >> {repo}.py")
    done: Any = env.step("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    _, reward, terminated, _, info = done
    assert (reward, terminated, info["won"], info["reason"]) == (0.0, True, False, "suspect")
    assert info["metrics"]["suspect"] == 1.0 and info["outcome"] == "suspect"
    assert "changes unittest.TestCase.run" in info["detail"]
    env.close()
