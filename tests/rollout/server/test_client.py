"""Failures of a sampling server: attempts, deadlines, versions, and the end of patience."""

import importlib
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from empg_jax.errors import Interrupted
from empg_jax.rollout.server.answers import Failure, SamplerError
from empg_jax.rollout.server.client import Client, import_httpx
from empg_jax.rollout.server.patience import Patience
from tests.rollout.server.standin import StandIn, collect, connected, make_ask
from tests.serve.servers import wait_until

WEIGHTS = Path("/weights/000003")


def test_attempts_go_on_until_the_server_answers():
    server = StandIn()
    server.troubles = [500, httpx.ReadError("reset by peer")]
    with connected(server) as client:
        client.publish(WEIGHTS, 3)
        sampled = collect(client, client.ask(make_ask()))
    assert sampled.tokens.tolist() == [7, 2] and sampled.version == "3"
    assert len(server.bodies) == 3 and all(body == server.bodies[0] for body in server.bodies)


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (500, "status 500, trouble 500"),
        ("hang", "no answer within 0.5 s"),
        ({"choices": [{"token_ids": [7, 2], "finish_reason": "stop"}]}, "without log-probabilities"),
        (lambda body: StandIn().answer({**body, "max_tokens": 9, "prompt": [40]}), "token 41"),
    ],
)
def test_a_request_that_fails_while_the_server_answers_is_given_up(trouble, why):
    server = StandIn()
    server.troubles = [trouble] * 3
    with connected(server, timeout=0.5 if trouble == "hang" else 60.0) as client:
        result = collect(client, client.ask(make_ask()))
        assert isinstance(result, Failure) and why in result.reason and "empg-jax serve" in result.reason
        assert len(server.bodies) == 3
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]


def test_a_busy_server_is_waited_for():
    server = StandIn()
    server.troubles = [429] * 9
    with connected(server) as client:
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]


def test_a_server_that_was_away_gets_the_weights_again():
    server = StandIn("vllm")
    with connected(server) as client:
        client.publish(WEIGHTS, 3)
        server.troubles = [httpx.ConnectError("refused")]
        assert collect(client, client.ask(make_ask())).version is None
    # The first answer came from whatever the server had when it came back, so it was not asked for before.
    assert server.loads == [(str(WEIGHTS), "")] * 2


@pytest.mark.parametrize("version", [3, 0])
def test_a_server_that_started_anew_unnoticed_gets_the_weights_again(version):
    """Those that it starts with are version 0, as are a run's first ones."""
    server = StandIn()
    with connected(server) as client:
        client.publish(WEIGHTS, version)
        server.start_anew()
        assert collect(client, client.ask(make_ask())).version == str(version)
        assert server.loads == [(str(WEIGHTS), str(version))] * 2
        assert len(server.bodies) == 2


def test_a_server_with_other_weights_than_published_gets_them_again():
    server = StandIn()
    with connected(server) as client:
        client.publish(WEIGHTS, 3)
        server.version = 4  # another program's
        assert collect(client, client.ask(make_ask())).version == "3"
        assert server.loads == [(str(WEIGHTS), "3")] * 2


def test_a_response_that_began_before_a_publication_is_asked_for_again():
    server = StandIn("vllm")
    with connected(server) as client:
        client.publish(WEIGHTS, 3)

        def publish_meanwhile(body):
            client._epoch += 1  # what `publish` does before it loads

        server.troubles = [publish_meanwhile]
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]
    assert len(server.bodies) == 2


def test_a_request_that_is_given_up_says_nothing():
    server = StandIn()
    server.troubles = ["hang"]
    with connected(server) as client:
        asked = client.ask(make_ask())
        wait_until(lambda: server.bodies)
        client.cancel(asked)
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]


def test_a_refusal_ends_the_run():
    server = StandIn()
    server.troubles = [404]
    with connected(server) as client:
        number = client.ask(make_ask())
        with pytest.raises(SamplerError, match="refuses POST /v1/completions: status 404, trouble 404"):
            collect(client, number)
        server.troubles = [401]
        number = client.ask(make_ask())
        with pytest.raises(SamplerError, match="EMPG_API_KEY"):
            collect(client, number)


