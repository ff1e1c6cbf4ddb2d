"""The thread that trains: one piece of work after the other, each with a result or an error."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from empg_jax.serve.wire import ApiError

CLOSE_SECONDS = 1.0  # granted to the work in progress at the end

logger = logging.getLogger(__name__)

Done = Callable[[Any, ApiError | None], None]


class Worker:
    """A thread and its queue. Use it as a context manager."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Done, asyncio.AbstractEventLoop] | None]
        self._queue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trainer", daemon=True)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_busy(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop after the work in progress; work that takes longer than `CLOSE_SECONDS` is left alone."""
        self.finish()
        self._thread.join(timeout=CLOSE_SECONDS)

    def finish(self) -> None:
        """Stop after all that was submitted, without waiting for it."""
        self._queue.put(None)

    def submit(self, work: Callable[[], Any], done: Done) -> None:
        """Do some work in its turn.

        Args:
          work: called on the thread.
          done: called on the event loop of the caller, with the result or the error.
        """
        self._queue.put((work, done, asyncio.get_running_loop()))

    async def run(self, work: Callable[[], Any]) -> Any:
        """Do some work in its turn, and wait for its result.

        Raises:
          ApiError: the work failed.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(result: Any, error: ApiError | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.submit(work, done)
        return await future

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, done, loop = item
            result, failure = None, None
            try:
                result = work()
            except ApiError as error:
                failure = error
            except BaseException as error:  # SystemExit, too: an environment may raise it, and others wait
                logger.exception("training failed")
                failure = ApiError(500, f"the server failed: {type(error).__name__}: {error}")
            # The loop is closed when the server stops before the work does.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(done, result, failure)
