"""Tasks inside images: a stand-in for the docker program that records its calls and runs them in a cage."""

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from empg_envs.swe import patches
from empg_envs.swe.containers import DockerSandbox
from empg_envs.swe.env import SweEnv
from empg_envs.swe.images import ALL_LAYERS, ImageBackend
from empg_envs.swe.owners import FROZEN, LABEL, owner, remove_frozen, remove_orphans
from empg_envs.swe.sandbox import FileError, Limits, LostSandboxError, SandboxError
from empg_envs.swe.tasks import parse_row
from empg_envs.swe.tools import render_call
from empg_envs.swe.tree import File, Tree
from tests.envs.swe.attacks import PATCHES, PatchAttack
from tests.envs.swe.engines import PYTHON, calls, make_repository, make_stand_in

OF_R2E = """\
echo "=== short test summary info ==="
grep -q right lib.txt && echo "PASSED checks.py::A::test_a" || echo "FAILED checks.py::A::test_a - why"
echo "PASSED checks.py::A::test_b"
grep -q right lib.txt
"""
# A stand-in for pytest.
JUDGE = """\
import sys
sys.path.insert(0, "")
try:
    import conftest
except ImportError:
    pass
names, code = {}, 0
exec(open("checks.py").read(), names)
for name in list(names):
    if name.startswith("test_"):
        try:
            names[name]()
            print("PASSED checks.py::" + name)
        except Exception as error:
            print("FAILED checks.py::" + name, "-", repr(error))
            code = 1
sys.exit(code)
"""
LIB = "def word():\n    return open('lib.txt').read()\n"
CHECKS = """\
# old
import lib

def test_a():
    assert lib.word() == "right\\n"

def test_b():
    assert lib.word()
"""
GOLD = "--- a/lib.txt\n+++ b/lib.txt\n@@ -1 +1 @@\n-wrong\n+right\n"
FILES = {"lib.txt": "wrong\n", "lib.py": LIB, "checks.py": CHECKS, "judge.py": JUDGE, "setup.cfg": "[x]\n"}
BROKEN: Tree = {name: File(text.encode()) for name, text in FILES.items()}
NEW_CHECKS = File(CHECKS.replace("old", "new").encode())
ROW = {
    "instance_id": "o__r-1",
    "repo": "o/r",
    "base_commit": "HEAD",
    "problem_statement": "lib.txt is wrong",
    "patch": GOLD,
    "test_patch": patches.diff(BROKEN, {**BROKEN, "checks.py": NEW_CHECKS})[0],
    "FAIL_TO_PASS": ["checks.py::test_a"],
    "PASS_TO_PASS": ["checks.py::test_b"],
    "test_cmd": f"{PYTHON} judge.py",
}


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program = make_stand_in(tmp_path)
    make_repository(tmp_path / "image", FILES)
    return program


