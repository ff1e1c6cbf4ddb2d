"""What an engine counts, for metrics and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from empg_jax.engine.programs import Burst


@dataclasses.dataclass
class EngineStats:
    """Counts of work done."""

    prefilled_tokens: int = 0  # real tokens written by prefill
    sampled_tokens: int = 0
    responses: int = 0
    decode_rows: int = 0  # slots x steps that decode dispatches spent; sampled_tokens of them were of use
    bursts: int = 0
    prompt_tokens: int = 0  # of all prompts, with what their conversations held, without each one's newest
    shared_tokens: int = 0  # whose keys and values were copied from another slot
    evicted_tokens: int = 0  # whose keys and values were of use, and were given up for others
    page_use: float = 0.0  # largest share of the pages that was in use

    def add(self, burst: Burst, num_slots: int, num_tokens: int, num_ended: int) -> None:
        """Count a burst that was read, and what responses took of it."""
        self.bursts += 1
        self.decode_rows += int(burst.steps) * num_slots
        self.sampled_tokens += num_tokens
        self.responses += num_ended

    def add_use(self, evicted: int, use: float) -> None:
        """Count what gave way in the memory, and the share of its pages in use."""
        self.evicted_tokens += evicted
        self.page_use = max(self.page_use, use)

    @property
    def occupancy(self) -> float:
        """Share of the decoded rows that sampled a token of a response."""
        return self.sampled_tokens / max(1, self.decode_rows)

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that were not prefilled: kept in their slot, or copied.

        What new weights let be prefilled anew in the middle of responses counts against it, down to 0.
        """
        return max(0.0, 1.0 - self.prefilled_tokens / max(1, self.prompt_tokens))


def add_stats(parts: Iterable[EngineStats]) -> EngineStats:
    """Add the counts of several times or hosts; of the shares of pages in use, the largest is kept."""
    each = [dataclasses.asdict(part) for part in parts]
    total = {field.name: sum(part[field.name] for part in each) for field in dataclasses.fields(EngineStats)}
    return EngineStats(**total | {"page_use": max((part["page_use"] for part in each), default=0.0)})


def compare_tokens(stale: Burst, fresh: Burst, slots: np.ndarray) -> float:
    """Compute the mean difference of some slots' first tokens, in nats; see `Engine.measure_stale_gap`."""
    is_same = stale.tokens[0, slots] == fresh.tokens[0, slots]
    by_logprob = np.abs(stale.logprobs - fresh.logprobs)[0, slots]
    by_entropy = np.abs(stale.entropies - fresh.entropies)[0, slots]
    return float(np.where(is_same, by_logprob, by_entropy).mean())
