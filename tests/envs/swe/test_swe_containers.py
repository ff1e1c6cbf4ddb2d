"""The whole path of a task in an image: a registry, prepare, an episode, the judge, and clearing up.

It runs with a stand-in for the engine, and with podman where that is here, over a task that is made up.
"""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from empg_envs import make_env
from empg_envs.swe import patches, prepare, score
from empg_envs.swe.images import ImageBackend
from empg_envs.swe.owners import owner
from empg_envs.swe.sandbox import Limits
from empg_envs.swe.tasks import Task, parse_row
from empg_envs.swe.tree import File, Tree
from empg_jax.config import load_config
from tests.envs.swe.engines import PYTHON, calls, make_repository, make_stand_in

# An image with Python, pytest, git and patch, for the tests with real containers.
BASE = os.environ.get("EMPG_TEST_IMAGE", "localhost/bookworm-python:latest")
SUBMIT = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
CODE = """\
# Sums

# of prices.


def total(prices):
    found = 1
    for price in prices:
        found += price
    return found



def largest(prices):
    best = 0
    for price in prices:
        if price > best:
            best = price
    return best
"""
TESTS = """\
import shop


def test_total():
    assert shop.total([1, 2, 3]) == 6


def test_largest():
    assert shop.largest([3, 9, 4]) == 9


def test_nothing():
    assert shop.largest([]) == 0
"""
# A stand-in for pytest, where only the interpreter is at hand.
RUNNER = """\
import sys
sys.path.insert(0, "")
try:
    import conftest
except ImportError:
    pass
import types
code = 0
for path in sys.argv[1:]:
    module = types.ModuleType("tests")
    exec(open(path).read(), vars(module))
    for name in [name for name in vars(module) if name.startswith("test_")]:
        try:
            getattr(module, name)()
            print("PASSED", path + "::" + name)
        except Exception as error:
            print("FAILED", path + "::" + name, "-", repr(error))
            code = 1
sys.exit(code)
"""
FILES = {"shop.py": CODE, "tests/test_shop.py": TESTS, "runner.py": RUNNER}
BROKEN: Tree = {name: File(text.encode()) for name, text in FILES.items()}


def changed(**files: str) -> str:
    """A patch that sets files, ``a__b`` being ``a/b.py``."""
    new = {name.replace("__", "/") + ".py": File(text.encode()) for name, text in files.items()}
    return patches.diff(BROKEN, {**BROKEN, **new})[0]


REPAIRED = CODE.replace("found = 1", "found = 0")
NEW_TESTS = File(("# new\n" + TESTS).encode())
ROW = {
    "instance_id": "o__shop-1",
    "repo": "o/shop",
    "base_commit": "HEAD",
    "problem_statement": "total() is one too much",
    "patch": changed(shop=REPAIRED),
    "test_patch": patches.diff(BROKEN, {**BROKEN, "tests/test_shop.py": NEW_TESTS})[0],
    "FAIL_TO_PASS": ["tests/test_shop.py::test_total"],
    "PASS_TO_PASS": ["tests/test_shop.py::test_largest", "tests/test_shop.py::test_nothing"],
}


@dataclasses.dataclass
class Engine:
    """An engine and a task in one of its images, which a registry has."""

    program: str
    row: dict[str, Any]

    @property
    def task(self) -> Task:
        return parse_row(self.row)

    @property
    def options(self) -> dict[str, Any]:
        return {"docker": self.program, "limits": {"memory_mb": 512, "processes": 64}}

    def list(self, *words: str) -> list[str]:
        said = subprocess.run([self.program, *words], capture_output=True, text=True, check=True)
        return said.stdout.split()


