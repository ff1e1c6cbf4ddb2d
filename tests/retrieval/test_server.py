"""The search server, spoken to in Search-R1's JSON by clients that are not ours, many at a time."""

import base64
import contextlib
import http.client
import http.server
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs import make_env
from empg_envs.deepsearch.bm25 import BuiltinBm25
from empg_envs.deepsearch.encoders import EmbeddingServer
from empg_envs.deepsearch.pages import MemoryPages
from empg_envs.deepsearch.passages import Hit, Passage, RetrieverError
from empg_envs.deepsearch.remote import RemoteRetriever, read_reply
from empg_jax.retrieval.batcher import Batcher
from empg_jax.retrieval.serve import ServeError, make_engine, open_server
from empg_jax.retrieval.server import RequestError, parse_request

TITLES = ("Oslo", "Rome", "Paris", "Lima", "Cairo")
PASSAGES = [Passage(str(n), title, f"{title} is a city number {n}.") for n, title in enumerate(TITLES)]


class CountingEngine:
    """BM25 that counts its searches, and waits for a signal before the first one."""

    def __init__(self) -> None:
        self.inner = BuiltinBm25(PASSAGES)
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def search(self, queries: list[str], topk: int) -> list[list[Hit]]:
        self.gate.wait()
        self.batches.append(list(queries))
        "".join(queries).encode()  # like a tokenizer it refuses half of a surrogate pair
        if "burn" in queries:
            raise RetrieverError("the index burnt down")
        return self.inner.search(queries, topk)

    def close(self) -> None:
        self.batches.append(["closed"])


