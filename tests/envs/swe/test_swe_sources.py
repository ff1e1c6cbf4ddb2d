"""Tasks in parquet files and in data sets of the hub, by a stand-in for its server."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from empg_envs import make_env
from empg_envs.swe.rows import TaskError, read_source
from empg_envs.swe.tasks import load_panels

pa = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra 'parquet'")

ROW = {
    "instance_id": "o__r-1",
    "repo": "o/r",
    "base_commit": "d16bfe05",
    "problem_statement": "p",
    "patch": "",
    "test_patch": "",
    "FAIL_TO_PASS": '["a::b"]',
    "PASS_TO_PASS": "[]",
    "hints_text": "not needed",
    "version": None,
}
OF_R2E = {
    "repo_name": "r",
    "docker_image": "r2e/r",
    "commit_hash": "c",
    "problem_statement": "p",
    "expected_output_json": '{"A.test_a": "PASSED"}',
    "parsed_commit_content": "large",
}
SHA = "a" * 40


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    rows = [{**ROW, "instance_id": f"o__r-{number}"} for number in range(150)]
    swe = write_parquet(tmp_path / "swe.parquet", rows)
    r2e = write_parquet(tmp_path / "r2e.parquet", [OF_R2E])
    panels = load_panels({"train": str(r2e), "test": str(swe)})
    assert [task.instance_id for task in panels["test"]] == [row["instance_id"] for row in rows]
    assert panels["test"][0].fail_to_pass == ("a::b",) and "hints_text" not in panels["test"][0].row
    task = panels["train"][0]
    assert task.image == "r2e/r" and task.expected and "parsed_commit_content" not in task.row
    env = make_env("swe", tasks={"test": str(swe)}, backend="docker")
    assert env.num_tasks("test") == 150


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "t.parquet", [{"instance_id": "a", "text": "b"}])
    with pytest.raises(TaskError, match=r"t\.parquet: no column 'repo'; its columns are instance_id, text"):
        load_panels(str(file))
    file = write_parquet(tmp_path / "t.parquet", [{**ROW, "repo": None}, ROW])
    with pytest.raises(TaskError, match="'o__r-1' has no value in field 'repo'"):
        load_panels(str(file))
    file.write_bytes(b"text")
    with pytest.raises(TaskError, match=r"t\.parquet: no parquet file \("):
        load_panels(str(file))
    with pytest.raises(TaskError, match=r"none\.parquet': there is no such file"):
        load_panels(str(tmp_path / "none.parquet"))
    with pytest.raises(TaskError, match="the form is hub:owner/name"):
        load_panels("hub:name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(TaskError, match=r"need the package pyarrow .* pip install -e '\.\[parquet\]'"):
        list(read_source(file))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with one data set, and the paths that were asked for."""
    asked: list[str] = []
    files = {
        "README.md": b"x",
        "data/test-00000-of-00001.parquet": write_parquet(tmp_path / "a.parquet", [ROW]).read_bytes(),
        "data/train-00000-of-00001.parquet": write_parquet(tmp_path / "b.parquet", [OF_R2E]).read_bytes(),
    }
    listing = [
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in files.items()
    ]

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            resolved = f"/datasets/o/n/resolve/{SHA}/"
            if path in ("/api/datasets/o/n/revision/main", "/api/datasets/o/n/revision/v1"):
                self.answer(json.dumps({"id": "o/n", "sha": SHA}).encode())
            elif path == f"/api/datasets/o/n/tree/{SHA}":
                self.answer(json.dumps(listing).encode())
            elif path.startswith(resolved):
                self.answer(files[path.removeprefix(resolved)])
            else:
                missing = "RevisionNotFound" if path.startswith("/api/datasets/o/n/") else "RepoNotFound"
                self.answer(b"", 404, missing)

        def answer(self, data: bytes, code: int = 200, error: str = "") -> None:
            self.send_response(code)
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": SHA}
            headers |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
            for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


READ = """
import json, sys
from empg_envs.swe.tasks import load_panels
for source in sys.argv[1:]:
    try:
        found = {split: [task.instance_id for task in panel] for split, panel in load_panels(source).items()}
    except ValueError as error:
        found = str(error)
    print(json.dumps(found))
"""


def ask(url: str, home: Path, *sources: str) -> list[Any]:
    """Load tasks in a process of its own, because the hub's package reads its environment at the import."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        env.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", READ, *sources], env=env, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_data_sets_of_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = hub
    sources = ("hub:o/n", "hub:o/n@v1:test", "hub:o/n:dev", "hub:o/n@v2", "hub:o/none")
    whole, test, dev, revision, none = ask(url, tmp_path / "home", *sources)
    assert whole == {"train": ["r__c"], "test": ["o__r-1"]} and test == {"test": ["o__r-1"]}
    assert "has no file of split 'dev'; there are data/test-00000-of-00001.parquet, data/train-" in dev
    assert revision == "hub:o/n@v2: the data set has no such revision"
    assert none == "hub:o/none: the hub has no such data set, or it is private (hf auth login)"
    # Each file was fetched once, the one that is no table never.
    fetched = [path for path in asked if "/resolve/" in path]
    assert len(set(fetched)) == 2 and not any("README" in path for path in fetched)
    # Without the hub its cache serves what it has.
    gone, other = ask("http://127.0.0.1:9", tmp_path / "home", "hub:o/n:test", "hub:o/other")
    assert gone == {"test": ["o__r-1"]}
    assert other.startswith(
        "hub:o/other: the hub cannot be reached, and its cache does not have the data set"
    )
