"""The glossary and the runs: a few tiny ones produce every name in it, and no other."""

import itertools
import json

import pytest

from empg_jax.metrics import METRICS, describe_metric, read_metrics
from tests import runs

PLACES = ("door", "desk 1", "bed 1", "sofa 1", "kitchen", "bedroom", "livingroom", "countertop 1")
FEW = ["train.updates=2", "sft.updates=0", "eval.tasks=2"]
# Long responses in small bursts: some are in progress whenever weights arrive.
BURST = [
    *("rollout.max_response_tokens=32", "rollout.max_tokens=160", "rollout.tasks_per_update=4"),
    *("train.micro_tokens=320", "train.max_lag=2", "rollout.publish=burst", "rollout.burst=1"),
    "train.updates=16",
]
NOT_METRICS = {"update", "time"}


def chat_at(place):
    """A conversation of two messages."""
    said = [("user", f"at {place} ."), ("assistant", "go to desk 1")]
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def produce(folder):
    """The names in the metrics of all runs."""
    chats = folder / "chats.jsonl"
    chats.write_text("".join(json.dumps(chat_at(place)) + "\n" for place in PLACES))
    variants = {
        # A critic, both penalties of the KL, the drift, and an evaluation on the way.
        "ppo": ["algorithm.name=ppo", "algorithm.kl_coef=0.1", "log.drift_every=1", "eval.every=1"],
        # Dynamic sampling, and samplers that are too far off.
        "dapo": ["algorithm.name=dapo", "rollout.max_refills=1", "algorithm.dual_clip=3.0"],
        "decoupled": [
            *("algorithm.loss=decoupled_ppo", "algorithm.entropy_source=learner"),
            "algorithm.correction.entropy_low=0.9",
        ],
        # Weights that go live inside responses, over pages.
        "burst": [*BURST, "rollout.page_tokens=16"],
        # A warm start on chats, whose held-out part is measured.
        "chats": ["sft.updates=1", f"sft.data={chats}", "sft.holdout=0.25", "train.updates=1"],
    }
    names = set()
    for name, overrides in variants.items():
        run = runs.train(folder / name, *runs.HOUSE, *FEW, *overrides)
        lines = [read_metrics(path) for path in run.glob("*metrics.jsonl")]
        names |= {name for line in itertools.chain(*lines) for name in line}
    return names - NOT_METRICS


@pytest.mark.slow
def test_the_runs_produce_every_name_of_the_glossary_and_no_other(tmp_path):
    produced = produce(tmp_path)
    families = {name: name[:-1] for name in METRICS if name.endswith("*")}
    known = {name for name in produced if name in METRICS}
    missing = [
        name
        for name in METRICS
        if name not in produced
        and not (name in families and any(other.startswith(families[name]) for other in produced - known))
    ]
    assert missing == []
    assert [name for name in sorted(produced) if describe_metric(name) is None] == []
