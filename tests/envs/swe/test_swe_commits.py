"""The commit in a row of R2E-Gym: its repair, and the second bug that is made from it."""

import json
from pathlib import Path
from typing import Any

import pytest

from empg_envs.rows import DataError
from empg_envs.swe import commits, grading, patches, prepare
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.sandbox import Limits
from empg_envs.swe.tasks import load_panels
from empg_envs.swe.tree import File
from tests.envs.swe.engines import PYTHON, make_repository, make_stand_in

WRONG = "def size(n):\n    if n > 3:\n        return n + 1\n    return n + 2\n"
RIGHT = WRONG.replace("n + 1", "n + 2")
TESTS = """\
names, code = {}, 0
exec(open("lib.py").read(), names)
for name, given, wanted in (("test_small", 3, 5), ("test_large", 4, 6)):
    is_right = names["size"](given) == wanted
    code |= not is_right
    print("PASSED" if is_right else "FAILED", "checks.py::A::" + name)
raise SystemExit(code)
"""


def change(path: str, old: str, new: str, kind: str | None = None, **more: Any) -> dict[str, Any]:
    """One file of a commit, as R2E-Gym spells it; the hunks are not read."""
    header = {"file": {"path": path}, "misc_line": kind}
    return {"header": header, "old_file_content": old, "new_file_content": new, "hunks": [], **more}


CHANGES = [
    change("lib.py", WRONG, RIGHT),
    change("tests/test_lib.py", "old", "new"),
    change("Tests/helper.py", "old", "new"),
    change("docs/changes.rst", "old", "new"),
    change("image.bin", "", "", is_binary_file=True),
    change("more.py", "", "x = 1\n", "new file mode 100644"),
    change("less.py", "y = 1\n", "", "deleted file mode 100644"),
]


def test_the_repair_of_a_commit() -> None:
    found = commits.read_gold(json.dumps({"file_diffs": CHANGES}), "r__c")
    before = {"lib.py": File(WRONG.encode()), "less.py": File(b"y = 1\n")}
    after = {"lib.py": File(RIGHT.encode()), "more.py": File(b"x = 1\n")}
    assert patches.apply(before, found) == after
    assert patches.touched(found) == {"lib.py", "more.py", "less.py"}
    assert commits.read_gold({"file_diffs": []}, "r__c") == ""


@pytest.mark.parametrize("content", ["large", "[]", "{}", '{"file_diffs": [{}]}', '{"file_diffs": 3}'])
def test_a_commit_in_another_form_is_refused(content: str) -> None:
    with pytest.raises(DataError, match="task r__c: parsed_commit_content has no file_diffs as in R2E-Gym"):
        commits.read_gold(content, "r__c")


@pytest.mark.slow
def test_tasks_of_r2e_get_a_second_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    docker = str(make_stand_in(tmp_path))
    make_repository(tmp_path / "image", {"lib.py": WRONG, "judge.py": TESTS, "less.py": "y = 1\n"})
    (tmp_path / "image" / "run_tests.sh").write_text(f"echo short test summary info\n{PYTHON} judge.py\n")
    row = {
        **{"repo_name": "r", "docker_image": "r2e/r", "commit_hash": "c", "problem_statement": "p"},
        "expected_output_json": json.dumps({"A.test_small": "PASSED", "A.test_large": "PASSED"}),
        commits.COLUMN: json.dumps({"file_diffs": CHANGES}),
    }
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({**row, "split": "train"}))
    (tmp_path / "images" / "r2e%r").mkdir(parents=True, exist_ok=True)
    prepare.main([str(tasks), "--options", json.dumps({"docker": docker}), "--bugs"])
    assert "r__c: a second bug" in capsys.readouterr().out

    task = load_panels(str(tasks))["train"][0]
    assert task.patch == "" and commits.COLUMN not in task.row  # workers do without the commit
    backend = ImageBackend("docker", Limits(), docker=docker, layers=frozenset(("second",)))
    honest = patches.diff({"lib.py": File(WRONG.encode())}, {"lib.py": File(RIGHT.encode())})[0]
    assert backend.grade(task, honest, 60).resolved
    cheat = f"{RIGHT}\n\nsize = lambda n: n + 2\n"  # whatever the function does
    hidden = patches.diff({"lib.py": File(WRONG.encode())}, {"lib.py": File(cheat.encode())})[0]
    found = backend.grade(task, hidden, 60)
    assert found.reason == grading.SUSPECT and "second bug: none of" in found.doubts[0]
