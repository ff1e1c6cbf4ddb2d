"""The plan of a prefill: what is copied from other conversations, and how the rest goes into dispatches.

Attempts at one task have the same prompt, and all tasks of an environment the same instructions. Keys and
values of a prefix depend on its tokens and the weights alone, so that they are computed once, in the first
conversation that needs them, and copied into the others. Everything here is bookkeeping, without a device.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from empg_jax.engine.programs import Chunk
from empg_jax.engine.sizes import EngineConfig
from empg_jax.engine.slots import MIN_SHARED, Copy, Slots


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """One dispatch of ``size`` rows and ``length`` tokens; its spans are (slot, first token, tokens)."""

    size: int
    length: int
    spans: tuple[tuple[int, int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(count for _, _, count in self.spans)


@dataclasses.dataclass(frozen=True, slots=True)
class Wave:
    """Copies, and the dispatches that follow them. The copies of the next wave need both."""

    copies: tuple[Copy, ...]
    groups: tuple[Group, ...]


def plan_prefill(table: Slots, config: EngineConfig, capacity: int) -> list[Wave]:
    """Plan how every uncached token, except the newest, of conversations that await a response is cached.

    Of four ways, the one with the fewest tokens to compute, padding included, is taken: to copy nothing; to
    copy what is in the cache; to let conversations also wait for the prefill of others, where they then have
    all that they need; to let them wait for any part.

    Args:
      table: the conversations.
      config: the engine's sizes.
      capacity: physical length of the cache.

    Returns:
      Waves, to be dispatched in order; a function of the conversations alone.
    """
    missing = table.missing()
    spans = {int(slot): (int(table.kv_length[slot]), int(missing[slot])) for slot in np.flatnonzero(missing)}
    if not spans:
        return []
    plans = [[Wave((), make_groups(spans, config, capacity))]]
    matches = _find_matches(table, list(spans)) if config.share_prefix else {}
    if matches:
        for left in (-1, 0, capacity):
            served = _find_copies(table, list(spans), matches, left)
            if any(copy is not None for copies in served for copy in copies.values()):
                plans.append([_make_wave(copies, spans, config, capacity) for copies in served])
    return min(plans, key=_cost)


def _cost(waves: Sequence[Wave]) -> tuple[int, int]:
    """Count the tokens to compute: with padding, and without."""
    groups = [group for wave in waves for group in wave.groups]
    return sum(group.size * group.length for group in groups), sum(group.num_tokens for group in groups)


def _find_matches(table: Slots, waiting: Sequence[int]) -> dict[int, np.ndarray]:
    """Find for waiting slots how many first tokens, int[S], they have in common with each other slot.

    Rows are copied inside a part of the slots only, on their own device. Slots that nothing can be copied
    into are left out: this is most of the host's work for a prefill.
    """
    part = table.config.part_of(np.arange(table.config.slots))
    reach = np.maximum(table.shareable, 0)  # rows of each slot after all that waits is computed
    reach[waiting] = np.maximum(reach[waiting], table.num_tokens[waiting] - 1)
    least = table.kv_length + MIN_SHARED
    # A slot's rows of older weights stay, and are no prefix for others.
    may_copy = (table.shareable >= table.kv_length) & (table.num_tokens > least)
    matches = {}
    for slot in waiting:
        if may_copy[slot]:
            lengths = reach if part[-1] == 0 else np.where(part == part[slot], reach, 0)
            common = table.common(slot, lengths, int(least[slot]))
            if common.any():
                matches[slot] = common
    return matches


def _find_copies(
    table: Slots, waiting: Sequence[int], matches: Mapping[int, np.ndarray], left: int
) -> list[dict[int, Copy | None]]:
    """Find the donor of each waiting slot.

    Args:
      table: the conversations.
      waiting: slots that await a prefill.
      matches: what they have in common with others.
      left: tokens that may be left to compute where a slot waits for rows that are still to be computed.

    Returns:
      For each wave the slots that it serves, with what they copy.
    """
    ready = np.maximum(table.shareable, 0)  # rows of each slot that can be copied now
    later = ready.copy()  # and after its wave
    wave = np.zeros(table.config.slots, np.int64)
    served: list[dict[int, Copy | None]] = [{}]
    lengths, rows = table.kv_length.tolist(), (table.num_tokens - 1).tolist()
    shareable = table.shareable.tolist()
    for slot in waiting:
        copy, held, needed = None, lengths[slot], rows[slot]
        if slot in matches:
            common = np.minimum(matches[slot], later)
            if needed - common.max() > left:
                common = np.minimum(matches[slot], ready)
            donors = np.flatnonzero(common == common.max())
            after = np.where(common[donors] <= ready[donors], 0, wave[donors] + 1)
            donor, count = int(donors[np.argmin(after)]), int(common.max())
            if count >= held + MIN_SHARED:
                copy, wave[slot] = Copy(slot, donor, count, count - held), after.min()
        if shareable[slot] >= held:
            later[slot] = max(shareable[slot], needed)
        while len(served) <= wave[slot]:
            served.append({})
        served[int(wave[slot])][slot] = copy
    return served


def _make_wave(
    copies: Mapping[int, Copy | None],
    spans: Mapping[int, tuple[int, int]],
    config: EngineConfig,
    capacity: int,
) -> Wave:
    """Plan the dispatches for what the copies leave."""
    left = {}
    for slot, copy in copies.items():
        start, count = spans[slot]
        new = 0 if copy is None else copy.new
        left[slot] = start + new, count - new
    return Wave(
        tuple(copy for copy in copies.values() if copy is not None), make_groups(left, config, capacity)
    )


def make_groups(
    spans: Mapping[int, tuple[int, int]], config: EngineConfig, capacity: int
) -> tuple[Group, ...]:
    """Plan dispatches for some slots' missing tokens.

    Args:
      spans: by slot, the first missing token and how many there are.
      config: the engine's sizes.
      capacity: physical length of the cache.
    """
    starts = {slot: start for slot, (start, _) in spans.items()}
    missing = {slot: count for slot, (_, count) in spans.items()}
    lengths, made = config.prefill_lengths(capacity), []
    while any(missing.values()):
        fitted: dict[int, list[list[int]]] = {}
        for slot, count in missing.items():
            if count:
                parts = fitted.setdefault(fit(count, lengths), [[] for _ in range(config.shards)])
                parts[config.part_of(slot)].append(slot)
        for length, parts in fitted.items():
            sizes = tuple(rows // config.shards for rows in config.prefill_rows(length))
            while longest := max(map(len, parts)):
                size = fit(longest, sizes)
                slots = [slot for part in parts for slot in part[:size]]
                group = tuple((slot, starts[slot], min(length, missing[slot])) for slot in slots)
                made.append(Group(size * config.shards, length, group))
                for slot, _, count in group:
                    starts[slot] += count
                    missing[slot] -= count
                parts = [part[size:] for part in parts]
    return tuple(made)


def cut_waves(waves: Sequence[Wave], limit: int, config: EngineConfig, capacity: int) -> list[Wave]:
    """Return the first part of a plan, in which no conversation is computed further than ``limit`` tokens.

    It ends with the first wave that leaves a rest: the next ones copy what is still to be computed.

    Args:
      waves: the plan.
      limit: most tokens of a conversation; 0: the whole plan.
      config: the engine's sizes.
      capacity: physical length of the cache.
    """
    cut: list[Wave] = []
    for wave in waves:
        spans: dict[int, tuple[int, int]] = {}
        for slot, start, count in (span for group in wave.groups for span in group.spans):
            first, before = spans.get(slot, (start, 0))
            spans[slot] = first, before + count
        if not limit or all(count <= limit for _, count in spans.values()):
            cut.append(wave)
            continue
        spans = {slot: (start, min(count, limit)) for slot, (start, count) in spans.items()}
        return [*cut, Wave(wave.copies, make_groups(spans, config, capacity))]
    return cut


def make_chunk(group: Group, table: Slots) -> Chunk:
    """Build the input of a group's dispatch."""
    # All slots at once need no gather: row i is slot i. Other groups are padded with rows beyond them. Each
    # part of a group has the rows of one part of the slots.
    num_slots, shards = table.config.slots, table.config.shards
    is_whole = group.size == num_slots
    rows = np.arange(num_slots, dtype=np.int32) if is_whole else np.full(group.size, num_slots, np.int32)
    tokens = np.zeros((group.size, group.length), np.int32)
    spans = np.zeros((group.size, 2), np.int32)
    places = [part * group.size // shards for part in range(shards)]
    for slot, start, count in group.spans:
        part = table.config.part_of(slot)
        row = slot if is_whole else places[part]
        places[part] += 1
        rows[row] = slot
        tokens[row, :count] = table.tokens(slot, start, start + count)
        spans[row] = start, count
    return Chunk(rows, tokens, spans)


def make_pairs(copies: Sequence[Copy], config: EngineConfig) -> np.ndarray:
    """Build the input of `programs.copy_rows`: int32[slots, 3] of slot, donor and count in each part."""
    size = config.slots // config.shards
    pairs = np.zeros((config.slots, 3), np.int32)
    filled = [0] * config.shards
    for copy in copies:
        part = config.part_of(copy.slot)
        pairs[part * size + filled[part]] = copy.slot % size, copy.donor % size, copy.count
        filled[part] += 1
    return pairs


def fit(size: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket that holds ``size``, unless half of it or more would be padding.

    In that case, and where no bucket is large enough, return the next smaller bucket, if there is one: it is
    filled completely, and the next dispatch takes the rest. The buckets ascend.
    """
    place = bisect.bisect_left(buckets, size)
    if place == len(buckets):
        return buckets[-1]
    return buckets[place] if place == 0 or 2 * size > buckets[place] else buckets[place - 1]
