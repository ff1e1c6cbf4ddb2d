"""Tasks inside images: a stand-in for the docker program that records its calls and runs them in a cage."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from empg_envs.swe import patches
from empg_envs.swe.containers import OWNER, SweRexSandbox, remove_orphans
from empg_envs.swe.env import SweEnv
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.judge.trial import LAYERS
from empg_envs.swe.sandbox import FileError, Limits, SandboxError
from empg_envs.swe.tasks import parse_row
from empg_envs.swe.tree import File, Tree
from tests.cages import need_cages

PYTHON = os.path.realpath(sys.executable)
# `run` copies the image's folder; `exec` runs in a cage of its own over that copy.
FAKE = """#!{python} -I
import json, os, shutil, subprocess, sys
home, argv = {home!r}, sys.argv[1:]
with open(home + "/calls.jsonl", "a") as log:
    log.write(json.dumps(argv) + "\\n")
if argv[0] == "run":
    if "broken" in argv:
        sys.exit("Unable to find image")
    name = argv[argv.index("--name") + 1]
    shutil.copytree(home + "/image", f"{{home}}/box/{{name}}/testbed")
    os.makedirs(f"{{home}}/box/{{name}}/tmp")
elif argv[0] == "rm":
    shutil.rmtree(f"{{home}}/box/{{argv[-1]}}")
elif argv[0] == "ps":
    print(open(home + "/ps").read(), end="")
elif argv[0] == "exec":
    if "HANG" in argv[-1]:
        import time
        time.sleep(30)
    place = next(i for i, word in enumerate(argv) if word.startswith("empg-jax-"))
    box = f"{{home}}/box/{{argv[place]}}"
    cage = ["bwrap", "--unshare-all", "--die-with-parent", "--ro-bind", "/usr", "/usr", "--proc", "/proc"]
    cage += ["--ro-bind", {prefix!r}, {prefix!r}]
    cage += ["--dev", "/dev", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
    cage += ["--symlink", "usr/lib64", "/lib64", "--bind", box + "/testbed", "/testbed"]
    cage += ["--bind", box + "/tmp", "/tmp", "--chdir", "/testbed", "--setenv", "HOME", "/tmp"]
    sys.exit(subprocess.run([*cage, *argv[place + 1 :]]).returncode)
"""
OF_R2E = """\
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
def docker(tmp_path: Path) -> Path:
    need_cages()
    if shutil.which("git") is None:
        pytest.fail("the stand-in's image needs git")
    image = tmp_path / "image"
    image.mkdir()
    for name, text in FILES.items():
        (image / name).write_text(text)
    for command in ("init -q", "add -A", "-c user.name=a -c user.email=a@b commit -qm base"):
        subprocess.run(["git", *command.split()], cwd=image, check=True)
    (tmp_path / "ps").write_text("")
    program = tmp_path / "docker"
    program.write_text(FAKE.format(python=sys.executable, home=str(tmp_path), prefix=sys.base_prefix))
    program.chmod(0o755)
    return program


def calls(docker: Path) -> list[list[str]]:
    return [json.loads(line) for line in (docker.parent / "calls.jsonl").read_text().splitlines()]


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
    # Two containers, the agent's and the judge's, and both are gone.
    assert sum(call[0] == "run" for call in calls(docker)) == 2 and list((tmp_path / "box").iterdir()) == []
    assert ["bash", "-c", "kill -9 -1"] in [call[-3:] for call in calls(docker)]


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
        (with_files(lib__txt="right\n", conftest__py="import lib\n"), LAYERS, "resolved"),
        (with_files(conftest__py="import lib\nlib.word = lambda: 'right\\n'\n"), LAYERS, "unresolved"),
        (with_files(conftest__py="import os\nos._exit(0)\n"), LAYERS, "suspect"),
        (with_files(lib__py=FORGED), LAYERS, "suspect"),
        (with_files(lib__py=FORGED), {"sessions"}, "suspect"),
        (with_files(lib__py=FORGED), set(), "resolved"),
        (with_files(lib__py=EQUALS_ALL), set(), "resolved"),
        (with_files(lib__py=EQUALS_ALL), {"canaries"}, "suspect"),
        (with_files(lib__py=LEAVES), LAYERS, "suspect"),
        (with_files(json__py="x = 1\n", lib__txt="right\n"), LAYERS, "suspect"),
        (with_files(checks__py="def test_a(): pass\ndef test_b(): pass\n"), LAYERS, "unresolved"),
    ],
)
def test_patches_that_tamper(docker: Path, patch: str, layers: set[str], reason: str) -> None:
    backend = ImageBackend("docker", Limits(), docker=str(docker), layers=frozenset(layers))
    backend._draw = random.Random(1)  # type: ignore[assignment]
    grade = backend.grade(parse_row(ROW), patch, 20)
    assert grade.reason == reason, (grade.doubts, grade.output)


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


