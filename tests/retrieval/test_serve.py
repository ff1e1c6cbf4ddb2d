"""``empg-jax retrieve`` as a process: it says where it listens, answers, and ends on a signal."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from importlib import util
from pathlib import Path

import pytest

import empg_jax
from empg_jax.retrieval.serve import choose_retriever

ROOT = Path(empg_jax.__file__).resolve().parents[1]
CORPUS = '{"id": "0", "contents": "\\"Oslo\\"\\nA town."}\n'


def test_the_command_serves_until_it_is_told_to_stop(tmp_path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(CORPUS)
    command = [sys.executable, "-m", "empg_jax", "retrieve", "--corpus", str(corpus), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--retriever", "builtin"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        line = server.stderr.readline()
        found = re.search(
            r"^1 passages, builtin, ready after .* s: (http://127\.0\.0\.1:\d+/retrieve)$", line
        )
        assert found, line
        body = json.dumps({"queries": ["oslo"], "topk": 1, "return_scores": False}).encode()
        with urllib.request.urlopen(urllib.request.Request(found[1], data=body), timeout=20) as response:
            assert json.load(response)["result"][0][0]["contents"] == '"Oslo"\nA town.'
    finally:
        server.send_signal(signal.SIGTERM)
        _, rest = server.communicate(timeout=20)
    assert server.returncode == 128 + signal.SIGTERM
    assert rest == ""


def test_a_wrong_corpus_is_one_line_and_exit_code_2(tmp_path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(CORPUS + "oops\n")
    run = subprocess.run(
        [sys.executable, "-m", "empg_jax", "retrieve", "--corpus", str(corpus)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert re.fullmatch(r"error: .*corpus\.jsonl line 2: not JSON: .*\n", run.stderr)


def test_a_lexical_server_loads_no_jax() -> None:
    script = (
        "import sys; from empg_jax.retrieval.serve import make_engine\n"
        "from empg_envs.deepsearch.passages import Passage\n"
        "make_engine('builtin', [Passage('0', 'Oslo', 'A town.')]); print('jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


@pytest.mark.parametrize("is_installed", [True, False])
def test_without_a_name_the_best_that_is_installed_is_taken_and_said(monkeypatch, is_installed) -> None:
    found = util.find_spec
    monkeypatch.setattr(
        util, "find_spec", lambda name: (name if is_installed else None) if name == "bm25s" else found(name)
    )
    said: list[str] = []
    name = "bm25s" if is_installed else "builtin"
    assert choose_retriever("auto", False, said.append) == name
    assert len(said) == 1 and said[0].startswith(f"retriever {name}: ")
    assert is_installed or "pip install -e '.[deepsearch]'" in said[0]
    assert choose_retriever("auto", True, said.append) == "dense"
    assert choose_retriever("tantivy", False, said.append) == "tantivy" and len(said) == 2


def test_the_command_on_a_bare_installation_keeps_the_files_titles(tmp_path) -> None:
    rows = [{"id": "0", "contents": "Title 42\nA town."}, {"id": "1", "contents": '"Title 43"\nA city.'}]
    rows.append({"id": "2", "title": "Title 44", "text": "A lake."})
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = (
        "import sys; sys.modules['bm25s'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'bm25s' else find(name, *rest)\n"
        "from empg_jax.cli import main; main()"
    )
    command = [sys.executable, "-c", bare, "retrieve", "--corpus", str(corpus), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        assert server.stderr.readline().startswith(
            "retriever builtin: bm25s, which is faster, is not installed"
        )
        url = server.stderr.readline().rpartition(" ")[2].strip()
        body = json.dumps({"queries": ["town", "city", "lake"], "topk": 1}).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=20) as response:
            found = [hits[0]["contents"] for hits in json.load(response)["result"]]
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)
    assert found == ["Title 42\nA town.", '"Title 43"\nA city.', "Title 44\nA lake."]
