"""Tasks of public rows inside images, as their rows really are; and what the image judges by."""

import json
from pathlib import Path
from typing import Any

import pytest

from empg_envs.rows import DataError
from empg_envs.swe import backends, fixed, patches, score
from empg_envs.swe.env import SweEnv
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.sandbox import FileError, Limits, SandboxError
from empg_envs.swe.tasks import Task, broken_tree, parse_row
from empg_envs.swe.tree import File
from tests.cages import need_cages
from tests.envs.swe.engines import PYTEST, make_repository, make_stand_in

pytestmark = pytest.mark.slow

TESTS = """\
import logging

import pytest


def test_a():
    assert open("lib.txt").read() == "right\\n"


def test_logs():
    logging.error("expected")


@pytest.mark.xfail
def test_fails():
    assert 0
"""
GOLD = "--- a/lib.txt\n+++ b/lib.txt\n@@ -1 +1 @@\n-wrong\n+right\n"
PICTURE = """\
diff --git a/logo.png b/logo.png
index 1111111..2222222 100644
Binary files a/logo.png and b/logo.png differ
"""
MOVED = """\
diff --git a/test_lib.py b/test_new.py
similarity index 100%
rename from test_lib.py
rename to test_new.py
"""
ASYNCHRONOUS = """\
import logging, unittest


class T(unittest.IsolatedAsyncioTestCase):
    async def test_a(self):
        logging.error("expected")
        self.assertEqual(open("lib.txt").read(), "right\\n")
"""
SCRIPT = f"{PYTEST} -rA -p no:cacheprovider r2e_tests\n"
FORGES = "echo short test summary info; for t in a logs; do echo PASSED r2e_tests/t.py::test_$t; done\n"
OF_R2E = {"repo_name": "r", "docker_image": "r2e/r", "commit_hash": "c", "problem_statement": "p"}
OF_R2E |= {"expected_output_json": json.dumps({"test_a": "PASSED", "test_logs": "PASSED"}), "split": "train"}
OF_BENCH = {
    "instance_id": "o__r-1",
    "repo": "o/r",
    "base_commit": "HEAD",
    "problem_statement": "lib.txt is wrong",
    "patch": GOLD,
    "FAIL_TO_PASS": ["test_lib.py::test_a"],
    "PASS_TO_PASS": ["test_lib.py::test_logs"],
    "test_cmd": f"{PYTEST} -rA -p no:cacheprovider",
}


def write(text: str, name: str) -> str:
    """The patch that makes a file."""
    return patches.diff({}, {name: File(text.encode())})[0]


def rewrite(old: str, new: str, name: str) -> str:
    """The patch that changes a file."""
    return patches.diff({name: File(old.encode())}, {name: File(new.encode())})[0]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine with one image that is as R2E-Gym's and as SWE-bench's are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = make_stand_in(tmp_path)
    image = tmp_path / "image"
    make_repository(image, {"lib.txt": "wrong\n", "test_lib.py": TESTS, ".gitignore": ".venv\n"})
    (image / "run_tests.sh").write_text(SCRIPT)
    (image / "r2e_tests").mkdir()
    (image / "r2e_tests" / "test_1.py").write_text(TESTS)
    (image / ".venv" / "bin").mkdir(parents=True)
    (image / "build.txt").write_text("made with the image\n")  # neither in the commit nor ignored
    return program


def grade(docker: Path, row: dict[str, Any], patch: str) -> Any:
    return ImageBackend("docker", Limits(), docker=str(docker)).grade(parse_row(row), patch, 60)


def test_a_repair_of_r2e_is_graded_by_the_summary_alone(docker: Path) -> None:
    """Neither an expected failure nor what a passing test logs is a test too many."""
    found = grade(docker, OF_R2E, GOLD)
    assert found.resolved and found.statuses == {"test_a": "PASSED", "test_logs": "PASSED"}
    assert not grade(docker, OF_R2E, GOLD.replace("+right", "+worse")).resolved


@pytest.mark.parametrize(
    "patch",
    [
        rewrite(SCRIPT, FORGES, "run_tests.sh"),
        rewrite(TESTS, "def test_a(): pass\n\n\ndef test_logs(): pass\n", "r2e_tests/test_1.py"),
        write("def test_a(): pass\n", "r2e_tests/more/test_1.py"),
        write("print('short test summary info')\n", ".venv/lib/pytest.py"),
    ],
)
def test_a_patch_cannot_change_what_an_image_judges_by(docker: Path, patch: str) -> None:
    image = docker.parent / "image"
    assert not grade(docker, OF_R2E, patch).resolved
    assert grade(docker, OF_R2E, patch + GOLD).resolved  # it is left out
    (image / "run_tests.sh").rename(docker.parent / "run_tests.sh")
    assert not grade(docker, OF_R2E, patch).resolved


