"""What rollouts need of an engine, so that a server of another program can take its place."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import Response, Watch
from empg_jax.engine.stats import EngineStats
from empg_jax.models.decoder import DecoderConfig
from empg_jax.models.filtering import NO_FILTER, TokenFilter
from empg_jax.types import Params


class SamplingEngine(Protocol):
    """An engine as `Collector`, `RolloutThread` and `Evaluator` use it; see `Engine` for every member."""

    config: EngineConfig
    model: DecoderConfig
    base: Params

    @property
    def has_work(self) -> bool:
        """True while a submitted response is unfinished, or finished and not returned."""

    def room(self, slot: int, num_new: int, *, is_fresh: bool) -> int:
        """Return how many response tokens still fit after ``num_new`` more prompt tokens."""

    def submit(
        self,
        slot: int,
        tokens: Sequence[int] | np.ndarray,
        *,
        is_fresh: bool,
        ids: tuple[int, int, int, int],
        watch: Watch | None = None,
    ) -> None:
        """Append tokens to the slot's conversation and ask for a response."""

    def release(self, slot: int) -> None:
        """Forget the slot's conversation; a response in progress is dropped."""

    def step(self, *, is_eager: bool = True) -> list[Response]:
        """Go on with the responses, and return those that ended."""

    def place(self, params: Params) -> Any:
        """Copy parameters to where `swap` can take them from; the caller's may change afterwards."""

    def swap(self, placed: Any, version: int, *, keep_cache: bool = False) -> None:
        """Make weights live that `place` has put in place."""

    def lent(
        self,
        placed: Any,
        version: int,
        *,
        temperature: float,
        token_filter: TokenFilter = NO_FILTER,
    ) -> contextlib.AbstractContextManager[None]:
        """Give every slot to other conversations with these weights for a while."""

    def measure_stale_gap(self) -> float | None:
        """Measure the error of going on over keys and values of older weights."""

    def drop_cache(self) -> None:
        """Forget all keys and values."""

    def free(self) -> None:
        """Give up weights and cache until weights arrive."""

    def take_stats(self) -> EngineStats:
        """Return the counts since the last call, and reset them to zero."""
