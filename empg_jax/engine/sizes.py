"""The sizes of an engine: everything that decides which programs it compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

from empg_jax.models.attention.ragged import BLOCK
from empg_jax.models.filtering import TokenFilter

# Most tokens of one prefill dispatch on a device, padding included; bounds its memory.
PREFILL_TOKENS = 8192
# Programs that default sizes may lead to: each takes seconds to minutes to compile for a large model.
MAX_PROGRAMS = 24


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
      slots: conversations held at one time.
      max_tokens: longest conversation, in tokens.
      max_response_tokens: longest response of a turn.
      stop_ids: sampling one of these ends a response (the token belongs to the response).
      burst: decode steps per dispatch at most.
      patience: responses that must have ended for a burst to end early; default a sixteenth of the slots.
      prefill_chunk: most tokens of a prompt that a step writes into the cache before its burst, but at least
        the largest of ``prefill_buckets``; 0: the whole prompt.
      prefill_buckets: lengths that prefill dispatches are padded to; default 16, 64, 256 up to
        ``prefill_chunk`` (1024 without one) and ``max_tokens``.
      row_buckets: row counts that prefill groups are padded to; default 1, ``slots``, ``slots`` / 8 … They
        are rounded up to multiples of ``shards``.
      cache_buckets: physical cache lengths; default 128, 256, 384, 512 … to ``max_tokens``. Default lists
        are thinned out where they would make more than `MAX_PROGRAMS` programs.
      ahead: dispatch a burst before the last one is read, where most responses outlast that one; default on
        accelerators only: a CPU has no idle time to fill, and loses 5 % where a new turn waits for a burst.
      has_filter: responses may filter the tokens that they sample (top-k, top-p, min-p). Without it the
        program has no trace of that.
      share_prefix: compute the keys and values of a prefix once, and copy them into other conversations.
      page_tokens: tokens of a page, where keys and values are in pages of a pool; 0: in one row per slot.
      kv_tokens: tokens that the pool holds; default those of ``slots`` longest conversations.
      shards: parts that the slots are split into over devices; see `split_over`.
    """

    slots: int
    max_tokens: int
    max_response_tokens: int
    stop_ids: tuple[int, ...]
    burst: int = 8
    patience: int = 0
    prefill_chunk: int = 1024
    prefill_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    cache_buckets: tuple[int, ...] = ()
    ahead: bool | None = None
    has_filter: bool = False
    share_prefix: bool = True
    page_tokens: int = 0
    kv_tokens: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        """Fill the bucket lists and refuse sizes that cannot work."""
        if not self.stop_ids:
            raise ValueError("stop_ids is empty: no response could ever end by itself")
        if not 0 < self.max_response_tokens < self.max_tokens:
            raise ValueError(
                f"max_response_tokens={self.max_response_tokens} must lie in "
                f"[1, max_tokens={self.max_tokens})"
            )
        self._check_pages()
        largest = self.prefill_chunk or 1024
        lengths = [
            n for n in {*(4**i for i in range(2, 16) if 4**i < largest), largest} if n < self.max_tokens
        ]
        rows = {1, *(n for n in (self.slots // 8**i for i in range(8)) if n >= 4)}
        capacities = [128, *(n for i in range(8, 31) for n in (2**i, 3 * 2 ** (i - 1)))]
        capacities = [n for n in capacities if n < self.max_tokens]

        def fill(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        lists = ("cache_buckets", "prefill_buckets", "row_buckets")
        chosen = [name for name in lists if not getattr(self, name)]
        fill("patience", self.patience or max(1, self.slots // 16))
        fill("prefill_buckets", tuple(sorted(self.prefill_buckets or lengths or [self.max_tokens])))
        counts = (-(-n // self.shards) * self.shards for n in (self.row_buckets or rows))
        fill("row_buckets", tuple(sorted({*counts, self.slots})))
        fill("cache_buckets", tuple(sorted({*(self.cache_buckets or capacities), self.longest_cache})))
        while self.num_programs > MAX_PROGRAMS and chosen:
            longest = max(chosen, key=lambda name: len(getattr(self, name)))
            fill(longest, getattr(self, longest)[::-1][::2][::-1])  # every second one, and the largest
            chosen = [name for name in chosen if len(getattr(self, name)) > 1]
        if self.prefill_chunk:  # a smaller chunk would be padded
            fill("prefill_chunk", max(self.prefill_chunk, self.prefill_buckets[-1]))

    def _check_pages(self) -> None:
        if not self.kv_tokens:
            return
        if not self.page_tokens:
            raise ValueError(f"kv_tokens={self.kv_tokens} has no effect without page_tokens")
        if self.kv_tokens < (longest := -(-self.max_tokens // self.page_tokens) * self.page_tokens):
            raise ValueError(
                f"kv_tokens={self.kv_tokens} does not hold one conversation of max_tokens={self.max_tokens} "
                f"in pages of page_tokens={self.page_tokens}: at least {longest}"
            )

    def split_over(self, data: int) -> EngineConfig:
        """Return the sizes of an engine whose slots are split over ``data`` devices, where that divides them.

        Each device has the prefill rows of its own slots. Slots with pages share one pool, and are not split.
        """
        return dataclasses.replace(self, shards=1 if self.page_tokens or self.slots % data else data)

    def part_of(self, slot: Any) -> Any:
        """Return the part of the slots that a slot belongs to; of an array of slots, an array."""
        return slot * self.shards // self.slots

    @property
    def longest_cache(self) -> int:
        """Physical length of the longest cache: whole blocks, without which accelerators have no kernels.

        A short one stays as it is: products over all of it cost little, and a CPU reads what is added.
        """
        return self.max_tokens if self.max_tokens < 4 * BLOCK else -(-self.max_tokens // BLOCK) * BLOCK

    @property
    def num_programs(self) -> int:
        """Number of programs that `Engine.warm_up` compiles."""
        growths = 0 if self.page_tokens else len(self.cache_buckets) - 1
        copies = self.copies_rows * (1 if self.page_tokens else len(self.cache_buckets))
        return (
            growths
            + copies
            + sum(
                1 + sum(len(self.prefill_rows(length)) for length in self.prefill_lengths(capacity))
                for capacity in self.cache_buckets
            )
        )

    @property
    def num_pages(self) -> int:
        """Pages of the pool."""
        every = self.slots * -(-self.max_tokens // self.page_tokens)
        return min(every, self.kv_tokens // self.page_tokens) if self.kv_tokens else every

    @property
    def copies_rows(self) -> bool:
        """Whether rows, or pages, are copied from slot to slot."""
        return self.share_prefix and self.slots > 1

    def room(self, held: int, num_new: int) -> int:
        """Return how many response tokens fit after ``num_new`` more prompt tokens (may be <= 0).

        Args:
          held: tokens of the conversation so far.
          num_new: tokens that the prompt adds.
        """
        return min(self.max_response_tokens, self.max_tokens - held - num_new)

    def check_filter(self, token_filter: TokenFilter, vocab_size: int) -> None:
        """Refuse a filter that the vocabulary or the programs of these sizes do not allow."""
        token_filter.check(vocab_size)
        if not (token_filter.is_off or self.has_filter):
            raise ValueError(f"{token_filter} needs an engine with EngineConfig.has_filter=True")

    def prefill_lengths(self, capacity: int) -> tuple[int, ...]:
        """Return the chunk lengths that are used with a cache of this physical length."""
        return tuple(n for n in self.prefill_buckets if n <= capacity) or self.prefill_buckets[:1]

    def prefill_rows(self, length: int) -> tuple[int, ...]:
        """Return the row counts that are used with chunks of this length."""
        most = PREFILL_TOKENS * self.shards
        return tuple(n for n in self.row_buckets if n * length <= most) or self.row_buckets[:1]
