"""What a server's log-probabilities are of: the check before a run begins."""

import types

import numpy as np
import pytest

from empg_jax.config import load_config
from empg_jax.rollout.server.answers import Sampled, SamplerError
from empg_jax.run.server import _check_meaning

LOGITS = np.array([2.0, 1.0, 0.0])


class Server:
    """Tells the log-probability of its most likely token, of the distribution that ``kind`` names."""

    url, wire = "http://stand.in", types.SimpleNamespace(name="a server")

    def __init__(self, kind):
        self.kind, self.asked = kind, 0

    def try_one(self, ask):
        self.asked += 1
        heat = 1.0 if self.kind == "raw" else ask.temperature
        logits = LOGITS[:1] if self.kind == "filtered" and ask.token_filter.top_k == 1 else LOGITS
        logprob = logits[0] / heat - np.log(np.exp(logits / heat).sum())
        return Sampled(np.zeros(1, np.int32), np.array([logprob], np.float32), "length")


def check(kind, *overrides):
    server = Server(kind)
    url = "rollout.url=http://stand.in"
    _check_meaning(server, load_config("quickstart", ["rollout.engine=openai", url, *overrides]))
    return server.asked


@pytest.mark.parametrize("kind", ["raw", "heated", "filtered"])
def test_temperature_1_without_filters_takes_any(kind):
    assert check(kind) == 1


def test_another_temperature_needs_its_own():
    for kind in ("heated", "filtered"):
        assert check(kind, "rollout.temperature=0.7") == 2
    with pytest.raises(SamplerError, match=r"temperature 1, but rollout.temperature=0.7: start vLLM"):
        check("raw", "rollout.temperature=0.7")


def test_filters_need_the_filtered_distribution():
    assert check("filtered", "rollout.top_p=0.9") == 2
    for kind in ("raw", "heated"):
        with pytest.raises(SamplerError, match="not those of the filtered distribution"):
            check(kind, "rollout.top_p=0.9")
