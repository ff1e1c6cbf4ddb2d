"""Measure search engines: quality, queries per second in this process, requests per second on loopback.

Print one JSON object. Without ``--encoder`` nothing of JAX is loaded. Queries per second are counted against
this process's own CPU time beside wall time, because other jobs may share the machine. The clients of the
loopback test are threads of another process; every request asks another question, so the server's memory of
queries does not help it (a second round, marked ``repeated``, asks the same again).

  python scripts/bench_retrieval.py --corpus ../shared/data/deepsearch/corpus_2wiki.jsonl.gz \
      --questions ../shared/data/deepsearch/2wiki_aligned_dev.jsonl.gz
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from empg_envs.deepsearch.passages import Hit, Retriever, read_corpus
from empg_envs.deepsearch.questions import Question, read_questions
from empg_jax.retrieval.serve import make_engine, open_server

TOPK = 3


def measure_quality(questions: Sequence[Question], found: Sequence[Sequence[Hit]]) -> dict[str, float]:
    """Compute the shares of questions with the first, and with all, supporting titles in the results."""
    first = every = 0
    for question, hits in zip(questions, found, strict=True):
        titles = {hit.passage.title.lower() for hit in hits}
        wanted = [title.lower() for title in question.metadata["supporting_titles"]]
        first += wanted[0] in titles
        every += all(title in titles for title in wanted)
    return {"first_hop_in_top3": first / len(questions), "all_hops_in_top3": every / len(questions)}


def measure_engine(engine: Retriever, questions: Sequence[Question], seconds: float) -> dict[str, float]:
    """Measure single queries, one after the other."""
    texts = [question.text for question in questions]
    found = [engine.search([text], TOPK)[0] for text in texts]
    count, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for text in texts:
            engine.search([text], TOPK)
        count += len(texts)
    return {
        **measure_quality(questions, found),
        "queries_per_s": count / (time.perf_counter() - start),
        "queries_per_cpu_s": count / (time.process_time() - cpu),
    }


def measure_server(
    engine: Retriever, num_passages: int, texts: Sequence[str], clients: int
) -> dict[str, object]:
    """Measure requests of one query each from many clients at once, over connections that stay open."""
    rounds = {}
    with open_server(engine, num_passages, port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        for name in ("fresh", "repeated"):
            command = [sys.executable, __file__, "--ask", server.url, "--clients", str(clients)]
            cpu = time.process_time()
            run = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=True)
            rounds[name] = {**json.loads(run.stdout), "server_cpu_s": time.process_time() - cpu}
        server.shutdown()
    return {"clients": clients, **rounds}


def ask(url: str, texts: Sequence[str], clients: int) -> dict[str, float]:
    """Run the clients, which ask every text once."""
    parts = urlsplit(url)
    times: list[float] = []
    ready = threading.Barrier(clients + 1)

    def work(number: int) -> None:
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60)
        connection.connect()
        ready.wait()
        for text in texts[number::clients]:
            began = time.perf_counter()
            body = json.dumps({"queries": [text], "topk": TOPK, "return_scores": True})
            connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.loads(response.read())
            assert response.status == 200 and len(answer["result"]) == 1, answer
            times.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    times.sort()
    assert len(times) == len(texts), "a client failed"
    return {
        "requests": len(times),
        "requests_per_s": len(times) / wall,
        "median_ms": 1e3 * times[len(times) // 2],
        "p99_ms": 1e3 * times[int(0.99 * len(times))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    is_measured = "--ask" not in sys.argv  # the clients get their texts on stdin
    parser.add_argument("--corpus", required=is_measured, help="wiki-18-format file")
    parser.add_argument(
        "--questions",
        required=is_measured,
        help="FlashRAG-format file with supporting_titles in its metadata",
    )
    parser.add_argument("--retrievers", nargs="+", default=["bm25s", "builtin", "tantivy"])
    parser.add_argument("--encoder", help="folder of a BERT-style encoder: measures 'dense' too")
    parser.add_argument("--seconds", type=float, default=3.0, help="of the in-process measurement")
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        print(json.dumps(ask(args.ask, json.load(sys.stdin), args.clients)))
        return
    load = os.getloadavg()[0]
    passages, questions = read_corpus(args.corpus), read_questions(args.questions)
    texts = [f"{questions[n % len(questions)].text} {n}" for n in range(args.requests)]
    results: dict[str, object] = {}
    for name in [*args.retrievers, *(["dense"] if args.encoder else [])]:
        start = time.process_time()
        engine = make_engine(name, passages, {"model": args.encoder} if name == "dense" else None)
        built = time.process_time() - start
        results[name] = {
            "index_cpu_s": built,
            **measure_engine(engine, questions, args.seconds),
            "server": measure_server(engine, len(passages), texts, args.clients),
        }
    machine = {"load_before": load, "cpus": os.cpu_count(), "python": platform.python_version()}
    sizes = {"passages": len(passages), "questions": len(questions)}
    print(json.dumps(_round({**sizes, "retrievers": results, **machine}), indent=2))


def _round(value: object) -> object:
    if isinstance(value, dict):
        return {key: _round(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