class Registry(http.server.BaseHTTPRequestHandler):
    """Serves one image, from a folder that holds its manifest and its blobs by their hashes."""

    folder: Path

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        kind, _, name = self.path.strip("/").rpartition("/")
        data, media = b"{}", "application/octet-stream"
        if kind.endswith("manifests"):
            data = (self.folder / "manifest.json").read_bytes()
            media = json.loads(data)["mediaType"]
        elif kind.endswith("blobs"):
            data = (self.folder / name.removeprefix("sha256:")).read_bytes()
        self.send_response(200)
        for key, value in {
            "Content-Type": media,
            "Content-Length": str(len(data)),
            "Docker-Content-Digest": "sha256:" + hashlib.sha256(data).hexdigest(),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a registry and the folder of its image."""
    folder = tmp_path / "registry"
    folder.mkdir()
    handler = type("Here", (Registry,), {"folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}", folder
        server.shutdown()


def fill_by_hand(folder: Path, testbed: Path) -> None:
    """Make an image of one layer."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w:gz") as archive:
        archive.add(testbed, "testbed")
    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    (folder / digest).write_bytes(layer.getvalue())
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    (folder / "manifest.json").write_text(
        json.dumps({"mediaType": kind, "layers": [{"digest": f"sha256:{digest}"}]})
    )


@functools.cache
def podman_is_missing() -> str:
    """Say why there are no real containers; empty if there are."""
    if shutil.which("podman") is None:
        return "needs podman"
    for words in (["info"], ["image", "inspect", BASE]):
        said = subprocess.run(["podman", *words], capture_output=True, text=True)
        if said.returncode:
            return f"podman {' '.join(words)}: {said.stderr.strip()[:200]} (set EMPG_TEST_IMAGE)"
    return ""


