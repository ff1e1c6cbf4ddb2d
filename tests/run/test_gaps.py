"""Sampler and learner agree only where the measured gap is a small number: NaN is no agreement."""

import math

import numpy as np
import pytest

from empg_jax.config import Config
from empg_jax.run.guards import GAP_LIMIT, TrainingError, check_gap
from empg_jax.types import Scores
from tests.rollout.test_thread import make_rollout


def test_a_gap_that_is_no_number_stops_training():
    zeros = np.zeros((1, 4), np.float32)
    own = Scores(zeros, zeros, zeros)
    check_gap(Config(), 3, {}, None)
    check_gap(Config(), 3, {"logprob_gap": GAP_LIMIT}, own)
    for gap in (2 * GAP_LIMIT, math.inf, math.nan):
        with pytest.raises(TrainingError, match=f"difference is {gap:.3g} at update 3"):
            check_gap(Config(), 3, {"logprob_gap": gap}, own)


def test_a_stale_gap_that_is_no_number_drops_the_cache():
    rollout, dropped, gaps = make_rollout(), [], iter([0.1, math.nan, 0.3])
    rollout.engine.measure_stale_gap = lambda: next(gaps)
    rollout.engine.drop_cache = lambda: dropped.append(rollout._gaps[-1])
    for _ in range(3):
        rollout._bound_gap(0.2)
    assert len(dropped) == 2 and math.isnan(dropped[0]) and dropped[1] == 0.3
