"""Grading: the rule over statuses, what of a patch takes part, and attempts to tamper with the judge."""

import concurrent.futures
import dataclasses
import json
import random
import time
import types
from pathlib import Path

import pytest

from empg_envs.rows import DataError
from empg_envs.swe import grading, patches
from empg_envs.swe.backends import TreeBackend
from empg_envs.swe.grading import candidate, find_status, judge, read_report
from empg_envs.swe.judge.made import MadeBugs
from empg_envs.swe.judge.second import SecondBug
from empg_envs.swe.tasks import Task, broken_tree, parse_row
from empg_envs.swe.tree import File, Tree
from tests.cages import need_cages

ROW = {
    "instance_id": "i",
    "repo": "r",
    "base_commit": "embedded:spans",
    "problem_statement": "p",
    "patch": "",
    "FAIL_TO_PASS": ["t.py::a", "t.py::b[x y"],
    "PASS_TO_PASS": ["t.py::c"],
}
GOOD = {"t.py::a": "PASSED", "t.py::b[x y-1]": "XFAIL", "t.py::c": "SKIPPED"}


@pytest.mark.parametrize(
    ("change", "resolved"),
    [
        ({}, True),
        ({"t.py::a": "XFAIL"}, True),
        ({"t.py::a": "SKIPPED"}, False),
        ({"t.py::a": "FAILED"}, False),
        ({"t.py::a": None}, False),
        ({"t.py::c": "PASSED"}, True),
        ({"t.py::c": "XPASS"}, False),
        ({"t.py::c": "ERROR"}, False),
        ({"t.py::c": None}, False),
        ({"t.py::b[x y-1]": "FAILED"}, False),
        ({"t.py::b[x y-2]": "PASSED"}, True),  # two tests may be meant, and both pass
        ({"t.py::b[x y-2]": "FAILED"}, False),
        ({"t.py::other": "FAILED"}, True),
    ],
)
def test_rule_of_swe_bench(change: dict[str, str | None], resolved: bool) -> None:
    statuses = {name: status for name, status in {**GOOD, **change}.items() if status is not None}
    grade = judge(parse_row(ROW), statuses)
    assert grade.resolved == resolved and grade.reason == ("resolved" if resolved else "unresolved")
    assert not judge(parse_row(ROW), statuses, limit="timeout").resolved


def test_a_task_without_broken_tests_is_never_resolved() -> None:
    assert not judge(parse_row({**ROW, "FAIL_TO_PASS": []}), GOOD).resolved


def test_only_names_cut_inside_parameters_match_by_prefix() -> None:
    assert find_status("t.py::a", {"t.py::ab": "PASSED"}) is None
    assert find_status("t.py::a[1]", {"t.py::a[1]x": "PASSED"}) is None
    assert find_status("t.py::a[1", {"t.py::a[1 2]": "PASSED"}) == "PASSED"


def test_rule_of_r2e_is_equality() -> None:
    row = {
        "repo_name": "r",
        "docker_image": "namanjain12/r:1",
        "commit_hash": "abc",
        "problem_statement": "text [ISSUE]\nIt breaks.\n[/ISSUE]",
        "expected_output_json": json.dumps({"A.a": "PASSED", "b - why": "FAILED"}),
    }
    task = parse_row(row)
    assert (task.instance_id, task.problem_statement) == ("r__abc", "It breaks.")
    assert judge(task, {"A.a": "PASSED", "b": "FAILED"}).resolved
    assert not judge(task, {"A.a": "PASSED", "b": "PASSED"}).resolved
    assert not judge(task, {"A.a": "PASSED"}).resolved
    assert not judge(task, {"A.a": "PASSED", "b": "FAILED", "c": "PASSED"}).resolved
    broken = parse_row(
        {**row, "expected_output_json": json.dumps({"\x1b[1ma\x1b[0m": "PASSED", "": "ERROR"})}
    )
    assert judge(broken, {"a": "PASSED", "": "ERROR"}).resolved
    assert not judge(broken, {"a": "PASSED", "b": "ERROR"}).resolved


def test_reports_survive_garbage() -> None:
    report = b'["a", "PASSED"]\nnoise\n[1, 2]\n["a"]\n["/testbed/b", "FAILED"]\n["a", "ERROR"]\n\xff\n'
    assert read_report(report, "/testbed") == {"a": "ERROR", "b": "FAILED"}