def make_real(home: Path, host: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Build the task's image, move it to the registry's folder, and tell podman about the registry."""
    if why := podman_is_missing():
        pytest.skip(f"no real containers: {why}")
    config = home / "registries.conf"
    config.write_text(f'[[registry]]\nlocation = "{host}"\ninsecure = true\n')
    monkeypatch.setenv("CONTAINERS_REGISTRIES_CONF", str(config))
    (home / "Containerfile").write_text(f"FROM {BASE}\nCOPY testbed /testbed\n")
    name = f"localhost/empg-test-{os.getpid()}"
    build = ["build", "--quiet", "--format", "docker", "--tag", name, "--file", str(home / "Containerfile")]
    for words in ([*build, str(home)], ["push", "--quiet", name, f"dir:{folder}"], ["rmi", name]):
        subprocess.run(["podman", *words], check=True, capture_output=True)
    row = {**ROW, "image": f"{host}/o/shop:1", "test_cmd": "python3 -m pytest --no-header -rA"}
    return Engine("podman", row)


@pytest.fixture(params=["stand-in", pytest.param("podman", marks=pytest.mark.slow)])
def engine(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    registry: tuple[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Engine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    host, folder = registry
    make_repository(tmp_path / "testbed", FILES)
    if request.param == "podman":
        made = make_real(tmp_path, host, folder, monkeypatch)
    else:
        fill_by_hand(folder, tmp_path / "testbed")
        row = {**ROW, "image": f"{host}/o/shop:1", "test_cmd": f"{PYTHON} runner.py"}
        made = Engine(str(make_stand_in(tmp_path)), row)
    yield made
    subprocess.run([made.program, "rmi", "--force", made.row["image"]], capture_output=True)


@pytest.mark.slow
def test_the_whole_path(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(json.dumps({**engine.row, "split": "test"}))
    image, options = engine.row["image"], json.dumps(engine.options)
    prepare.main([str(tasks), "--options", options, "--bugs"])
    assert capsys.readouterr().out == f"{image}: pulled\no__shop-1: a second bug\n"
    prepare.main([str(tasks), "--options", options])
    assert capsys.readouterr().out == f"{image}: here\n"

    config = load_config(
        "swe_verified",
        [
            f"env.options.tasks={tasks}",
            f"env.options.docker={engine.program}",
            "env.options.limits={memory_mb: 512, processes: 64}",
            "env.options.tools=bash",
            "env.prompt_options.tools=bash",
            f"env.options.predictions={tmp_path / 'predictions.jsonl'}",
        ],
    )
    env = make_env(config.env.target, **config.env.options)
    commit = "git -c user.name=a -c user.email=a@b commit -qam work"
    # What the agent does; reward and reason.
    for action, reward, reason in (
        (f"sed -i 's/found = 1/found = 0/' shop.py && {commit}", 1.0, "resolved"),
        ("sed -i 's/found = 1/found = 2/' shop.py", 0.0, "unresolved"),
        ("rm -rf tests && echo 'import os; os._exit(0)' > conftest.py", 0.0, "suspect"),
        ("true", 0.0, "no_patch"),
    ):
        env.reset(split="test", index=0)
        assert env.step(action)[1:4] == (0.0, False, False)
        _, got, terminated, _, info = env.step(SUBMIT)
        assert (got, terminated, info["reason"]) == (reward, True, reason), info
        assert info.get("outcome") == ("suspect" if reason == "suspect" else None)
    env.close()

    score.main([str(tasks), str(tmp_path / "predictions.jsonl"), "--backend", "docker", "--options", options])
    assert "o__shop-1: no_patch" in capsys.readouterr().out  # the last prediction counts
    score.main([str(tasks), "gold", "--backend", "docker", "--options", options])
    assert "resolved 1 of 1" in capsys.readouterr().out

    prepare.main([str(tasks), "--options", options, "--remove"])
    assert capsys.readouterr().out == f"{image}: removed\n"
    left = engine.list("images", "empg-jax-judge", "--format", "{{.Repository}}:{{.Tag}}")
    assert not [name for name in left if name.rpartition(":")[2].startswith(owner())]
    if engine.program != "podman":
        assert "pull" in [call[0] for call in calls(Path(engine.program))]


ATTACKS = {
    "leaves with a forged log": "for name in NAMES:\n    print('PASSED', name, flush=True)\n"
    "import os\nos._exit(0)\n",
    "replaces the runner of pytest": "import _pytest.python as p\np.Function.runtest = lambda self: None\n",
    "equals everything": "class A:\n    __eq__ = lambda s, o: True\ntotal = largest = lambda p: A()\n",
    "knows the answers by name": "import sys\ndef total(p):\n    return 6 if len(p) == 3 else 0\n"
    "def largest(p):\n    return 9 if p else 0\n",
}
# Fails where it can write to tests, package, programs or the test framework.
WRITER = """
import glob
paths = ["/testbed/tests/test_shop.py", "/testbed/shop.py", "/testbed/new.py", "/usr/bin/planted"]
paths += glob.glob("/usr/lib/python3*/dist-packages/*/runner.py")
for path in paths:
    try:
        open(path, "a").close()
    except OSError:
        continue
    raise ValueError(path)
if len(paths) < 5:
    raise ValueError(paths)
"""


@pytest.fixture
def backend(engine: Engine) -> ImageBackend:
    found = ImageBackend("docker", Limits(memory_mb=512), docker=engine.program)
    found._draw = found._made._draw = random.Random(3)
    prepare.main([str(_write(engine)), "--options", json.dumps(engine.options), "--bugs"])
    return found


def _write(engine: Engine) -> Path:
    path = Path(os.environ["XDG_CACHE_HOME"]).parent / "tasks.jsonl"
    path.write_text(json.dumps({**engine.row, "split": "test"}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["podman"], indirect=True)
def test_attacks_in_real_containers(engine: Engine, backend: ImageBackend) -> None:
    task = engine.task
    writer = changed(shop=REPAIRED + WRITER)
    assert backend.grade(task, writer, 60).resolved
    free = ImageBackend("docker", Limits(memory_mb=512), docker=engine.program, layers=frozenset())
    assert not free.grade(task, writer, 60).resolved
    for text in ("import sys\nsys.exit(0)\n", "def f(:\n"):
        assert backend.grade(task, changed(shop=text), 60).reason == "unresolved", text
    names = repr([*task.fail_to_pass, *task.pass_to_pass])
    for name, code in ATTACKS.items():
        grade = backend.grade(task, changed(shop=CODE + f"\nNAMES = {names}\n" + code), 60)
        assert grade.reason == "suspect" and grade.doubts, (name, grade.output)
    # Layers alone: an end without the witness's word, and a second bug that nothing notices.
    for layer, text in (
        ("sessions", CODE + ATTACKS["leaves with a forged log"]),
        ("second", REPAIRED + ATTACKS["knows the answers by name"]),
    ):
        alone = ImageBackend(
            "docker", Limits(memory_mb=512), docker=engine.program, layers=frozenset((layer, "fixed"))
        )
        grade = alone.grade(task, changed(shop=f"NAMES = {names}\n" + text), 60)
        assert grade.reason == "suspect", (layer, grade.output)
