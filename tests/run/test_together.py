"""What several hosts tell of one update: counts are summed, a maximum stays one."""

import dataclasses

from empg_jax.engine.engine import EngineStats
from empg_jax.run.together import join_deliveries


def test_the_engines_counts_are_summed_and_the_largest_use_of_pages_is_kept():
    def part(use):
        engine = EngineStats(sampled_tokens=7, bursts=1, page_use=use)
        counts = {"update": 0, "metrics": {}, "outcomes": {"trained:won": 2}, "incidents": {}}
        return counts | {"engine": dataclasses.asdict(engine)}, []

    joined = join_deliveries([part(0.9), part(0.5)])
    assert joined.engine == EngineStats(sampled_tokens=14, bursts=2, page_use=0.9)
    assert joined.outcomes == {"trained:won": 4}
