"""Vector indexes that others built: FAISS's files and arrays, from the options to what an agent reads."""

import http.server
import json
import sys
import threading
from typing import ClassVar

import numpy as np
import pytest
from typer.testing import CliRunner

from empg_envs import make_env
from empg_envs.deepsearch import sources
from empg_envs.deepsearch.passages import RetrieverError, make_retriever, read_corpus
from empg_envs.deepsearch.vectors_numpy import VectorFile
from empg_envs.rows import DataError
from empg_jax.cli import app
from empg_jax.retrieval import serve
from empg_jax.retrieval.serve import ServeError, find_index, make_engine

COUNT, WIDTH = 57, 8
VECTORS = np.random.default_rng(0).standard_normal((COUNT, WIDTH)).astype(np.float32)
ENCODER = "tests.envs.test_deepsearch_vectors:encode"


def encode(texts):
    """The vector of the passage whose number the text ends with; "burn" has none."""
    return np.stack([VECTORS[int(text.split()[-1])] for text in texts])


def narrow(texts):
    return encode(texts)[:, :3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors")
    rows = [{"id": str(n), "contents": f'"Title {n}"\nText {n}.'} for n in range(COUNT)]
    (path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"id": "q", "question": "Which?", "golden_answers": ["x"]}
    (path / "questions.jsonl").write_text(json.dumps(question))
    np.save(path / "vectors.npy", VECTORS)
    np.save(path / "half.npy", VECTORS.astype(np.float16))
    return path


@pytest.fixture(scope="module")
def indexes(folder):
    """Files of FAISS: exact by inner product and by distance, a graph, and lists."""
    faiss = pytest.importorskip("faiss")
    lists = faiss.IndexIVFFlat(faiss.IndexFlatIP(WIDTH), WIDTH, 4, faiss.METRIC_INNER_PRODUCT)
    lists.train(VECTORS)
    graph = faiss.IndexHNSWFlat(WIDTH, 8)
    made = {"ip": faiss.IndexFlatIP(WIDTH), "l2": faiss.IndexFlatL2(WIDTH), "ivf": lists, "hnsw": graph}
    for name, index in made.items():
        index.add(VECTORS)
        faiss.write_index(index, str(folder / f"{name}.faiss"))
    return {name: str(folder / f"{name}.faiss") for name in made}


def search(folder, retriever, number=5, **options):
    options = {"encoder": ENCODER, **options}
    files = {"questions": {"train": str(folder / "questions.jsonl")}, "corpus": str(folder / "corpus.jsonl")}
    env = make_env("deepsearch", **files, retriever=retriever, retriever_options=options, topk=3)
    env.reset(split="train", index=0)
    return env.step(f"<search>number {number}</search>")[0]


def expected(number, scores):
    best = np.argsort(-scores, kind="stable")[:3]
    lines = "".join(f'Doc {place}(Title: "Title {n}") Text {n}.\n' for place, n in enumerate(best, start=1))
    return f"\n\n<information>{lines.strip()}</information>\n\n"


def by_product(number):
    return expected(number, VECTORS @ VECTORS[number])


@pytest.mark.parametrize("options", [{}, {"piece": 10}, {"piece": 1}, {"index_dir": True}])
def test_an_array_on_disk_is_searched_piece_by_piece(folder, tmp_path, options) -> None:
    options = {**options, **({"index_dir": str(tmp_path)} if options.get("index_dir") else {})}
    for number in (0, 5, 56):
        found = search(folder, "vectors", number, index=str(folder / "vectors.npy"), **options)
        assert found == by_product(number)


def test_the_results_of_pieces_are_those_of_the_whole(folder) -> None:
    queries = VECTORS[:4] + 0.1
    for name, vectors in (("vectors", VECTORS), ("half", VECTORS.astype(np.float16).astype(np.float32))):
        whole = queries @ vectors.T
        for piece in (1, 7, COUNT, 1000):
            scores, numbers = VectorFile(str(folder / f"{name}.npy"), piece).nearest(queries, 9)
            order = np.argsort(-whole, axis=1, kind="stable")[:, :9]
            np.testing.assert_array_equal(numbers, order)
            np.testing.assert_allclose(scores, np.take_along_axis(whole, order, 1), rtol=1e-5)


def test_of_equal_vectors_the_first_count(tmp_path) -> None:
    np.save(tmp_path / "same.npy", np.ones((20, 2), np.float32))
    for piece in (3, 20):
        _, numbers = VectorFile(str(tmp_path / "same.npy"), piece).nearest(np.ones((1, 2), np.float32), 5)
        assert numbers.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize(("name", "nprobe"), [("ip", None), ("ivf", 4), ("l2", None), ("hnsw", None)])
def test_index_files_of_faiss(folder, indexes, tmp_path, name, nprobe) -> None:
    options = {"index": indexes[name], "index_dir": str(tmp_path)} | ({"nprobe": nprobe} if nprobe else {})
    for number in (0, 5, 56):
        distances = ((VECTORS - VECTORS[number]) ** 2).sum(axis=1)
        wanted = expected(number, -distances) if name in ("l2", "hnsw") else by_product(number)
        assert search(folder, "faiss", number, **options) == wanted
    retriever = sources._load_retriever("faiss", *_loaded(folder, options))[0]
    (hits,) = retriever.search(["number 5"], 3)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)  # of distances too: larger is better


