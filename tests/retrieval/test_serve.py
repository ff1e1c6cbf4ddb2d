"""``empg-jax retrieve`` as a process: it says where it listens, answers, and ends on a signal."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import empg_jax

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
