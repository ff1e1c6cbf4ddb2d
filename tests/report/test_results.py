"""The numbers of an update: which tokens count as trained."""

import pytest

from empg_jax.engine.stats import EngineStats
from empg_jax.learner.batching import BatchShape, Layout
from empg_jax.report.results import describe_update
from tests.episodes import Episodes

EPISODES = Episodes()
GUARDS = {"nonfinite": 0.0, "kl_exceeded": 0.0, "empty": 0.0}


def test_trained_tokens_are_those_that_the_loss_covers():
    """Means weigh steps by their tokens, the entropy by all sampled ones; loss and norm are of the steps."""
    steps = [
        {
            "ratio": 1.0,
            "entropy": 0.5,
            "tokens": 1.0,
            "sampled": 6.0,
            **GUARDS,
            "loss": 1.0,
            "grad_norm": 4.0,
        },
        {
            "ratio": 2.0,
            "entropy": 1.5,
            "tokens": 3.0,
            "sampled": 2.0,
            **GUARDS,
            "loss": -1.0,
            "grad_norm": 2.0,
        },
    ]
    values = describe_update(
        [EPISODES.trajectory([EPISODES.turn([1], 8)])],
        Layout(((0, 1),), 1, 9, 1),
        BatchShape(1, 1, 16, 1, 1, 1),
        version=0,
        engine=EngineStats(sampled_tokens=8),
        credit={"correction_kept": 1.0, "loss_coverage": 0.5},
        steps=steps,
        seconds=1.0,
    )
    assert (values["tokens_trained"], values["tokens_sampled"]) == (4.0, 8.0)
    assert (values["loss"], values["grad_norm"]) == (0.0, 3.0)
    assert (values["ratio"], values["entropy"]) == pytest.approx((1.75, 0.75))
    assert "tokens" not in values and "sampled" not in values