def _loaded(folder, options):
    corpus = str(folder / "corpus.jsonl")
    return corpus, json.dumps({"encoder": ENCODER, **options}), None


def test_fewer_lists_find_fewer_passages(folder, indexes) -> None:
    passages = read_corpus(str(folder / "corpus.jsonl"))
    options = {"index": indexes["ivf"], "encoder": encode}
    one, all_ = (make_retriever("faiss", passages, **options, nprobe=nprobe) for nprobe in (1, 4))
    few, many = (engine.search(["x 5"], 57)[0] for engine in (one, all_))
    assert 0 < len(few) < len(many) == COUNT
    with pytest.raises(ValueError, match=r"nprobe=2: .*ip\.faiss has no inverted lists"):
        make_retriever("faiss", passages, index=indexes["ip"], encoder=encode, nprobe=2)


def test_a_changed_index_is_seen_in_the_same_process(folder, tmp_path) -> None:
    path = tmp_path / "changing.npy"
    np.save(path, VECTORS)
    assert search(folder, "vectors", 5, index=str(path)) == by_product(5)
    np.save(path, -VECTORS)
    assert search(folder, "vectors", 5, index=str(path)) == expected(5, -VECTORS @ VECTORS[5])


class _Embeddings(http.server.BaseHTTPRequestHandler):
    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        rows = [{"index": n, "embedding": encode([t])[0].tolist()} for n, t in enumerate(body["input"])]
        answer = json.dumps({"data": rows[::-1]} if body.get("model") != "odd" else {"data": []}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def test_an_address_encodes_queries(folder) -> None:
    passages = read_corpus(str(folder / "corpus.jsonl"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Embeddings) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"

        def make(**options):
            limits = {"timeout": 60.0, "attempts": 1, **options}
            return make_retriever(
                "vectors",
                passages,
                index=str(folder / "vectors.npy"),
                encoder=url,
                encoder_options=limits,
                query_prefix="query: ",
            )

        one, two = make(model="e5").search(["number 5", "number 6"], 1)
        assert (one[0].passage.id, two[0].passage.id) == tuple(
            str(int(np.argmax(VECTORS @ VECTORS[n]))) for n in (5, 6)
        )
        sent = {"input": ["query: number 5", "query: number 6"], "model": "e5"}
        assert _Embeddings.asked[-1] == ("/v1/embeddings", sent)
        with pytest.raises(RetrieverError, match="0 embeddings; expected 1"):
            make(model="odd").search(["number 5"], 1)
        server.shutdown()
    with pytest.raises(RetrieverError, match="1 requests failed"):
        make(model="e5").search(["number 5"], 1)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"encoder": ENCODER}, ValueError, "missing a required .*argument: 'index'"),
        ({"index": "vectors.npy"}, ValueError, "missing a required .*argument: 'encoder'"),
        ({"index": "nowhere.npy", "encoder": ENCODER}, DataError, "no file .*nowhere.npy"),
        (
            {"index": "corpus.jsonl", "encoder": ENCODER},
            DataError,
            r"corpus.jsonl: no array in NumPy's format",
        ),
        ({"index": "short.npy", "encoder": ENCODER}, DataError, "3 vectors, but the corpus has 57 passages"),
        ({"index": "flat.npy", "encoder": ENCODER}, DataError, "expected one array of floats"),
        (
            {"index": "vectors.npy", "encoder": "no.such:thing"},
            ValueError,
            "encoder=no.such:thing: No module",
        ),
        ({"index": "vectors.npy", "encoder": ENCODER, "piece": 0}, ValueError, "piece=0 must be at least 1"),
        (
            {"index": "vectors.npy", "encoder": ENCODER, "encoder_options": {"model": "x"}},
            ValueError,
            r"encoder_options \['model'\] have an effect where encoder is an address only",
        ),
    ],
)
def test_what_is_wrong_is_named(folder, options, kind, message) -> None:
    np.save(folder / "short.npy", VECTORS[:3])
    np.save(folder / "flat.npy", VECTORS[0])
    options = {key: str(folder / value) if key == "index" else value for key, value in options.items()}
    with pytest.raises(kind, match=message):
        make_retriever("vectors", read_corpus(str(folder / "corpus.jsonl")), **options)


