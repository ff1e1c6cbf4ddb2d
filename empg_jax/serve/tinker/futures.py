"""Results that a client comes back for: each request has an id, and is done, failed or pending.

All of it lives on the event loop; other threads hand results over with ``call_soon_threadsafe``.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

from empg_jax.serve.wire import ApiError

MAX_DONE = 4096  # results that are kept for clients that have not asked yet
GRACE_SECONDS = 300.0  # that a result is kept after it was told, for a client that did not receive it


@dataclasses.dataclass(eq=False)
class Pending:
    """A request whose result is on its way.

    Attributes:
      id: what the client asks for.
      kind: the route, for example ``optim_step``.
      done: set when there is a result or an error.
      result: what was computed.
      error: why there is no result.
      give_up: stops the work, where that can be done.
    """

    id: str
    kind: str
    done: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    result: Any = None
    error: ApiError | None = None
    give_up: Callable[[], None] | None = None


class Futures:
    """All requests with a result to come, and the newest results.

    Args:
      keep: number of results that are kept.
      clock: tells the seconds.
    """

    def __init__(self, keep: int = MAX_DONE, clock: Callable[[], float] = time.monotonic) -> None:
        self._keep, self._clock = keep, clock
        self._all: dict[str, Pending] = {}
        self._done: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._told: collections.OrderedDict[str, float] = collections.OrderedDict()  # id -> when, first told

    def begin(self, request_id: str, kind: str) -> tuple[Pending, bool]:
        """Register a request, once: a client that sends it again gets the same one.

        Returns:
          ``(pending, is_new)``.

        Raises:
          ApiError: the id was used by another kind of request.
        """
        self._forget_told()
        known = self._all.get(request_id)
        if known is None:
            known = self._all[request_id] = Pending(request_id, kind)
            return known, True
        if known.kind != kind:
            raise ApiError(400, f"the number of {request_id} belongs to {known.kind}, not to {kind}")
        return known, False

    def finish(self, pending: Pending, result: Any) -> None:
        """Set a result."""
        pending.result = result
        self._close(pending)

    def fail(self, pending: Pending, error: ApiError) -> None:
        """Set an error."""
        pending.error = error
        self._close(pending)

    def drop(self, pending: Pending) -> None:
        """Forget a request that was refused after all, so that it may come again."""
        self._forget(pending.id)

    def find(self, request_id: str) -> Pending:
        """Look a request up.

        Raises:
          ApiError: there is no such request, or its result is no longer kept.
        """
        pending = self._all.get(request_id)
        if pending is None:
            # 410 tells the official client to send the request itself again.
            raise ApiError(410, f"request {request_id!r} is not known, or its result is no longer kept")
        return pending

    def note_told(self, pending: Pending) -> None:
        """Note that a result was told: it may be large, and is forgotten after `GRACE_SECONDS`."""
        if pending.id in self._done:
            self._told.setdefault(pending.id, self._clock())

    def _forget_told(self) -> None:
        before = self._clock() - GRACE_SECONDS
        while self._told and next(iter(self._told.values())) < before:
            self._forget(next(iter(self._told)))

    def _forget(self, request_id: str) -> None:
        self._told.pop(request_id, None)
        self._done.pop(request_id, None)
        self._all.pop(request_id, None)

    async def wait(self, pending: Pending, seconds: float) -> bool:
        """Wait for a result; return whether it is there."""
        try:
            await asyncio.wait_for(pending.done.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _close(self, pending: Pending) -> None:
        if pending.done.is_set():
            return
        pending.done.set()
        pending.give_up = None
        self._done[pending.id] = None
        while len(self._done) > self._keep:
            self._forget(next(iter(self._done)))


class Line:
    """The order of a model's requests: they are released by number, however they arrive.

    Args:
      patience: seconds that a request waits for a missing one before it.
      on_gap: called with the missing numbers when that time is over; the requests behind them have been
        failed.
    """

    def __init__(self, patience: float, on_gap: Callable[[range], None]) -> None:
        self._patience, self._on_gap = patience, on_gap
        self._next = 1
        self._waiting: dict[int, tuple[Callable[[], None], Callable[[ApiError], None]]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def arrive(self, number: int, release: Callable[[], None], fail: Callable[[ApiError], None]) -> None:
        """Take a request in; it is released when all before it have arrived.

        Args:
          number: its place, from 1.
          release: called in its turn.
          fail: called instead where an earlier request never arrived.

        Raises:
          ApiError: the number is below 1, or was passed over.
        """
        if number < self._next:
            raise ApiError(400, f"seq_id={number} comes too late: the next is {self._next}", param="seq_id")
        self._waiting[number] = release, fail
        while self._next in self._waiting:
            self._next += 1
            self._waiting.pop(self._next - 1)[0]()
            self._stop_timer()
        if self._waiting and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self._pass_over)

    def close(self, error: ApiError) -> None:
        """Fail what waits."""
        self._stop_timer()
        waiting, self._waiting = self._waiting, {}
        for _, fail in waiting.values():
            fail(error)

    def _pass_over(self) -> None:
        missing = range(self._next, min(self._waiting))
        names = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        waiting, self._waiting, self._timer = self._waiting, {}, None
        self._next = max(waiting) + 1
        for number, (_, fail) in sorted(waiting.items()):
            fail(
                ApiError(
                    400,
                    f"seq_id={number} waited {self._patience:g} s for seq_id {names}, which did not arrive; "
                    f"the next is {self._next}",
                    param="seq_id",
                )
            )
        self._on_gap(missing)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