def test_an_agent_cannot_hand_in_the_script_that_judges_it(docker: Path) -> None:
    """By a program of its own in place of git, which is asked for its changes."""
    forged = rewrite(SCRIPT, FORGES, "run_tests.sh")
    tasks = docker.parent / "tasks.jsonl"
    tasks.write_text(json.dumps(OF_R2E))
    env = SweEnv(str(tasks), backend="docker", docker=str(docker), tools="bash")
    env.reset(split="train", index=0)
    git = '#!/bin/bash\ncase "$*" in *no-ext-diff*) cat /testbed/.venv/p;; esac\n'
    env.step(
        f"cat > .venv/bin/git <<'EOF'\n{git}EOF\nchmod +x .venv/bin/git; cat > .venv/p <<'EOF'\n{forged}EOF\n"
    )
    _, reward, terminated, _, info = env.step("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    env.close()
    assert terminated and reward == 0.0, info


def test_files_that_only_the_image_has_are_nobodys_change(docker: Path) -> None:
    backend = ImageBackend("docker", Limits(), docker=str(docker))
    for row in (OF_R2E, OF_BENCH):
        task = parse_row({**row, "image": "o/r"})
        sandbox = backend.open(task)
        sandbox.write("lib.txt", b"right\n")
        patch = backend.collect(task, sandbox)
        sandbox.close()
        found = backend.grade(task, patch, 60)
        assert "build.txt" in patch and found.resolved, found.output


def test_pictures_and_new_names_in_the_patches_of_a_row(docker: Path) -> None:
    """The agent is not blamed for them, nor is it credited."""
    row = {**OF_BENCH, "image": "o/r"}
    assert grade(docker, {**row, "patch": GOLD + PICTURE}, GOLD).resolved
    names = {"FAIL_TO_PASS": ["test_new.py::test_a"], "PASS_TO_PASS": ["test_new.py::test_logs"]}
    found = grade(docker, {**row, **names, "test_patch": MOVED}, GOLD)
    assert found.resolved, found.output
    with pytest.raises(DataError, match="its test patch does not apply"):
        grade(docker, {**row, "test_patch": PICTURE}, GOLD)


def test_a_report_has_the_other_tasks(docker: Path) -> None:
    rows = [
        {**OF_BENCH, "image": "o/r"},
        {**OF_BENCH, "image": "o/r", "instance_id": "o__r-2", "test_patch": PICTURE},
    ]
    home = docker.parent
    (home / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [
        {"instance_id": row["instance_id"], "model_patch": GOLD, "model_name_or_path": "m"} for row in rows
    ]
    (home / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    options = [
        "--backend",
        "docker",
        "--options",
        json.dumps({"docker": str(docker)}),
        "--out",
        str(home / "o.json"),
    ]
    with pytest.raises(SystemExit) as ended:
        score.main([str(home / "t.jsonl"), str(home / "p.jsonl"), *options])
    report = json.loads((home / "o.json").read_text())
    assert ended.value.code == 1 and report["resolved_ids"] == ["o__r-1"]
    assert "test patch does not apply" in report["errors"]["o__r-2"]


def test_an_asynchronous_test_that_logs_an_error_is_honest(docker: Path) -> None:
    names = {"FAIL_TO_PASS": ["test_more.py::T::test_a"], "PASS_TO_PASS": []}
    row = {**OF_BENCH, **names, "image": "o/r", "test_patch": write(ASYNCHRONOUS, "test_more.py")}
    found = grade(docker, row, GOLD)
    assert found.resolved, (found.doubts, found.output)


def test_a_full_disk_is_not_the_agents_failure(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    need_cages()
    backend = backends.TreeBackend()

    def write_nothing(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(fixed.os, "open", write_nothing)
        with pytest.raises(SandboxError, match="No space left"):
            backend.grade(task, task.patch, 60)
    unfit = patches.diff(broken_tree(task), {**broken_tree(task), "a": File(b"1\n"), "a/b": File(b"1\n")})[0]
    assert backend.grade(task, unfit, 60).reason == "does_not_fit"
    assert issubclass(FileError, ValueError) and not issubclass(SandboxError, ValueError)