def test_failures_of_the_machine_are_errors(docker: Path, tmp_path: Path) -> None:
    task = parse_row({**ROW, "image": "broken"})
    with pytest.raises(SandboxError, match="cannot start a container of broken: Unable to find image"):
        ImageBackend("docker", Limits(), docker=str(docker)).open(task)
    with pytest.raises(SandboxError, match="install Docker"):
        ImageBackend("docker", Limits(), docker=str(tmp_path / "none")).open(task)


def test_containers_of_dead_workers_are_removed(docker: Path) -> None:
    box = docker.parent / "box"
    for name in ("empg-jax-dead", "empg-jax-reused"):
        (box / name).mkdir(parents=True)
    lines = ["empg-jax-dead 999999999:5", f"empg-jax-reused {os.getpid()}:5", "empg-jax-odd x"]
    (docker.parent / "ps").write_text("\n".join(lines) + "\n")
    assert remove_orphans(str(docker)) == ["empg-jax-dead", "empg-jax-reused"]
    assert any(f"label={OWNER}" in call for call in calls(docker))


@dataclasses.dataclass
class Command:
    command: list[str]
    timeout: float
    cwd: str


class CommandTimeoutError(RuntimeError):
    pass


class FakeDeployment:
    """Runs swe-rex's commands here, with a folder in place of /testbed."""

    def __init__(self, root: Path) -> None:
        self.root, self.runtime, self.log = root, self, []

    async def start(self) -> None:
        self.log.append("start")

    async def stop(self) -> None:
        self.log.append("stop")

    async def execute(self, request: Command) -> Any:
        command = [word.replace("/testbed", str(self.root)) for word in request.command]
        try:
            found = subprocess.run(
                command, cwd=self.root, capture_output=True, text=True, timeout=request.timeout
            )
        except subprocess.TimeoutExpired as error:
            raise CommandTimeoutError from error
        return types.SimpleNamespace(stdout=found.stdout, exit_code=found.returncode)


def test_swe_rex_is_adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "swerex": types.ModuleType("swerex"),
        "swerex.exceptions": types.ModuleType("swerex.exceptions"),
        "swerex.runtime": types.ModuleType("swerex.runtime"),
        "swerex.runtime.abstract": types.ModuleType("swerex.runtime.abstract"),
    }
    modules["swerex.exceptions"].CommandTimeoutError = CommandTimeoutError  # type: ignore[attr-defined]
    modules["swerex.runtime.abstract"].Command = Command  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    root = (tmp_path / "testbed").resolve()
    root.mkdir()
    deployment = FakeDeployment(root)
    sandbox = SweRexSandbox(deployment)
    sandbox.reset({})
    sandbox.write("d/a.bin", b"\x00\xff\n" * 5)
    assert sandbox.read("d/a.bin") == b"\x00\xff\n" * 5
    assert sandbox.snapshot()["d/a.bin"].data == b"\x00\xff\n" * 5
    result = sandbox.exec("cat; echo $X; exit 3", 20, env={"X": "it's"}, stdin=b"in\n")
    assert (result.output, result.returncode) == ("in\nit's\n", 3)
    assert sandbox.exec("sleep 20", 0.2).reason == "timeout"
    with pytest.raises(FileError, match="outside"):
        sandbox.read("/etc/passwd")
    with pytest.raises(FileError, match="no such file"):
        sandbox.read("none")
    sandbox.close()
    assert deployment.log == ["start", "stop"]
    with pytest.raises(SandboxError, match="not started"):
        sandbox.exec("true", 5)


def test_swe_rex_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"pip install -e '\.\[swerex\]'"):
        ImageBackend("swerex", Limits(), deployment="no_such_swerex.module:Deployment")