@pytest.fixture
def served():
    """A running server and its engine."""
    engine = CountingEngine()
    with open_server(engine, len(PASSAGES), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server, engine
        finally:
            engine.gate.set()
            server.shutdown()
            thread.join()
    assert engine.batches[-1] == ["closed"]


def post(url: str, payload: object) -> tuple[int, dict]:
    """What any HTTP library does with Search-R1's client code: POST a JSON body, read a JSON body."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_json_of_search_r1(served) -> None:
    server, _ = served
    assert server.server_address[0] == "127.0.0.1"
    status, answer = post(server.url, {"queries": ["Oslo", "who knows"], "topk": 2, "return_scores": True})
    document = {
        "id": "0",
        "contents": '"Oslo"\nOslo is a city number 0.',
        "title": "Oslo",
        "text": "Oslo is a city number 0.",
    }
    (hit,) = answer["result"][0]
    assert status == 200 and hit["document"] == document and hit["score"] > 0
    assert answer["result"][1] == []
    # Without scores: bare documents. Without topk (or with null): the server's.
    assert post(server.url, {"queries": ["Oslo"]})[1] == {"result": [[document]]}
    assert len(post(server.url, {"queries": ["city"], "topk": None})[1]["result"][0]) == 3
    assert post(server.url, {"queries": []})[1] == {"result": []}
    # How Search-R1 turns an answer into text.
    contents = hit["document"]["contents"]
    assert (contents.split("\n")[0], "\n".join(contents.split("\n")[1:])) == ('"Oslo"', document["text"])


@pytest.mark.parametrize(
    ("payload", "status", "message"),
    [
        (b"not json", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([], 422, "expected an object"),
        ({}, 422, "'queries' is not a list"),
        ({"queries": "Oslo"}, 422, "'queries' is not a list"),
        ({"queries": [1]}, 422, "'queries' is not a list"),
        ({"queries": ["x"] * 1025}, 422, "1025 entries; at most 1024"),
        ({"queries": ["x"], "topk": 0}, 422, "'topk' is 0"),
        ({"queries": ["x"], "topk": True}, 422, "'topk' is True"),
        ({"queries": ["x"], "return_scores": 1}, 422, "'return_scores' is 1"),
        ({"queries": ["burn"]}, 500, "the index burnt down"),
    ],
)
def test_wrong_requests_are_told_why(served, payload, status, message) -> None:
    server, _ = served
    answer = post(server.url, payload)
    assert answer[0] == status and message in answer[1]["detail"]
    assert post(server.url, {"queries": ["Oslo"]})[0] == 200


def test_wrong_paths_and_bodies_without_length(served) -> None:
    server, _ = served
    base = server.url.removesuffix("/retrieve")
    assert post(f"{base}/search", {"queries": []})[0] == 404
    assert post(f"{base}/pages", {"titles": ["Oslo"]})[0] == 404  # this one was opened without pages
    server.pages = MemoryPages(PASSAGES)
    assert post(f"{base}/pages", {"titles": ["Rome", "?"]})[1]["result"][1] == []
    assert post(f"{base}/pages", {"titles": "Rome"}) == (422, {"detail": "'titles' is not a list of texts"})
    with urllib.request.urlopen(f"{base}/health", timeout=20) as response:
        assert json.load(response)["passages"] == len(PASSAGES)
    for headers, status in (
        ({}, 411),
        ({"Content-Length": "-5"}, 413),
        ({"Content-Length": str(1 << 40)}, 413),
    ):
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
        connection.putrequest("POST", "/retrieve")
        for key, value in headers.items():
            connection.putheader(key, value)
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_a_wrong_path_costs_a_kept_connection_nothing(served) -> None:
    server, _ = served
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    for path, status in (("/search", 404), ("/retrieve", 200), ("/pages", 404), ("/retrieve", 200)):
        connection.request("POST", path, json.dumps({"queries": ["Oslo"]}))
        response = connection.getresponse()
        assert response.status == status and json.load(response)
    connection.close()


def test_sixty_four_clients_at_once(served) -> None:
    server, engine = served

    def ask(number: int) -> bool:
        title = TITLES[number % len(TITLES)]
        status, answer = post(
            server.url, {"queries": [title, f"{title} {number}"], "topk": 1, "return_scores": True}
        )
        return status == 200 and [row[0]["document"]["title"] for row in answer["result"]] == [title, title]

    engine.gate.clear()
    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(ask, number) for number in range(64)]
        while server.batcher.misses < 128:  # every request is in
            pass
        engine.gate.set()
        assert all(future.result() for future in asked)
    # The first search had what was there; the others waited together instead of one by one.
    assert len(engine.batches) < 32
    assert max(map(len, engine.batches)) > 8


def test_half_a_character_costs_nobody_the_batch(served) -> None:
    server, engine = served
    engine.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        queries = ["city", "Oslo", "Rome \ud83d", "Lima"]  # the first one is searched alone
        asked = [pool.submit(post, server.url, {"queries": [query], "topk": 1}) for query in queries]
        while server.batcher.misses < 4:
            pass
        engine.gate.set()
        assert [future.result()[0] for future in asked] == [200] * 4
    assert "Rome ?" in [query for batch in engine.batches for query in batch]
    assert asked[2].result()[1]["result"][0][0]["title"] == "Rome"


def test_repeated_queries_are_remembered() -> None:
    engine = CountingEngine()
    batcher = Batcher(engine, cache_size=2)
    assert batcher.search(["Oslo", "Oslo"], 2) == batcher.search(["Oslo"], 2) * 2
    assert engine.batches == [["Oslo"]]
    batcher.search(["Oslo"], 1)
    assert engine.batches == [["Oslo"]]  # fewer are a prefix of more
    assert len(batcher.search(["city"], 5)[0]) == 5 and len(batcher.search(["city"], 2)[0]) == 2
    batcher.search(["Oslo"], 3)
    assert engine.batches == [["Oslo"], ["city"], ["Oslo"]]
    batcher.search(["Rome"], 3)  # pushes out the least recently used one, "city"
    batcher.search(["Oslo"], 3)
    batcher.search(["city"], 2)
    assert engine.batches[3:] == [["Rome"], ["city"]]
    with pytest.raises(RetrieverError):
        batcher.search(["burn"], 1)
    assert batcher.search(["Lima"], 1)[0][0].passage.title == "Lima"
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        batcher.search(["Lima"], 1)


def test_a_search_that_meets_the_end_is_answered() -> None:
    batcher = Batcher(BuiltinBm25(PASSAGES))
    closing = threading.Thread(target=batcher.close)

    class Queries(list):
        """Queries that close the batcher when they are first looked at."""

        def __iter__(self):
            if closing.ident is None:
                closing.start()
                closing.join(0.3)
            return super().__iter__()

    found = []
    search = threading.Thread(target=lambda: found.extend(batcher.search(Queries(["Oslo"]), 1)), daemon=True)
    search.start()
    search.join(20)
    assert found and found[0][0].passage.title == "Oslo"
    closing.join(20)
    with pytest.raises(RuntimeError, match="the search engine is closed"):
        batcher.search(["Oslo"], 1)


def test_our_client_and_our_server(served) -> None:
    server, _ = served
    dead = "http://127.0.0.1:9/retrieve"
    client = RemoteRetriever([dead, server.url], wait=0.0)
    expected = BuiltinBm25(PASSAGES).search(["Oslo", "\ud800 nothing"], 3)
    for _ in range(3):  # whichever server's turn it is
        assert client.search(["Oslo", "\ud800 nothing"], 3) == expected
    client.close()
    with pytest.raises(ValueError, match="'ftp://x' is no address"):
        RemoteRetriever(["ftp://x"])


def test_threads_share_a_client_and_get_their_own_answers(served) -> None:
    """The lanes of a worker ask through one retriever."""
    server, _ = served
    client = RemoteRetriever(server.url, timeout=30.0)
    expected = {title: BuiltinBm25(PASSAGES).search([title], 1) for title in TITLES}
    with ThreadPoolExecutor(5) as threads:
        asked = [title for title in TITLES for _ in range(20)]
        found = list(threads.map(lambda title: client.search([title], 1), asked))
    assert found == [expected[title] for title in asked]
    client.close()


def test_an_episode_through_the_server(served, tmp_path) -> None:
    server, _ = served
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"id": "q", "question": "Which number?", "golden_answers": ["3"]}))
    env = make_env(
        "deepsearch",
        questions={"train": str(questions)},
        retriever="remote",
        retriever_options={"urls": [server.url]},
        topk=1,
    )
    env.reset(split="train", index=0)
    assert 'Doc 1(Title: "Lima") Lima is a city number 3.' in env.step("<search>Lima</search>")[0]
    with pytest.raises(RetrieverError, match=r"status 500: .*burnt down"):
        env.step("<search>burn</search>")
    env.reset(split="train", index=0)
    assert env.step("<answer>3</answer>")[1:3] == (1.0, True)


DOCUMENT = {"id": "5", "contents": '"Oslo"\nA city.'}
OSLO = Passage("5", "Oslo", "A city.")


@pytest.mark.parametrize(
    ("row", "hit"),
    [
        ({"document": DOCUMENT, "score": 2}, Hit(OSLO, 2.0)),
        (DOCUMENT, Hit(OSLO, 0.0)),
        ({"id": 5, "title": "Oslo", "text": "A city."}, Hit(OSLO, 0.0)),
        (
            {"document": {"contents": "Oslo\nA city."}, "score": 1.5},
            Hit(Passage("Oslo\nA city.", "Oslo", "A city."), 1.5),
        ),
    ],
)
def test_answers_of_other_servers(row, hit) -> None:
    assert read_reply(json.dumps({"result": [[row, row]]}).encode(), 1, 1) == [[hit]]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"result": 3}',
        b'{"result": []}',
        b'{"result": [3]}',
        b'{"result": [[3]]}',
        b'{"result": [[{}]]}',
        b'{"result": [[{"document": {"contents": "x"}, "score": "high"}]]}',
        b'{"detail": "down"}',
    ],
)
def test_nonsense_is_the_servers_failure(text) -> None:
    with pytest.raises(RetrieverError):
        read_reply(text, 1, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text(max_size=5), st.lists).map(lambda x: json.dumps(x).encode())
)
def test_any_bytes_are_answered(body) -> None:
    for read in (lambda: parse_request(body, 3), lambda: read_reply(body, 1, 3)):
        try:
            read()
        except (RequestError, RetrieverError) as error:
            assert str(error)


def test_engines_that_cannot_be(served) -> None:
    server, _ = served
    with pytest.raises(ServeError, match="--model"):
        make_engine("dense", PASSAGES)
    with pytest.raises(ServeError, match="--model"):
        make_engine("builtin", PASSAGES, {"model": "x"})
    with pytest.raises(ServeError, match="unknown retriever 'bm52'; a server has builtin"):
        make_engine("bm52", PASSAGES)
    port = server.server_address[1]
    refused = pytest.raises(ServeError, match=f"cannot listen on 127.0.0.1:{port}")
    with refused, open_server(CountingEngine(), 1, port=port):
        pass


@contextlib.contextmanager
def noting(answers):
    """A server that notes path and credentials of each request, and gives the next answer."""
    seen: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, self.headers.get("Authorization")))
            body = json.dumps(answers.pop(0)).encode()
            self.send_response(200 if body != b"null" else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}", seen
        finally:
            server.shutdown()
            thread.join()


def test_the_query_and_the_credentials_of_an_address_are_sent() -> None:
    with noting([{"result": [[]]}, {"result": [[]]}, {"data": [{"index": 0, "embedding": [1.0]}]}, None]) as (
        place,
        seen,
    ):
        url = f"http://me:p%40ss:word@{place}"
        search = RemoteRetriever(f"{url}/find?index=wiki&k=v", attempts=1)
        assert search.search(["Oslo"], 1) == [[]] and search.read_page("Oslo") == []
        embed = EmbeddingServer(f"{url}?k=v", attempts=1)
        assert embed(["Oslo"]) == [[1.0]]
        with pytest.raises(RetrieverError, match="status 503") as failed:
            search.search(["Oslo"], 1)
        assert f"http://{place}/find?index=wiki" in str(failed.value) and "p%40ss" not in str(failed.value)
        search.close()
    basic = f"Basic {base64.b64encode(b'me:p@ss:word').decode()}"
    paths = ["/find?index=wiki&k=v", "/pages?index=wiki&k=v", "/v1/embeddings?k=v", "/find?index=wiki&k=v"]
    assert seen == [(path, basic) for path in paths]