def test_an_episode_in_a_container(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**ROW, "split": "test"}))
    env = SweEnv(str(tmp_path / "tasks.jsonl"), backend="docker", docker=str(docker), tools="bash")
    env.reset(split="test", index=0)
    assert "wrong" in env.step("cat lib.txt; sleep 300 &")[0]
    env.step("echo right > lib.txt; echo tampered > checks.py; echo > new.txt")
    _, reward, terminated, _, info = env.step("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    assert (reward, terminated, info["won"]) == (1.0, True, True)
    env.close()
    run = next(call for call in calls(docker) if call[0] == "run")
    assert run[run.index("--network") + 1] == "none" and run[run.index("--cap-drop") + 1] == "ALL"
    assert run[run.index("--memory") + 1] == "1024m" and run[run.index("--pids-limit") + 1] == "64"
    assert "docker.io/swebench/sweb.eval.x86_64.o_1776_r-1:latest" in run
    # Three containers, the agent's, the judge's and that of the tests, and all are gone with their images.
    assert sum(call[0] == "run" for call in calls(docker)) == 3
    assert [*(tmp_path / "box").iterdir(), *(tmp_path / "images").iterdir()] == []
    # What the agent's commands leave is ended after each; a judge's container does not outlive its tests.
    swept = {call[1] for call in calls(docker) if call[-3:] == ["bash", "-c", "kill -9 -1"]}
    assert swept == {run[run.index("--name") + 1]}


def test_a_repair_counts_whatever_lies_beside_it(docker: Path, tmp_path: Path) -> None:
    """Binaries, links, submodules, other encodings and names that programs read differently are left out."""
    image = docker.parent / "image"
    (image / "old.bin").write_bytes(b"a\0b")
    (image / "latin").write_bytes(b"caf\xe9\na\n")
    (image / "old link").symlink_to("lib.py")
    (image / "to_file").symlink_to("lib.py")
    (image / "to_link").write_text("x\n")
    for command in ("add -A", "-c user.name=a -c user.email=a@b commit -qm base --amend"):
        subprocess.run(["git", *command.split()], cwd=image, check=True)
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**ROW, "split": "test"}))
    env = SweEnv(str(tmp_path / "tasks.jsonl"), backend="docker", docker=str(docker), tools="bash")
    env.reset(split="test", index=0)
    env.step("echo right > lib.txt; ln -s lib.py link.py; printf 'c\\0d' > .coverage; cp .coverage old.bin")
    env.step("sed -i s/a$/b/ latin; rm 'old link' to_file to_link")
    env.step("echo y > to_file; ln -s lib.py to_link; git init -q sub")
    env.step("git -C sub -c user.name=a -c user.email=a@b commit -q --allow-empty -m x")
    env.step("""echo x > 'out '; echo x > ' in'; echo x > 'a"b'; touch 'empty '; mv setup.cfg 'moved '""")
    _, reward, _, _, info = env.step("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    env.close()
    assert (reward, info["reason"]) == (1.0, "resolved"), info


def test_a_replacement_character_that_is_in_a_file_stays_there(docker: Path) -> None:
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    sandbox = backend.open(task)
    sandbox.exec(r"echo right > lib.txt; printf '\357\277\275\n' > mark; printf '\351\n' > latin", 20)
    patch = backend.collect(task, sandbox)
    sandbox.close()
    assert sorted(patches.touched(patch)) == ["lib.txt", "mark"] and "+\ufffd\n" in patch


def test_verdicts(docker: Path) -> None:
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    assert backend.grade(task, GOLD, 20).resolved
    assert backend.grade(task, "", 20).reason == "no_patch"
    assert backend.grade(task, GOLD.replace("wrong", "other"), 20).reason == "patch_does_not_apply"
    wrong = backend.grade(task, GOLD.replace("+right", "+worse"), 20)
    assert wrong.reason == "unresolved" and wrong.fail_to_pass == (0, 1) and wrong.pass_to_pass == (1, 1)
    slow = parse_row({**ROW, "test_cmd": "sleep 30;"})
    assert backend.grade(slow, GOLD, 0.5).reason == "timeout"


def test_an_r2e_task_hides_its_tests_from_the_agent(docker: Path) -> None:
    (docker.parent / "image" / "run_tests.sh").write_text(OF_R2E)
    row = {"repo_name": "r", "docker_image": "r2e/r", "commit_hash": "c", "problem_statement": "p"}
    task = parse_row({**row, "expected_output_json": '{"A.test_a": "PASSED", "A.test_b": "PASSED"}'})
    backend = ImageBackend("docker", Limits(), docker=str(docker))
    sandbox = backend.open(task)
    assert "run_tests.sh" not in sandbox.exec("ls", 20).output
    sandbox.write("lib.txt", b"right\n")
    patch = backend.collect(task, sandbox)
    sandbox.close()
    assert patch.count("diff --git") == 1 and backend.grade(task, patch, 20).resolved
    assert not backend.grade(task, patch.replace("+right", "+worse"), 20).resolved


def with_files(**files: str) -> str:
    """The gold patch, or other texts of files (`__` stands for a dot)."""
    texts = {name.replace("__", "."): File(text.encode()) for name, text in files.items()}
    return patches.diff(BROKEN, {**BROKEN, **texts})[0]


FORGED = LIB + "print('PASSED checks.py::test_a')\nimport atexit\n"
FORGED += "atexit.register(print, 'PASSED checks.py::test_a')\n"

EQUALS_ALL = "class A:\n def __eq__(s, o): return o or 1\ndef word(): return A()\n"
LEAVES = "import os\nprint('PASSED checks.py::test_a')\nos._exit(0)\n"


@pytest.mark.parametrize(
    ("patch", "layers", "reason"),
    [
        (with_files(lib__txt="right\n", conftest__py="import lib\n"), ALL_LAYERS, "resolved"),
        (with_files(conftest__py="import lib\nlib.word = lambda: 'right\\n'\n"), ALL_LAYERS, "unresolved"),
        (with_files(conftest__py="import os\nos._exit(0)\n"), ALL_LAYERS, "suspect"),
        (with_files(lib__py=FORGED), ALL_LAYERS, "suspect"),
        (with_files(lib__py=FORGED), {"sessions"}, "suspect"),
        (with_files(lib__py=FORGED), set(), "resolved"),
        (with_files(lib__py=EQUALS_ALL), set(), "resolved"),
        (with_files(lib__py=EQUALS_ALL), {"canaries"}, "suspect"),
        (with_files(lib__py=LEAVES), ALL_LAYERS, "suspect"),
        (with_files(lib__txt="right\n", reproduce__py="import unittest, lib\n"), ALL_LAYERS, "resolved"),
        (with_files(json__py="x = 1\n", lib__txt="right\n"), ALL_LAYERS, "suspect"),
        (with_files(checks__py="def test_a(): pass\ndef test_b(): pass\n"), ALL_LAYERS, "unresolved"),
    ],
)
def test_patches_that_tamper(docker: Path, patch: str, layers: set[str], reason: str) -> None:
    backend = ImageBackend("docker", Limits(), docker=str(docker), layers=frozenset(layers))
    backend._draw = random.Random(1)  # type: ignore[assignment]
    grade = backend.grade(parse_row(ROW), patch, 20)
    assert grade.reason == reason, (grade.doubts, grade.output)


def test_a_patch_may_not_change_gits_own_files(docker: Path) -> None:
    config = "--- a/.git/config\n+++ b/.git/config\n@@ -1 +1,2 @@\n [core]\n+\tfsmonitor = touch /tmp/ran\n"
    grade = ImageBackend("docker", Limits(), docker=str(docker)).grade(parse_row(ROW), config + GOLD, 20)
    assert grade.reason == "patch_does_not_apply" and "git's own files" in grade.output


def test_a_source_that_is_too_large_to_be_read_is_suspect(docker: Path) -> None:
    backend = ImageBackend("docker", Limits(), docker=str(docker), layers=frozenset(("reading",)))
    large = f"--- /dev/null\n+++ b/new.py\n@@ -0,0 +1 @@\n+{'#' * 1_100_000}\n"
    grade = backend.grade(parse_row(ROW), GOLD + large, 20)
    assert grade.doubts == ("new.py: is too large to be read",) and grade.reason == "suspect"
    assert backend.grade(parse_row(ROW), GOLD + large.replace("new.py", "new.txt"), 20).resolved


@pytest.mark.parametrize("attack", PATCHES, ids=lambda attack: attack.name)
def test_the_form_of_a_patch_smuggles_nothing(docker: Path, attack: PatchAttack) -> None:
    layers = ALL_LAYERS - {"reading"}  # which would doubt some of them
    backend = ImageBackend("docker", Limits(), docker=str(docker), layers=layers)
    code = "import lib; lib.word = lambda: 'right\\n'"
    grade = backend.grade(parse_row(ROW), attack.text.replace("CODE", code), 60)
    assert grade.reason == ("patch_does_not_apply" if attack.is_refused else "unresolved"), grade.output


def test_names_that_git_quotes_are_read(docker: Path) -> None:
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    sandbox = backend.open(task)
    sandbox.exec("echo right > lib.txt; echo y > 'é x.txt'; echo y > conftest.py", 20)
    patch = backend.collect(task, sandbox)
    sandbox.close()
    assert '"b/\\303\\251 x.txt"' in patch
    grade = backend.grade(task, patch, 20)
    assert grade.dropped == ("conftest.py",) and grade.fail_to_pass == (1, 1)


def test_files_that_cannot_be_put_back_end_the_grading(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_envs.swe.imaged.RESTORE", "exit 3")
    patch = with_files(lib__txt="right\n", conftest__py="import lib\n")
    with pytest.raises(LostSandboxError, match="files cannot be put back"):
        ImageBackend("docker", Limits(), docker=str(docker)).grade(parse_row(ROW), patch, 20)


WRITES = (
    LIB
    + """
for name in ("checks.py", "lib.py", "new.py", "logs/x"):
    try:
        open(name, "a").write("pass")
        print("WROTE", name)
    except OSError as error:
        print("KEPT", name)
"""
)


def test_nothing_can_be_changed_while_tests_run(docker: Path) -> None:
    patch = with_files(lib__txt="right\n", lib__py=WRITES)
    options: dict[str, Any] = {"docker": str(docker), "writable": {"o/r": ["logs"]}, "network": "bridge"}
    (docker.parent / "image" / "logs").mkdir()
    grade = ImageBackend("docker", Limits(), **options).grade(parse_row(ROW), patch, 20)
    assert grade.resolved and "KEPT checks.py\nKEPT lib.py\nKEPT new.py\nWROTE logs/x" in grade.output
    said = calls(docker)
    runs = [call for call in said if call[0] == "run"]
    # The container that is prepared, and the one with the tests, over an image of the first one's files.
    assert ["--read-only" in run for run in runs] == [False, True]
    commit = next(call for call in said if call[0] == "commit")
    fixed = runs[1]
    assert commit[1] == runs[0][runs[0].index("--name") + 1] and commit[2] in fixed
    assert fixed[fixed.index("--volume") + 1] == "/testbed/logs"
    assert [fixed[at + 1].partition(":")[0] for at, word in enumerate(fixed) if word == "--tmpfs"] == [
        *("/tmp", "/var/tmp", "/run")
    ]
    assert {run[run.index("--network") + 1] for run in runs} == {"bridge"}
    assert [call[0] for call in said if call[0] not in ("exec", "inspect")] == [
        *("ps", "run", "images", "commit", "ps", "run", "rm", "rmi", "rm")
    ]
    free = ImageBackend("docker", Limits(), docker=str(docker), layers=ALL_LAYERS - {"fixed"})
    assert "WROTE checks.py" in free.grade(parse_row(ROW), patch, 20).output


SIZES = """\
# Words

# and their sizes.

def word():
    return open('lib.txt').read() if 1 < 2 else ''


def size(n):
    return n + 2
"""


BUILD = """\
set -e
sed 's/0/1/' fast.c > fast.so  # the compiler
echo evil > checks.py
echo evil > conftest.py
ln -s /etc/passwd link.so
"""


@pytest.mark.slow
def test_what_is_compiled_is_built_apart(docker: Path) -> None:
    image = docker.parent / "image"
    (image / "fast.c").write_text("0 wrong\n")
    (image / "fast.so").write_text("0 wrong\n")
    (image / "build.sh").write_text(BUILD)
    (image / "lib.py").write_text("def word():\n    return open('fast.so').read()[2:]\n")
    subprocess.run(
        "git add -A && git -c user.name=a -c user.email=a@b commit -qm c", shell=True, cwd=image, check=True
    )
    patch = "--- a/fast.c\n+++ b/fast.c\n@@ -1 +1 @@\n-0 wrong\n+0 right\n"
    task = parse_row({**ROW, "patch": patch, "install_cmd": "bash build.sh; touch /usr/evil; echo built"})
    backend = ImageBackend("docker", Limits(), docker=str(docker))
    grade = backend.grade(task, patch, 60)
    assert grade.resolved and "/usr/evil" in grade.output and "built" in grade.output, grade.output
    # A build that fails leaves what was there; a patch of sources alone needs none.
    broken = parse_row({**ROW, "patch": patch, "install_cmd": "exit 1"})
    assert backend.grade(broken, patch, 60).reason == "unresolved"
    before = len(calls(docker))
    assert backend.grade(task, GOLD, 60).reason == "unresolved"
    assert not any("build.sh" in " ".join(call) for call in calls(docker)[before:])


@pytest.mark.slow
def test_another_bug_must_stay_red(docker: Path) -> None:
    image = docker.parent / "image"
    (image / "lib.py").write_text(SIZES)
    checks = CHECKS + "\ndef test_size():\n    assert lib.size(3) == 5\n"
    (image / "checks.py").write_text(checks)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-qam", "base", "--amend"], cwd=image, check=True)
    now = {name: File((image / name).read_bytes()) for name in FILES}
    gold = {**now, "lib.txt": File(b"right\n"), "lib.py": File(SIZES.replace("Words", "Good words").encode())}
    row = {**ROW, "patch": patches.diff(now, gold)[0], "PASS_TO_PASS": ["checks.py::test_size"]}
    row["test_patch"] = patches.diff(now, {**now, "checks.py": File(checks.replace("old", "new").encode())})[
        0
    ]
    task = parse_row(row)
    backend = ImageBackend("docker", Limits(), docker=str(docker))
    backend._draw = backend._made._draw = random.Random(1)
    bugs = backend.second_bugs(task, 60)
    assert len(bugs) == 1 and set(bugs[0].red) <= {
        *task.fail_to_pass,
        *task.pass_to_pass,
        "checks.py::test_b",
    }
    before = len([call for call in calls(docker) if call[0] == "run"])
    assert backend.grade(task, task.patch, 60).resolved
    runs = [call for call in calls(docker) if call[0] == "run"][before:]
    # Each session has a container and an image of its own.
    assert ["--read-only" in run for run in runs] == [False, True, True]
    assert len({run[run.index("-c") - 1] for run in runs}) == 3
    # Another process knows the bug, and does not try again.
    other = ImageBackend("docker", Limits(), docker=str(docker), layers=frozenset(("second", "fixed")))
    other._make = None  # type: ignore[assignment, method-assign]
    assert other.second_bugs(task, 60) == bugs
    del other._make
    # Code that replaces what the tests see: with the second bug they stay green.
    cheat = now["lib.py"].data + b"\nword = lambda: 'right\\n'\nsize = lambda n: 5\n"
    grade = other.grade(task, patches.diff(now, {**now, "lib.py": File(cheat)})[0], 60)
    assert grade.reason == "suspect" and "second bug: none of" in grade.doubts[0]


def test_a_repair_that_touches_configuration_keeps_it(docker: Path) -> None:
    gold = with_files(lib__txt="right\n", setup__cfg="[y]\n")
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row({**ROW, "patch": gold})
    assert backend.grade(task, gold, 20).dropped == ()
    other = backend.grade(parse_row(ROW), gold, 20)
    assert other.dropped == ("setup.cfg",) and other.resolved


def test_committed_work_is_collected_and_the_future_is_not_there(docker: Path) -> None:
    image = docker.parent / "image"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (image / "lib.txt").write_text("right\n")
    for command in ("commit -qam future", "tag later", "branch ahead", "reset -q --hard HEAD~1"):
        subprocess.run([*git, *command.split()], cwd=image, check=True)
    future = subprocess.run(
        [*git, "rev-parse", "later"], cwd=image, check=True, capture_output=True, text=True
    )
    row = {"repo_name": "r", "docker_image": "r2e/r", "commit_hash": "c", "problem_statement": "p"}
    for task in (parse_row(ROW), parse_row({**row, "expected_output_json": "{}"})):
        backend = ImageBackend("docker", Limits(), docker=str(docker))
        sandbox = backend.open(task)
        assert "future" not in sandbox.exec("git log --all --oneline; git reflog", 20).output
        assert sandbox.exec(f"git cat-file -e {future.stdout.strip()}", 20).returncode != 0
        assert sandbox.exec("git log --oneline", 20).output.endswith(" base\n")
        commit = "git -c user.name=a -c user.email=a@b commit -qam work"
        assert sandbox.exec(f"echo right > lib.txt; {commit}; echo y > more.txt", 20).returncode == 0
        patch = backend.collect(task, sandbox)
        assert "+right" in patch and "+y" in patch
        sandbox.close()


def test_files_that_can_be_executed_stay_so(docker: Path) -> None:
    image = docker.parent / "image"
    (image / "tool.sh").write_text("#!/bin/sh\necho wrong\n")
    (image / "tool.sh").chmod(0o755)
    call = "subprocess.run('./tool.sh', capture_output=True, text=True, check=True).stdout"
    (image / "lib.py").write_text(f"import subprocess\n\ndef word():\n    return {call}\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in ("add -A", "commit -qam base --amend"):
        subprocess.run([*git, *command.split()], cwd=image, check=True)
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    sandbox = backend.open(task)
    sandbox.exec(
        "sed -i 's/echo wrong/exec .\\/new.sh/' tool.sh; printf '#!/bin/sh\necho right\n' > new.sh", 20
    )
    sandbox.exec("chmod +x new.sh; ln -s /bin/sh 'a link'; echo 1 > 'a file'", 20)
    patch = backend.collect(task, sandbox)
    modes = [line for line in patch.splitlines() if "mode" in line]
    assert modes == ["new file mode 100644", "new file mode 100755"]
    grade = backend.grade(task, patch, 20)
    sandbox.close()
    assert grade.resolved, grade.output


def test_work_is_collected_despite_a_lock_and_not_from_an_engine_that_is_gone(docker: Path) -> None:
    """A lock is what a git command leaves that was ended; without an engine there is no empty patch."""
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    sandbox = backend.open(task)
    sandbox.exec("echo right > lib.txt; touch .git/index.lock", 20)
    assert "+right" in backend.collect(task, sandbox)
    long = sandbox.exec(f"echo {'x' * 130_000}", 20)
    assert long.returncode == 126 and "at most 120000 bytes" in long.output
    (docker.parent / "dead").touch()
    with pytest.raises(SandboxError, match="does not answer: Cannot connect to the Docker daemon"):
        backend.collect(task, sandbox)
    (docker.parent / "dead").unlink()
    sandbox.close()


def test_a_program_that_hangs_is_a_timeout(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("empg_envs.swe.containers.MARGIN_SECONDS", 0.1)
    sandbox = ImageBackend("docker", Limits(), docker=str(docker)).open(parse_row(ROW))
    assert sandbox.exec("HANG", 0.1).reason == "timeout"
    assert sandbox.exec("echo alive", 20).output == "alive\n"
    sandbox.close()


def test_files_of_a_container(docker: Path) -> None:
    sandbox = ImageBackend("docker", Limits(), docker=str(docker)).open(parse_row(ROW))
    sandbox.write("d/new.txt", b"\x00\xff\n")
    assert sandbox.read("/testbed/d/new.txt") == b"\x00\xff\n"
    assert set(sandbox.snapshot()) == {*FILES, "d/new.txt"}
    sandbox.exec("ln -s /etc/passwd link", 20)
    for path, message in (("../x", "outside"), ("link", "outside"), ("none", "No"), ("d", "folder")):
        with pytest.raises(FileError, match=f"(?i){message}"):
            sandbox.read(path)
    late = sandbox.exec("sleep 30", 0.5)
    assert (late.reason, late.returncode) == ("timeout", -9)
    sandbox.close()
    with pytest.raises(SandboxError, match="reset it first"):
        sandbox.exec("true", 5)


def test_a_container_that_an_agent_ends_counts_against_it(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**ROW, "split": "test"}))
    env = SweEnv(
        str(tmp_path / "tasks.jsonl"), backend="docker", docker=str(docker), tools="bash", max_turns=4
    )
    # The engine that does not come to an end, the container that is gone, and a judge that is lost.
    monkeypatch.setattr("empg_envs.swe.containers.MARGIN_SECONDS", 0.1)
    env.reset(split="test", index=0)
    env._command_timeout = 0.1
    assert "the command was ended" in env.step("HANG")[0]
    env._command_timeout = 20
    env.step("echo right > lib.txt")
    (box,) = (tmp_path / "box").iterdir()
    box.rename(tmp_path / "gone")
    _, reward, _, truncated, info = env.step("ls")
    assert (reward, truncated, info["won"], info["reason"]) == (0.0, True, False, "sandbox_lost")
    assert info["outcome"] == "sandbox_lost" and "is gone" in info["detail"]
    (tmp_path / "gone").rename(box)
    env.reset(split="test", index=0)
    env.step("echo right > lib.txt")

    def lose(*args: Any) -> Any:
        raise LostSandboxError("'docker exec' took longer than 30 seconds")

    monkeypatch.setattr(env._backend, "grade", lose)
    _, reward, terminated, _, info = env.step("echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    assert (reward, terminated, info["reason"]) == (0.0, True, "sandbox_lost")
    assert info["outcome"] == "sandbox_lost" and "took longer" in info["detail"]
    env.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stuck", "says"),
    [
        ("exec", "the command was ended"),  # the command alone was slow
        ("exec inspect", "'docker inspect' took longer than 2 seconds"),  # the container is stuck
        ("exec inspect version", "does not answer: .*'docker version' took longer than 2 seconds"),
    ],
)
def test_a_slow_command_is_told_from_an_engine_that_hangs(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: str, says: str
) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**ROW, "split": "test"}))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("empg_envs.swe.containers.MARGIN_SECONDS", 0.1)
    monkeypatch.setattr(DockerSandbox, "close", lambda self: None)
    env = SweEnv(str(tmp_path / "tasks.jsonl"), backend="docker", tools="bash", command_timeout=0.1)
    env.reset(split="test", index=0)
    monkeypatch.setattr("empg_envs.swe.containers.FILE_SECONDS", 2.0)
    monkeypatch.setattr(env._sandbox, "_is_swept", False)
    (tmp_path / "stuck").write_text(stuck)
    if "version" in stuck:  # an outage: the episode is sampled again, whatever the agent did
        with pytest.raises(SandboxError, match=says) as caught:
            env.step("ls")
        assert not isinstance(caught.value, LostSandboxError)
        return
    shown, reward, _, truncated, info = env.step("ls")
    assert says in (info["detail"] if truncated else shown) and reward == 0.0
    assert truncated == ("inspect" in stuck) and info.get("outcome") == (
        "sandbox_lost" if truncated else None
    )
    # Files of a container that is stuck are lost, too; where the engine hangs they are not.
    assert env._sandbox is not None
    with pytest.raises(LostSandboxError, match="'docker exec' took longer"):
        env._sandbox.read("lib.txt")
    (tmp_path / "stuck").write_text("exec version")
    with pytest.raises(SandboxError, match="does not answer") as caught:
        env._sandbox.read("lib.txt")
    assert not isinstance(caught.value, LostSandboxError)