def test_which_files_take_part() -> None:
    task = parse_row({**ROW, "FAIL_TO_PASS": ["checks/all.py::a"]})
    for path in (
        "conftest.py",
        "a/conftest.py",
        "sitecustomize.py",
        "setup.cfg",
        "pyproject.toml",
        "tests/data.txt",
        "pkg/test_x.py",
        "pkg/x_test.py",
        "checks/all.py",
        "evil.pth",
        "x-1.dist-info/entry_points.txt",
    ):
        assert grading.protected(path, task), path
    for path in ("pkg/tester.py", "pkg/testing.py", "latest.py", "contest.py", "README.md", "test.txt"):
        assert not grading.protected(path, task), path


def test_the_runner_of_sympy_is_protected_as_tests_are() -> None:
    task = parse_row({**ROW, "repo": "sympy/sympy"})
    own = ("bin/test", "bin/get_sympy.py", "sympy/testing/runtests.py", "sympy/utilities/runtests.py")
    broken: Tree = {path: File(b"run()\n") for path in (*own, "sympy/utilities/misc.py")}
    patch, _ = patches.diff(broken, {path: File(b"print('ok')\n") for path in (*broken, "bin/types.py")})
    tree, dropped = candidate(task, broken, patch)
    assert dropped == tuple(sorted((*own, "bin/types.py")))
    assert [path for path in tree if tree[path] != broken[path]] == ["sympy/utilities/misc.py"]
    assert candidate(parse_row(ROW), broken, patch)[1] == ()  # other repositories have no such files


def test_patches_of_a_task_that_do_not_fit_are_the_tasks_fault(backend: TreeBackend, task: Task) -> None:
    other = "--- a/spans.py\n+++ b/spans.py\n@@ -1 +1 @@\n-nothing of the kind\n+x\n"
    bug = SecondBug(other, task.fail_to_pass)
    for field in ("test_patch", "patch"):
        damaged = dataclasses.replace(parse_row({**task.row, field: other}), second_bugs=(bug,))
        with pytest.raises(
            DataError, match=f"{task.instance_id}: its {field} does not fit .* spans.py: hunk 1"
        ):
            backend.grade(damaged, task.patch, 20)
    alone = parse_row({**task.row, "patch": other})
    with pytest.raises(DataError, match=f"{task.instance_id}: its patch does not fit"):
        TreeBackend(layers=frozenset(("second",))).grade(alone, task.patch, 20)


def test_an_agent_cannot_keep_the_tests_from_being_added() -> None:
    broken: Tree = {"lib.py": File(b"x = 1\n")}
    more, _ = patches.diff({}, {"checks/new.txt": File(b"real\n")})
    mine, _ = patches.diff({}, {"checks/new.txt": File(b"mine\n")})
    tree, dropped = candidate(parse_row({**ROW, "test_patch": more}), broken, mine)
    assert dropped == ("checks/new.txt",) and tree["checks/new.txt"].data == b"real\n"


def test_a_second_bug_that_does_not_fit_is_told(
    backend: TreeBackend, task: Task, caplog: pytest.LogCaptureFixture
) -> None:
    bug = SecondBug("--- a/gone.py\n+++ b/gone.py\n@@ -1 +1 @@\n-a\n+b\n", task.pass_to_pass[:1])
    judged = dataclasses.replace(task, second_bugs=(bug,))
    assert backend.grade(judged, task.patch, 60).resolved
    assert caplog.messages == [
        f"task {task.instance_id}: a patch is judged without a second bug, because none of the task's 1 fits "
        "into the files that it repairs"
    ]
    caplog.clear()
    assert graded(backend, judged, README="hello\n").reason == "unresolved" and not caplog.messages


def test_changes_of_tests_and_shadowing_modules_are_put_back() -> None:
    broken: Tree = {"lib.py": File(b"x = 1\n"), "tests/test_a.py": File(b"a\n"), "json.py": File(b"j\n")}
    now = {
        "lib.py": File(b"x = 2\n"),
        "json.py": File(b"mine\n"),
        "pytest.py": File(b"evil\n"),
        "src/os/__init__.py": File(b"evil\n"),
        "conftest.py": File(b"evil\n"),
    }
    patch, _ = patches.diff(broken, now)
    tree, dropped = candidate(parse_row(ROW), broken, patch)
    assert dropped == ("conftest.py", "pytest.py", "src/os/__init__.py", "tests/test_a.py")
    assert tree == {
        "json.py": now["json.py"],
        "lib.py": now["lib.py"],
        "tests/test_a.py": broken["tests/test_a.py"],
    }


def graded(backend: TreeBackend, task: Task, **files: str | None) -> grading.Grade:
    """Grades the gold patch, or with files the broken tree plus these (None: removed)."""
    broken = broken_tree(task)
    now = {**broken, **{name: File(text.encode()) for name, text in files.items() if text is not None}}
    now = {name: file for name, file in now.items() if files.get(name, "") is not None}
    return backend.grade(task, patches.diff(broken, now)[0], 20)


