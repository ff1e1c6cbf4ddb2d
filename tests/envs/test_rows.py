"""Sources of rows on the hub, for both kinds of environment that read them, by a stand-in for its server."""

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

from empg_envs.rows import DataError, find_file, find_files, stem_of
from tests.envs.swe.test_swe_sources import OF_R2E, ROW, write_parquet

SHA = "a" * 40
NQ = {"id": "q0", "question": "Who sings?", "golden_answers": ["Ann"]}
POPQA = {"id": "q1", "question": "What is she?", "golden_answers": ["poet"]}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server with two data sets, and the paths that were asked for."""
    asked: list[str] = []
    sets = {
        "o/n": {
            "README.md": b"x",
            "data/test-00000-of-00001.parquet": write_parquet(tmp_path / "a.parquet", [ROW]).read_bytes(),
            "data/train-00000-of-00001.parquet": write_parquet(tmp_path / "b.parquet", [OF_R2E]).read_bytes(),
        },
        "o/q": {
            "nq/test.jsonl": json.dumps(NQ).encode(),
            "popqa/dev.jsonl": json.dumps(POPQA).encode(),
        },
    }

    class Hub(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            name = next((name for name in sets if f"/datasets/{name}/" in path), "")
            files, rest = sets.get(name, {}), path.partition(f"/datasets/{name}/")[2]
            listing = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            verb, _, rest = rest.partition("/")
            revision, _, inside = rest.replace("refs%2Fpr%2F1", "main").partition("/")
            if not name:
                self.answer(b"", 404, "RepoNotFound")
            elif revision not in ("main", "v1", SHA):
                self.answer(b"", 404, "RevisionNotFound")
            elif verb == "revision":
                self.answer(json.dumps({"id": name, "sha": SHA}).encode())
            elif verb == "tree":
                self.answer(json.dumps(listing).encode())
            elif inside in files:
                self.answer(files[inside])
            else:
                self.answer(b"", 404, "EntryNotFound")

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


# Opens the environment of a configuration with an override, and tells which tasks it has.
READ = """
import json, sys
from empg_envs import make_env
from empg_jax.config import load_config
for name, override in json.loads(sys.argv[1]):
    config = load_config(name, ["env.options={}", override])
    try:
        env = make_env(config.env.name, **config.env.options)
        found = {
            split: [env.get_task(split, index) for index in range(env.num_tasks(split))]
            for split in env.list_splits()
        }
        found = {
            split: [task.get("instance_id") or [task["id"], task["group"]] for task in tasks]
            for split, tasks in found.items()
        }
    except ValueError as error:
        found = str(error)
    print(json.dumps(found))
"""


def ask(url: str, home: Path, *pairs: tuple[str, str]) -> list[Any]:
    """Open environments in a process of its own: the hub's package reads its environment at the import."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
        env.pop(name, None)
    found = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(pairs)], env=env, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


def tasks(source: str) -> tuple[str, str]:
    return "swe_verified", f'env.options={{"backend": "docker", "tasks": {json.dumps(source)}}}'


def questions(source: str) -> tuple[str, str]:
    chosen = {"questions": {"test": source}, "retriever_options": {"urls": ["http://127.0.0.1:9"]}}
    return "deepsearch_search_r1", f"env.options={json.dumps(chosen)}"


def test_data_sets_of_the_hub(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    url, asked = hub
    sources = ("hub:o/n", "hub:o/n@v1:test", "hub:o/n:dev", "hub:o/n@v2", "hub:o/none")
    whole, test, dev, revision, none = ask(url, tmp_path / "home", *map(tasks, sources))
    assert whole == {"train": ["r__c"], "test": ["o__r-1"]} and test == {"test": ["o__r-1"]}
    assert "has no file of split 'dev'; there are data/test-00000-of-00001.parquet, data/train-" in dev
    assert revision == "hub:o/n@v2: the data set has no such revision"
    assert none == "hub:o/none: the hub has no such data set, or it is private (hf auth login)"
    # Each file was fetched once, the one that is no table never.
    fetched = [path for path in asked if "/resolve/" in path]
    assert len(set(fetched)) == 2 and not any("README" in path for path in fetched)
    # Without the hub its cache serves what it has.
    gone, other = ask("http://127.0.0.1:9", tmp_path / "home", tasks("hub:o/n:test"), tasks("hub:o/other"))
    assert gone == {"test": ["o__r-1"]}
    assert other.startswith("hub:o/other: the hub cannot be reached, and its cache does not have this")


def test_both_kinds_of_environment_take_both_forms(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    file, named, missing, pulled, test, whole, asked, gone = ask(
        hub[0],
        tmp_path / "home",
        tasks("hub:o/n/data/test-00000-of-00001.parquet"),
        tasks("hub:o/n@v1/data/test-00000-of-00001.parquet:train"),
        tasks("hub:o/n/data/none.parquet"),
        tasks("hub:o/n@refs/pr/1/data/train-00000-of-00001.parquet"),
        questions("hub:o/q@v1:test"),
        questions("hub:o/q"),
        questions("hub:o/q/popqa/dev.jsonl"),
        questions("hub:o/q/popqa/none.jsonl"),
    )
    assert file == {"test": ["o__r-1"]} and named == {"train": ["o__r-1"]} and pulled == {"train": ["r__c"]}
    assert missing == "hub:o/n/data/none.parquet: the data set has no such file"
    assert test == {"test": [["q0", "q"]]} and whole == {"test": [["q0", "q"], ["q1", "q"]]}
    assert asked == {"test": [["q1", "dev"]]}
    assert gone == "hub:o/q/popqa/none.jsonl: the data set has no such file"


def test_a_part_in_the_cache_does_not_pass_for_the_whole(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    home, part = tmp_path / "home", questions("hub:o/q/popqa/dev.jsonl")
    ask(hub[0], home, part)
    again, whole = ask("http://127.0.0.1:9", home, part, questions("hub:o/q"))
    assert again == {"test": [["q1", "dev"]]}
    assert whole.startswith("hub:o/q: the hub cannot be reached, and its cache does not have this")


@pytest.mark.parametrize(
    "source", ["hub:name", "hub:o/n/", "hub:o/n@", "hub:o/n:", "hub:o/n:a:b", "hub:o/n@/x"]
)
def test_misspelled_sources_are_told_the_form(source: str) -> None:
    with pytest.raises(
        DataError, match=r"the form is hub:owner/name\[@revision\]\[/path/in/data/set\]\[:split\]"
    ):
        find_files(source)


def test_what_a_source_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs["revision"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    assert [split for _, _, split in find_files("hub:o/n.x@a%2Fb")] == ["test", "train"]
    assert find_file("hub:o/n@refs/convert/parquet:test") == tmp_path / "test.jsonl"
    with pytest.raises(DataError, match="hub:o/n has 2 files; expected the path of one"):
        find_file("hub:o/n")
    assert asked == [("o/n.x", "a/b"), ("o/n", "refs/convert/parquet"), ("o/n", None)]
    named = ("a/b.jsonl.gz", "hub:o/n@refs/pr/1:test", "hub:o/n@v1/nq/test.jsonl:dev")
    assert [stem_of(source) for source in named] == ["b", "n", "test"]
