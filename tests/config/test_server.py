"""Configurations with a server that samples: what goes together, and what a run does by itself then."""

import pytest

from empg_jax.config import load_config
from empg_jax.config.load import check_resumable
from empg_jax.errors import ConfigError

SERVER = ["rollout.engine=openai", "rollout.url=http://127.0.0.1:8000"]


def test_the_learner_scores_and_corrects():
    config = load_config("quickstart", SERVER)
    assert config.algorithm.entropy_source == "learner" and config.algorithm.correction.kind == "tis"
    why = "because rollout.engine=openai trains on samples of another program"
    assert config.notes == (
        f"algorithm.entropy_source=learner, {why}",
        f"algorithm.correction.kind=tis, {why}",
    )
    own = load_config("quickstart", [*SERVER, "algorithm.correction.kind=none"])
    assert "samples of another program without a correction" in own.notes[-1]
    lagging = load_config("quickstart", [*SERVER, "train.max_lag=1"])
    assert lagging.algorithm.correction.kind == "tis"


def test_a_resumed_run_may_find_its_server_elsewhere():
    check_resumable(["rollout.url=http://127.0.0.1:9", "rollout.weights_dir=/w", "rollout.request_timeout=9"])
    with pytest.raises(ConfigError, match=r"rollout.engine=builtin: a resumed run may change only"):
        check_resumable(["rollout.engine=builtin"])


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (SERVER[:1], "needs the server's address"),
        ([SERVER[0], "rollout.url=127.0.0.1:8000"], "rollout.url"),
        (SERVER[1:], "rollout.url=http://127.0.0.1:8000 has no effect with rollout.engine=builtin"),
        (["rollout.weights_dir=/w"], "rollout.weights_dir=/w has no effect"),
        (["rollout.request_timeout=9"], "rollout.request_timeout=9.0 has no effect"),
        ([*SERVER, "algorithm.entropy_source=engine"], "needs on-policy data, but rollout.engine=openai"),
        ([*SERVER, "train.max_lag=1", "rollout.publish=burst"], "weights between responses only"),
        ([*SERVER, "rollout.deterministic=true"], "rollout.deterministic=true with rollout.engine=openai"),
        ([*SERVER, "rollout.share_prefix=false"], "rollout.share_prefix=False has no effect"),
        ([*SERVER, "rollout.release=true"], "rollout.release=True has no effect"),
        ([*SERVER, "rollout.tensor=2"], "rollout.tensor=2 has no effect"),
        ([*SERVER, "rollout.devices=1"], "rollout.devices=1 has no effect"),
        ([*SERVER, "rollout.stored=e.npz"], "nothing is sampled"),
        (
            [*SERVER, "hosts.coordinator=a:1", "hosts.num=2", "hosts.index=0"],
            "a server samples for one host",
        ),
    ],
)
def test_what_cannot_work_is_refused(overrides, why):
    with pytest.raises(ConfigError) as refused:
        load_config("quickstart", overrides)
    assert why in str(refused.value)
