"""The simulated sampler: responses that share its throughput, and prompts that decoding waits for."""

from __future__ import annotations

import heapq
import math


class Sampler:
    """Responses in progress. It knows no clock: `work_left` and `work` count seconds of its own computing.

    All responses decode at one speed, which depends on their number only. So a response of ``n`` tokens ends
    when the tokens that each slot has decoded since the start, `_decoded`, have grown by ``n``.

    Args:
      decode_rate: tokens per second of all slots together.
      slot_rate: most tokens per second of one slot.
      prefill_rate: prompt tokens per second.

    Attributes:
      sampled: tokens of the responses that have ended.
      steps: tokens that a slot would have decoded so far, had it always been busy: decode steps.
    """

    def __init__(self, decode_rate: float, slot_rate: float, prefill_rate: float = math.inf) -> None:
        self._decode_rate, self._slot_rate, self._prefill_rate = decode_rate, slot_rate, prefill_rate
        self._ends: list[tuple[float, int, int]] = []  # (value of `_decoded` at the end, slot, tokens)
        self._decoded = 0.0
        self._prefill = 0.0  # seconds of prefill to be done first
        self._speed = slot_rate  # tokens per second of each slot in progress
        self.sampled = 0

    @property
    def is_busy(self) -> bool:
        """True while a response is in progress."""
        return bool(self._ends)

    @property
    def steps(self) -> float:
        """Decode steps so far."""
        return self._decoded

    def submit(self, slot: int, prompt: float, tokens: int) -> None:
        """Begin a response of ``tokens`` tokens, after a prompt of ``prompt`` new tokens."""
        self._prefill += prompt / self._prefill_rate
        heapq.heappush(self._ends, (self._decoded + tokens, slot, tokens))
        self._adapt()

    def cancel(self, slot: int) -> None:
        """Give up a slot's response, if it has one."""
        if any(end[1] == slot for end in self._ends):
            self._ends = [end for end in self._ends if end[1] != slot]
            heapq.heapify(self._ends)
            self._adapt()

    def work_left(self) -> float:
        """Return the seconds of computing until the next response ends."""
        return self._prefill + (self._ends[0][0] - self._decoded) / self._speed

    def work(self, seconds: float) -> None:
        """Compute for so long, at most until the next response ends."""
        prefill = min(self._prefill, seconds)
        self._prefill -= prefill
        self._decoded += (seconds - prefill) * self._speed

    def take_ended(self) -> int:
        """Return the slot of the response that ends now."""
        self._decoded, slot, tokens = heapq.heappop(self._ends)
        self._prefill = 0.0  # it was done before, but for rounding
        self.sampled += tokens
        self._adapt()
        return slot

    def _adapt(self) -> None:
        """Adapt the speed to the number of responses in progress."""
        self._speed = min(self._slot_rate, self._decode_rate / max(len(self._ends), 1))