def test_a_server_that_stays_away_ends_the_run():
    server = StandIn()
    with connected(server, patience=0.05) as client:
        server.is_away = True
        number = client.ask(make_ask())
        with pytest.raises(SamplerError, match=r"faults.patience=0.05\); the last failure.*refused"):
            collect(client, number)


@pytest.mark.parametrize("has_failed", [True, False])
def test_time_in_which_nothing_is_asked_counts_for_no_outage(has_failed):
    """Between two collections the learner works, and nobody asks."""
    server = StandIn()
    with connected(server, patience=1.0) as client:
        server.troubles = [500] * 3 if has_failed else [500, "hang"]
        asked = client.ask(make_ask())
        if has_failed:
            assert isinstance(collect(client, asked), Failure)
        else:
            wait_until(lambda: len(server.bodies) == 2)
            client.cancel(asked)
        time.sleep(1.2)
        server.troubles = [500]
        client.publish(WEIGHTS, 3)
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]


def test_a_proxys_page_instead_of_an_answer_is_waited_out():
    server = StandIn()
    with connected(server) as client:
        server.pages = 9
        assert collect(client, client.ask(make_ask())).tokens.tolist() == [7, 2]


def test_a_stop_ends_the_wait_for_a_server_that_is_away():
    is_asked = threading.Event()

    def check():
        if is_asked.is_set():
            raise Interrupted

    server = StandIn()
    with connected(server, check=check) as client:
        server.is_away = True
        threading.Timer(0.1, is_asked.set).start()
        with pytest.raises(Interrupted):
            client.publish(WEIGHTS, 3)
        is_asked.clear()
        server.is_away = False
        client.publish(WEIGHTS, 4)  # the attempts at the other ones were given up
    assert server.loads == [(str(WEIGHTS), "4")]


def test_weights_that_are_refused_end_the_run():
    server = StandIn("vllm")

    async def without_route(request):
        if request.url.path == "/collective_rpc":
            return httpx.Response(404, json={"detail": "Not Found"})
        return await server.handle(request)

    standin = StandIn("vllm")
    standin.handle = without_route
    with (
        connected(standin) as client,
        pytest.raises(SamplerError, match="status 404, Not Found; start vLLM with VLLM_SERVER_DEV_MODE=1"),
    ):
        client.publish(WEIGHTS, 1)


def test_the_start_tells_what_is_wrong():
    server = StandIn()
    server.is_away = True
    with (
        pytest.raises(SamplerError, match=r"rollout.url=http://stand.in does not answer.*start the server"),
        connected(server),
    ):
        pass
    with (
        pytest.raises(SamplerError, match="'llamacpp' as the owner"),
        connected(StandIn("llamacpp")),
    ):
        pass


def test_patience_is_that_of_an_outage():
    now, told = [0.0], []

    def tell(event, **fields):
        told.append((event, *fields.values()))

    patience = Patience(10.0, backoff=0.5, backoff_max=3.0, tell=tell, timer=lambda: now[0])
    for now[0] in (0.0, 9.0):
        patience.fail("a")
    patience.succeed()
    for now[0] in (11.0, 21.0):
        patience.fail("b")
    now[0] = 21.5
    with pytest.raises(SamplerError, match=r"nothing was sampled for 10 s .*: c"):
        patience.fail("c")
    assert told == [("sampler_failing", "a"), ("sampler_answers", 9.0), ("sampler_failing", "b")]
    assert [patience.wait(n) for n in (1, 2, 3, 4, 99)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_patience_goes_on_where_it_stopped():
    now = [0.0]
    patience = Patience(10.0, backoff=0.5, backoff_max=3.0, timer=lambda: now[0])
    with patience.asking():
        patience.fail("a")
        now[0] = 4.0
    now[0] = 1000.0
    with patience.asking(), patience.asking():
        now[0] = 1006.0
        patience.fail("b")
        now[0] = 1006.5
        with pytest.raises(SamplerError, match="nothing was sampled for 10 s"):
            patience.fail("c")


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    importlib.invalidate_caches()
    with pytest.raises(SamplerError, match=r"needs httpx, which comes with: pip install -e '.\[sampler\]'"):
        import_httpx()
    with pytest.raises(SamplerError, match="needs httpx"):
        Client("http://stand.in", timeout=1, patience=Patience(1, backoff=0, backoff_max=0), vocab_size=9)