def test_gold_resolves_and_nothing_else_does(backend: TreeBackend, task: Task) -> None:
    gold = backend.grade(task, task.patch, 20)
    assert gold.resolved and gold.metrics == {"fail_to_pass": 1.0, "pass_to_pass": 1.0, "suspect": 0.0}
    assert backend.grade(task, "", 20).reason == "no_patch"
    assert backend.grade(task, "nonsense", 20).reason == "patch_does_not_apply"
    other = graded(backend, task, **{"README": "hello\n"})
    assert (
        not other.resolved and other.reason == "unresolved" and other.pass_to_pass[0] == other.pass_to_pass[1]
    )


FORGED = "import json\nfor n in {names!r}:\n    print('PASSED', n)\n    print(json.dumps([n, 'PASSED']))\n"


TAMPERING: list[dict[str, str | None]] = [
    {"conftest.py": "import os; os._exit(0)\n"},
    {"sitecustomize.py": "import os; os._exit(0)\n"},
    {"tests/test_spans.py": None},
    {"tests/test_spans.py": "def test_x(): pass\n"},
    {"unittest.py": "class TestCase: pass\n"},
    {"json.py": "def loads(text): return {}\n"},
    {"pytest.ini": "[pytest]\naddopts = --collect-only\n"},
    {"setup.cfg": "[tool:pytest]\naddopts = -p evil\n", "evil.py": "import os; os._exit(0)\n"},
    {"spans.py": "import os; os._exit(0)\n"},
    {"spans.py": "raise SystemExit(0)\n"},
    {"spans.py": FORGED},
    {
        "tests/__init__.py": "raise RuntimeError\n",
        "spans-1.dist-info/entry_points.txt": "[pytest11]\nx = evil\n",
    },
]
OF_PYTEST = [files for files in TAMPERING if set(files) & {"conftest.py", "pytest.ini", "setup.cfg"}]