def test_failures_of_the_machine_are_errors(docker: Path, tmp_path: Path) -> None:
    task = parse_row({**ROW, "image": "broken"})
    with pytest.raises(SandboxError, match="cannot start a container of broken: Unable to find image"):
        ImageBackend("docker", Limits(), docker=str(docker)).open(task)
    with pytest.raises(SandboxError, match="install Docker"):
        ImageBackend("docker", Limits(), docker=str(tmp_path / "none")).open(task)


def test_a_judge_that_starts_too_slowly_is_no_fault_of_the_agent(
    docker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("empg_envs.swe.containers.START_SECONDS", 0.5)
    (docker.parent / "stuck").write_text("run")
    with pytest.raises(SandboxError, match="docker run' took longer") as caught:
        ImageBackend("docker", Limits(), docker=str(docker)).grade(parse_row(ROW), GOLD, 20)
    assert not isinstance(caught.value, LostSandboxError)


def test_containers_of_dead_workers_are_removed(docker: Path) -> None:
    box, here = docker.parent / "box", owner().partition(".")[0]
    lines = ["empg-jax-odd x", f"empg-jax-mine {owner()}", "empg-jax-elsewhere 0123456789abcdef.999999999.5"]
    for name, number in (("dead", 999999999), ("reused", os.getpid())):
        (box / f"empg-jax-{name}").mkdir(parents=True)
        lines.append(f"empg-jax-{name} {here}.{number}.5")
    (docker.parent / "ps").write_text("\n".join(lines) + "\n")
    assert remove_orphans(str(docker)) == ["empg-jax-dead", "empg-jax-reused"]
    assert any(f"label={LABEL}" in call for call in calls(docker))
    elsewhere = docker.parent / "images" / f"{FROZEN}:0123456789abcdef.999999999.5-x"
    for path in (
        elsewhere,
        *(elsewhere.with_name(f"{FROZEN}:{here}.{n}.5-x") for n in (999999999, os.getpid())),
    ):
        path.mkdir()
    task = parse_row(ROW)
    sandbox = ImageBackend("docker", Limits(), docker=str(docker)).open(task)
    frozen = sandbox.frozen()  # type: ignore[attr-defined]  # removes the others' first
    assert len(list((docker.parent / "images").iterdir())) == 2 and remove_frozen(str(docker)) == []
    frozen.close()
    sandbox.close()
    assert list((docker.parent / "images").iterdir()) == [elsewhere]


def test_another_namespace_of_numbers_is_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = owner()
    monkeypatch.setattr("empg_envs.swe.owners.numbering", lambda: "1")
    assert owner() != mine and owner().partition(".")[2] == mine.partition(".")[2]


@pytest.mark.parametrize(("what", "error"), [("engine", SandboxError), ("container", LostSandboxError)])
def test_tests_whose_engine_or_container_is_gone_are_not_graded(
    docker: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: type[Exception]
) -> None:
    real = DockerSandbox.exec

    def lose(self: DockerSandbox, *args: Any, **options: Any) -> Any:
        if self._writable is not None:  # the container of the tests
            if what == "engine":
                (docker.parent / "dead").touch()
            else:
                (docker.parent / "box" / self._running()).rename(docker.parent / "gone")
        return real(self, *args, **options)

    monkeypatch.setattr(DockerSandbox, "exec", lose)
    with pytest.raises(error, match=r"does not answer|is gone") as caught:
        ImageBackend("docker", Limits(), docker=str(docker)).grade(parse_row(ROW), GOLD, 20)
    assert type(caught.value) is error


def test_work_in_a_container_that_is_gone_is_lost(docker: Path) -> None:
    backend, task = ImageBackend("docker", Limits(), docker=str(docker)), parse_row(ROW)
    sandbox = backend.open(task)
    (docker.parent / "box" / sandbox._running()).rename(docker.parent / "gone")  # type: ignore[attr-defined]
    for act in (
        lambda: backend.collect(task, sandbox),
        lambda: sandbox.read("lib.txt"),
        lambda: sandbox.write("lib.txt", b""),
        sandbox.snapshot,
    ):
        with pytest.raises(LostSandboxError, match="is gone"):
            act()
    sandbox.close()


def test_a_path_that_is_none_is_an_error_that_the_policy_reads(docker: Path) -> None:
    sandbox = ImageBackend("docker", Limits(), docker=str(docker)).open(parse_row(ROW))
    for path in ("a\0b", "x" * 200_000, "d/" * 3_000):
        for act in (lambda: sandbox.read(path), lambda: sandbox.write(path, b"")):  # noqa: B023
            with pytest.raises(FileError, match="is no path"):
                act()
    sandbox.close()


def test_no_text_of_a_policy_is_a_failure_of_the_machine(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(json.dumps({**ROW, "split": "test"}))
    env = SweEnv(str(tmp_path / "tasks.jsonl"), backend="docker", docker=str(docker))
    env.reset(split="test", index=0)
    for path in ("a\0b", "x" * 200_000, "a\ud800"):
        for command in ("view", "create"):
            call = render_call("file_editor", command=command, path=path, file_text="\ud800\0")
            assert "[file_editor]" in env.step(call)[0]
    assert "[execute_bash]" in env.step(render_call("execute_bash", cmd="echo \udfff\0"))[0]
    env.close()


@pytest.mark.parametrize("how", ["half", "history"])
def test_a_start_that_fails_leaves_nothing(docker: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "half":
        (docker.parent / "half").touch()
    else:
        monkeypatch.setattr("empg_envs.swe.imaged.prune", lambda sandbox: 1 / 0)
    with pytest.raises((SandboxError, ZeroDivisionError)):
        ImageBackend("docker", Limits(), docker=str(docker)).open(parse_row(ROW))
    assert list((docker.parent / "box").iterdir()) == []