def test_a_file_that_is_none_of_faiss_and_a_missing_package(folder, indexes, monkeypatch) -> None:
    passages = read_corpus(str(folder / "corpus.jsonl"))
    with pytest.raises(DataError, match=r"vectors\.npy: FAISS cannot read this index"):
        make_retriever("faiss", passages, index=str(folder / "vectors.npy"), encoder=encode)
    monkeypatch.delitem(sys.modules, "empg_envs.deepsearch.vectors_faiss")
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ValueError, match=r"needs the package 'faiss': in the clone: pip install -e '\.\[faiss"
    ):
        make_retriever("faiss", passages, index=indexes["ip"], encoder=encode)


def test_an_encoder_that_fails_costs_the_episode_not_the_policy(folder) -> None:
    index = str(folder / "vectors.npy")
    with pytest.raises(RetrieverError, match="the encoder failed: ValueError"):
        search(folder, "vectors", "burn", index=index)
    with pytest.raises(RetrieverError, match=r"shape \(1, 3\); expected \(1, 8\)"):
        search(folder, "vectors", 5, index=index, encoder=ENCODER.replace("encode", "narrow"))


@pytest.mark.parametrize("index_dir", [None, "kept"])
def test_the_command_serves_an_index(folder, tmp_path, monkeypatch, index_dir) -> None:
    found = []

    class Opened:
        def __init__(self, engine, num_passages, **options):
            found.append((num_passages, engine.search(["number 5"], 1)[0][0].passage.title))

        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(serve, "open_server", Opened)
    with pytest.raises(KeyboardInterrupt):
        serve.serve_corpus(
            str(folder / "corpus.jsonl"),
            retriever="vectors",
            encoder={"index": str(folder / "vectors.npy"), "encoder": ENCODER, "query_prefix": "query: "},
            say=lambda line: None,
            index_dir=index_dir and str(tmp_path / index_dir),
        )
    assert found == [(COUNT, f"Title {int(np.argmax(VECTORS @ VECTORS[5]))}")]


def test_the_command_passes_its_options_on(monkeypatch) -> None:
    said = {}
    monkeypatch.setattr(serve, "serve_corpus", lambda corpus, **options: said.update(options))
    command = ["retrieve", "--corpus", "c", "--retriever", "faiss", "--index", "i", "--encoder", "m:f"]
    result = CliRunner().invoke(app, [*command, "--query-prefix", "query: "])
    assert result.exit_code == 0, result.output
    given = {key: value for key, value in said["encoder"].items() if value}
    assert given == {"index": "i", "encoder": "m:f", "query_prefix": "query: "}
    assert CliRunner().invoke(app, command[:3]).exit_code == 0 and said["encoder"] is None


def test_options_of_the_command_that_do_not_fit() -> None:
    for options in ({}, {"index": "x"}, {"encoder": "x"}):
        with pytest.raises(ServeError, match=r"needs their file \(--index\) and one encoder"):
            find_index(None, options)
    with pytest.raises(ServeError, match="passage_prefix has no effect"):
        find_index(None, {"index": "x", "encoder": "a:b", "passage_prefix": "passage: "})
    with pytest.raises(ServeError, match="go with --retriever faiss or vectors, not builtin"):
        make_engine("builtin", [], {"index": "x", "encoder": "a:b"})
