"""A search server that goes away in the middle of a run costs time, and nothing else.

``OUTAGE_SECONDS`` sets how long it is away.
"""

import json
import os
import socket
import threading
import time

import pytest

from empg_envs import EnvSpec
from empg_envs.base import ParsedAction, PlainPrompts
from empg_envs.deepsearch.env import DeepSearchEnv
from empg_jax import trainer
from empg_jax.metrics import read_metrics
from empg_jax.run.consumed import read_consumed
from tests import runs

SECONDS = float(os.environ.get("OUTAGE_SECONDS", "1.5"))
TITLES = ("Oslo", "Rome", "Paris", "Lima", "Cairo")


def search_always(**options):
    """A parser for a policy that knows nothing: whatever it writes, the environment is asked to search."""
    return lambda text, info: ParsedAction("<search>city</search>", True)


SEARCHES = EnvSpec(
    name="searches",
    make=DeepSearchEnv,
    prompts=lambda **options: PlainPrompts(),
    parser=search_always,
)


def serve(corpus, port):
    """Starts the search server in a process of its own, and waits until it answers."""
    process = runs.start(["retrieve", "--corpus", corpus, "--retriever", "builtin", "--port", port])
    end = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "the search server does not start"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return process


def find_port():
    """A port that is free now."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_search_server_that_is_away_costs_time_only(tmp_path, monkeypatch, lag):
    files = {}
    for split, numbers in {"train": range(20), "test": range(20, 24)}.items():
        files[split] = tmp_path / f"{split}.jsonl"
        rows = [
            {"id": str(n), "question": f"Which city is number {n}?", "golden_answers": ["Troy"]}
            for n in numbers
        ]
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = tmp_path / "corpus.jsonl"
    passages = [
        {"id": str(n), "contents": f'"{title}"\n{title} is a city.'} for n, title in enumerate(TITLES)
    ]
    corpus.write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    port = find_port()
    servers, outages = [serve(corpus, port)], []

    def take_away():
        """No server for a while, then another one at the same address."""
        servers[0].kill()
        servers[0].communicate()
        time.sleep(SECONDS)
        servers.append(serve(corpus, port))

    real = trainer.open_run

    def open_run(*args, **options):
        parts, run = real(*args, **options)
        advance = parts.rollout.collector.advance

        def advance_without(wanted):
            if parts.engine.version >= 1 and not outages:
                outages.append(threading.Thread(target=take_away, daemon=True))
                outages[0].start()
            return advance(wanted)

        parts.rollout.collector.advance = advance_without
        return parts, run

    monkeypatch.setattr(trainer, "open_run", open_run)
    remote = f"{{urls: 'http://127.0.0.1:{port}/retrieve', timeout: 1, attempts: 1}}"
    options = [
        "env.name=null",
        "env.entry_point=tests.test_search_outage:SEARCHES",
        f"env.options={{questions: {{train: {files['train']}, test: {files['test']}}}, retriever: remote, "
        f"retriever_options: {remote}, topk: 1}}",
        "env.eval_split=test",
        "env.max_turns=3",
        "rollout.max_tokens=384",
        "rollout.prefill_buckets=[128]",
        "train.micro_tokens=1536",
        "sft.updates=0",
        "eval.tasks=2",
        "faults.breaker_min=4",
        "faults.probe=0.1",
        f"train.max_lag={lag}",
    ]
    try:
        run = runs.train(tmp_path / "run", *options)
    finally:
        for outage in outages:
            outage.join(timeout=120)
        for server in servers:
            server.kill()
            server.communicate()
    events = list(read_metrics(run / "events.jsonl"))
    (opened,) = [event for event in events if event["event"] == "breaker_open"]
    (closed,) = [event for event in events if event["event"] == "breaker_closed"]
    assert opened["reason"] == "env_error" and closed["seconds"] > 0.5 * SECONDS
    # Every group was trained on once, in order, and no task paid for the outage.
    groups = [line["group_id"] for line in read_consumed(run)]
    assert len(groups) == len(set(groups)) == 6
    assert lag or groups == list(range(6))
    assert not [event for event in events if event["event"] in ("group_replaced", "task_quarantined")]
    assert len(runs.lines(run)) == 3
