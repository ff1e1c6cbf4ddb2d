"""Indexes on disk: what an agent reads is the same, they are built once, and a changed corpus has its own."""

import json
import random

import pytest

from empg_envs import make_env
from empg_envs.deepsearch import sources
from empg_envs.deepsearch.ondisk import ENGINES, PassageFile, open_index, write_passages
from empg_envs.deepsearch.passages import Passage, find_retriever, make_retriever, read_corpus
from empg_jax.errors import UserError
from empg_jax.retrieval import serve

WORDS = [f"word{number}" for number in range(60)]


def write_corpus(path, count=120, seed=0):
    generator = random.Random(seed)
    texts = [" ".join(generator.choices(WORDS, k=12)) for _ in range(count)]
    rows = [{"id": str(n), "contents": f'"Title {n}"\n{text}'} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "q", "question": "word1?", "golden_answers": ["a"]}))
    return {"questions": {"train": str(questions)}, "corpus": write_corpus(tmp_path / "corpus.jsonl")}


@pytest.fixture(params=ENGINES)
def engine(request):
    return pytest.importorskip(request.param) and request.param


def read(env, words):
    env.reset(split="train", index=0)
    return env.step(f"<search>{words}</search>")[0]


def test_an_agent_reads_the_same_and_the_index_is_built_once(files, tmp_path, engine, monkeypatch):
    options = {"retriever_options": {"index_dir": str(tmp_path / "index")}, "retriever": engine, **files}
    on_disk = read(make_env("deepsearch", **options), "word1 word2")
    assert on_disk == read(make_env("deepsearch", retriever=engine, **files), "word1 word2")
    assert 'Doc 3(Title: "Title' in on_disk
    # A worker of its own, which has nothing in memory, only opens it.
    sources._load_retriever.cache_clear()
    monkeypatch.setattr(find_retriever(engine), "build", None)
    monkeypatch.setattr(sources, "load_corpus", None)
    assert read(make_env("deepsearch", **options), "word1 word2") == on_disk


def test_a_changed_corpus_is_seen_in_the_same_process(files, tmp_path, engine):
    options = {"retriever_options": {"index_dir": str(tmp_path / "index")}, "retriever": engine, **files}
    before = [read(make_env("deepsearch", **each), "word1") for each in (options, files)]
    write_corpus(tmp_path / "corpus.jsonl", seed=1)
    after = [read(make_env("deepsearch", **each), "word1") for each in (options, files)]
    assert before[0] != after[0] and before[1] != after[1]
    write_corpus(tmp_path / "elsewhere.jsonl")  # the first content again, in another place
    again = {**options, "corpus": str(tmp_path / "elsewhere.jsonl")}
    assert read(make_env("deepsearch", **again), "word1") == before[0]
    folders = [path for path in (tmp_path / "index").iterdir() if path.is_dir()]
    assert len(folders) == 2 and all(path.name.startswith(engine) for path in folders)


def test_changed_questions_are_seen_in_the_same_process(files, tmp_path):
    assert make_env("deepsearch", **files).reset(split="train", index=0)[1]["task"] == "word1?"
    row = {"id": "q", "question": "word2, rather?", "golden_answers": ["a"]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    assert make_env("deepsearch", **files).reset(split="train", index=0)[1]["task"] == "word2, rather?"


def test_the_command_opens_the_index_without_reading_the_corpus(files, tmp_path, engine, monkeypatch):
    found = []

    def run(said):
        class Server:
            url = "here"

            def serve_forever(self, poll_interval):
                found.append(said)

        class Opened:
            def __init__(self, engine, num_passages, **options):
                self.hits = engine.search(["word1 word2"], 3)[0]
                said.append((num_passages, [(hit.passage, hit.score) for hit in self.hits]))

            def __enter__(self):
                return Server()

            def __exit__(self, *error):
                pass

        monkeypatch.setattr(serve, "open_server", Opened)
        serve.serve_corpus(
            files["corpus"],
            retriever=engine,
            encoder=None,
            say=lambda line: None,
            index_dir=str(tmp_path / "index"),
        )

    run([])
    monkeypatch.setattr(find_retriever(engine), "build", None)
    monkeypatch.setattr(serve, "read_corpus", None)
    run([])
    assert found[0] == found[1] and found[0][0][0] == 120
    (hits,) = make_retriever(engine, read_corpus(files["corpus"])).search(["word1 word2"], 3)
    assert [passage for passage, _ in found[0][0][1]] == [hit.passage for hit in hits]


def test_passages_come_back_from_a_file_as_they_were(tmp_path):
    passages = [
        Passage("1", "Élmham", "a\nb \u2028 c"),
        Passage("x", "", "", is_quoted=False),
        Passage("2", "\ud800", "z"),
    ]
    write_passages(tmp_path, passages)
    read_back = PassageFile(tmp_path)
    assert list(read_back) == passages and len(read_back) == 3 and read_back[-1] == passages[-1]
    assert read_back[1:] == passages[1:] and [each.is_quoted for each in read_back] == [True, False, True]
    with pytest.raises(IndexError):
        read_back[3]


def test_what_cannot_be_kept_is_told(files, tmp_path):
    with pytest.raises(
        ValueError, match=r"'builtin' keeps no index on disk \(index_dir\); bm25s and tantivy do"
    ):
        open_index("builtin", files["corpus"], tmp_path / "index")
    (tmp_path / "file").touch()
    options = {"retriever": "builtin", "retriever_options": {"index_dir": "x"}, **files}
    with pytest.raises(ValueError, match="'builtin' keeps no index"):
        make_env("deepsearch", **options)
    pytest.importorskip("bm25s")
    with pytest.raises(ValueError, match=r"index_dir=.*file: .*File exists|Not a directory"):
        open_index("bm25s", files["corpus"], tmp_path / "file")
    with pytest.raises(UserError, match="--index-dir x keeps no vectors of an encoder"):
        serve.serve_corpus(
            files["corpus"], retriever="dense", encoder={"model": "m"}, say=print, index_dir="x"
        )
