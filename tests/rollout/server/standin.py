"""A stand-in for a sampling server behind httpx's own transport, which fails as servers fail."""

import asyncio
import contextlib
import json

import httpx
import numpy as np

from empg_jax.rollout.server.answers import Ask
from empg_jax.rollout.server.client import Client
from empg_jax.rollout.server.patience import Patience

STOP = 2
VOCABULARY = 32


class StandIn:
    """Answers every prompt with its last token plus one, and the stop token.

    Attributes:
      kind: which server it is.
      version: of the weights that it has; those that it starts with are version 0.
      process: counts its starts.
      loads: the folders and versions that were published to it.
      bodies: the requests for responses.
      troubles: what becomes of the next requests for responses, in order: a status, an exception, a body,
        a function of the body, or ``hang``; None answers.
      pages: how many of the next requests, whatever they ask for, get a page of a proxy.
    """

    def __init__(self, kind="empg-jax"):
        self.kind, self.version, self.process = kind, 0, 1
        self.loads, self.bodies, self.troubles = [], [], []
        self.is_away = False
        self.pages = 0
        self.lists = 0

    def start_anew(self):
        """Start again, with its first weights, while nobody looks."""
        self.version, self.process = 0, self.process + 1

    def about(self):
        return {"empg": {"process": str(self.process)}} if self.kind == "empg-jax" else {}

    async def handle(self, request):
        if self.is_away:
            raise httpx.ConnectError("connection refused")
        if self.pages:
            self.pages -= 1
            return httpx.Response(200, text="<html>starting</html>")
        if request.url.path == "/v1/models":
            self.lists += 1
            card = {"id": "policy", "owned_by": self.kind, "max_model_len": 64}
            return httpx.Response(200, json={"object": "list", "data": [card]})
        body = json.loads(request.content)
        if request.url.path == "/update_weights_from_disk":
            self.loads.append((body["model_path"], body["weight_version"]))
            self.version = int(body["weight_version"])
            return httpx.Response(200, json={"success": True, **self.about()})
        if request.url.path == "/collective_rpc":
            self.loads.append((body["kwargs"]["weights_path"], ""))
            return httpx.Response(200, json={"results": [None]})
        if request.url.path == "/reset_prefix_cache":
            return httpx.Response(200)
        assert request.url.path == "/v1/completions", request.url.path
        self.bodies.append(body)
        trouble = self.troubles.pop(0) if self.troubles else None
        if callable(trouble):
            trouble = trouble(body)
        if trouble == "hang":
            await asyncio.sleep(3600)
        if isinstance(trouble, int):
            return httpx.Response(trouble, json={"error": {"message": f"trouble {trouble}"}})
        if isinstance(trouble, Exception):
            raise trouble
        return httpx.Response(200, json=self.answer(body) if trouble is None else trouble)

    def answer(self, body):
        tokens = [body["prompt"][-1] + 1, STOP][: body["max_tokens"]]
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if tokens[-1] == STOP else "length",
            "token_ids": tokens,
            "logprobs": {"tokens": [str(t) for t in tokens], "token_logprobs": [-0.5] * len(tokens)},
        }
        if self.kind == "empg-jax":
            numbers = [0.25] * len(tokens)
            choice |= self.about()
            choice["empg"] |= {"versions": [self.version] * len(tokens), "entropies": numbers}
        return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 1}}}


@contextlib.contextmanager
def connected(server, *, timeout=60.0, patience=60.0, check=lambda: None):
    """A client of the stand-in."""
    client = Client(
        "http://stand.in/v1",
        timeout=timeout,
        patience=Patience(patience, backoff=0.001, backoff_max=0.01),
        vocab_size=VOCABULARY,
        check=check,
        transport=httpx.MockTransport(server.handle),
    )
    try:
        client.connect()
        yield client
    finally:
        client.close()


def make_ask(prompt=(5, 6), max_tokens=4):
    return Ask(np.array(prompt, np.int32), max_tokens, (0, 1, 2, 3), 7, 1.0, stop_ids=(STOP,))


def collect(client, number):
    """The result of one request."""
    for _ in range(100):
        for found, result in client.collect(1.0):
            assert found == number
            return result
    raise AssertionError("no result")