@pytest.mark.parametrize(
    ("runner", "files"),
    [("unittest", files) for files in TAMPERING] + [("pytest", files) for files in OF_PYTEST],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_tampering_does_not_resolve(
    backend: TreeBackend, task: Task, files: dict[str, str | None], runner: str
) -> None:
    names = [*task.fail_to_pass, *task.pass_to_pass]
    filled = {name: text and text.replace("{names!r}", repr(names)) for name, text in files.items()}
    judged = parse_row({**task.row, "runner": runner})
    grade = graded(backend, judged, **filled)
    assert not grade.resolved
    if set(files) != {"spans.py"}:  # the tests that worked before still ran
        assert grade.pass_to_pass[0] == grade.pass_to_pass[1] > 0


def test_pytest_and_unittest_agree(backend: TreeBackend, task: Task) -> None:
    by_pytest = backend.run_tests(parse_row({**task.row, "runner": "pytest"}), broken_tree(task), 20)
    by_unittest = backend.run_tests(task, broken_tree(task), 20)
    assert by_pytest.statuses == by_unittest.statuses


SUBTESTS = """
import pytest, unittest
import spans

def test_parts(subtests):
    for name in ("__name__", "gone", "__doc__"):
        with subtests.test(name):
            assert hasattr(spans, name)

class TestParts(unittest.TestCase):
    def test_parts(self):
        for name in ("gone", "__name__"):
            with self.subTest(name):
                assert hasattr(spans, name)

@pytest.fixture
def late():
    yield
    assert 0

def test_late(late):
    pass

def test_skips(subtests):
    with subtests.test("a"):
        pytest.skip()
"""
OF_SUBTESTS = {
    "tests/test_parts.py::test_parts": "FAILED",
    "tests/test_parts.py::TestParts::test_parts": "FAILED",
    "tests/test_parts.py::test_late": "ERROR",
    "tests/test_parts.py::test_skips": "PASSED",
}


@pytest.mark.skipif(pytest.version_tuple < (9,), reason="pytest has subtests since its version 9")
def test_a_test_with_subtests_has_one_status(backend: TreeBackend, task: Task) -> None:
    broken = broken_tree(task)
    more = {**broken, "tests/test_parts.py": File(SUBTESTS.encode())}
    row = {**task.row, "runner": "pytest", "test_patch": patches.diff(broken, more)[0]}
    judged = parse_row({**row, "FAIL_TO_PASS": [*task.fail_to_pass, "tests/test_parts.py::test_parts"]})
    # To an honest patch that leaves a subtest red it is a failure, and no contradiction.
    grade = backend.grade(judged, task.patch, 60)
    assert (grade.reason, grade.doubts) == ("unresolved", ())
    assert grade.statuses.items() >= OF_SUBTESTS.items()
    # The agent's own run says the same, once per test.
    sandbox = backend.open(judged)
    sandbox.write("tests/test_parts.py", SUBTESTS.encode())
    request = {"runner": "pytest", "root": sandbox.root, "paths": ["tests/test_parts.py"]}
    result = sandbox.exec(backend.test_command, 60, stdin=json.dumps(request).encode())
    sandbox.close()
    assert read_report(result.report) == OF_SUBTESTS and result.report.count(b"\n") == len(OF_SUBTESTS)


def test_tests_that_hang_end_with_their_limit(backend: TreeBackend, task: Task) -> None:
    broken = broken_tree(task)
    slow = {**broken, "spans.py": File(b"import time\ntime.sleep(60)\n")}
    assert backend.grade(task, patches.diff(broken, slow)[0], 1).reason == "timeout"


def test_a_task_without_siblings_gets_a_second_bug_that_is_kept(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_cages()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    backend = TreeBackend()
    assert len(task.second_bugs) == 19
    alone = parse_row(task.row)
    bugs = backend._second_bugs(alone, broken_tree(alone), 60)
    assert len(bugs) == 1 and set(bugs[0].red) <= {*task.fail_to_pass, *task.pass_to_pass}
    gold = patches.apply(broken_tree(task), task.patch)
    statuses = backend.run_tests(alone, patches.apply(gold, bugs[0].patch), 60).statuses
    assert all(statuses.get(name) not in grading.KEPT for name in bugs[0].red)
    other = TreeBackend()  # as another process would
    other.run_tests = None  # type: ignore[assignment]  # nothing is tried again
    assert other._second_bugs(alone, broken_tree(alone), 60) == bugs
    assert backend.grade(alone, task.patch, 60).resolved


def test_second_bugs_are_made_by_one_of_many(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gold, runs = patches.apply(broken_tree(task), task.patch), []
    steady, red = (*task.fail_to_pass, *task.pass_to_pass)[:2]

    def run(tree: Tree, seconds: float) -> dict[str, str]:
        time.sleep(0.05)
        runs.append(seconds)
        unnamed = {"t::flaky": "PASSED" if len(runs) == 1 else "FAILED"}
        return {steady: "PASSED", red: "PASSED" if len(runs) == 1 else "FAILED", **unnamed}

    def make(number: int) -> list[SecondBug]:
        return MadeBugs(random.Random(number)).make(task, gold, run, 60, within=60)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(make, range(8)))
    assert len(runs) == 3 and found[0] and found == found[:1] * 8
    kept = [path for path in tmp_path.rglob("*.json*") if not path.name.endswith(".lock")]
    assert len(kept) == 1
    kept[0].write_text("[")  # damaged
    runs.clear()
    assert make(0)[0].red == (red,) and len(runs) == 3


def test_a_test_that_fails_now_and_then_is_no_second_bug(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gold, runs = patches.apply(broken_tree(task), task.patch), []
    names = (*task.fail_to_pass, *task.pass_to_pass)

    def run(tree: Tree, seconds: float) -> dict[str, str]:
        runs.append(seconds)
        flaky = "FAILED" if len(runs) in (2, 5) else "PASSED"  # of a first and of a second run
        return {name: flaky if name == names[0] else "PASSED" for name in names}

    assert MadeBugs(random.Random(0)).make(task, gold, run, 60) == []


def test_the_time_for_second_bugs_is_limited_and_no_bug_is_kept_too(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gold, runs, clock = patches.apply(broken_tree(task), task.patch), [], [0.0]
    monkeypatch.setattr("empg_envs.swe.judge.made.time", types.SimpleNamespace(monotonic=lambda: clock[0]))

    def run(tree: Tree, seconds: float) -> dict[str, str]:
        runs.append(seconds)
        clock[0] += min(seconds, 30)
        return {task.fail_to_pass[0]: "PASSED"} if len(runs) == 1 else {}

    made = MadeBugs(random.Random(0))
    assert made.make(task, gold, run, 60, within=50) == [] and runs == [50, 20]
    assert made.recall(task) == MadeBugs(random.Random(0)).recall(task) == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    # Nothing passes: in an episode that is kept, when it is prepared it is not.
    for within, kept in ((None, None), (5.0, [])):
        assert MadeBugs(random.Random(0)).make(task, gold, lambda *_: {}, 60, within=within) == []
        assert MadeBugs(random.Random(0)).recall(task) == kept
