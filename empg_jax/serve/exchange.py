"""The border between the event loop and the engine's thread, which whatever is ready crosses at once.

Each crossing wakes a thread. Requests that arrive together are therefore handed over together, which also
lets them share the engine's batch from the start, and so are all news of a burst.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib

from empg_jax.serve.driver import Driver, Job, Update

News = tuple[int, Update]


class Inbox:
    """News that wait for one reader; on the loop.

    Of each job only the newest are kept, because they hold all of the response: a slow reader costs no more
    memory than a quick one.
    """

    def __init__(self) -> None:
        self._newest: dict[int, Update] = {}
        self._has_news = asyncio.Event()
        self._is_left = False

    def put(self, index: int, update: Update) -> None:
        """Put in news of job ``index``."""
        self._newest[index] = update
        self._has_news.set()

    def leave(self) -> None:
        """Let the reader know that nobody waits for what it reads."""
        self._is_left = True
        self._has_news.set()

    async def get(self) -> News | None:
        """Wait for news and take them out; None after `leave`."""
        await self._has_news.wait()
        if self._is_left:
            return None
        index = next(iter(self._newest))
        update = self._newest.pop(index)
        if not self._newest:
            self._has_news.clear()
        return index, update


class Exchange:
    """The border of one engine's thread and one event loop.

    Args:
      driver: the engine's thread.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._is_waking = False
        self._is_called = False
        self._news: collections.deque[tuple[Inbox, News]] = collections.deque()

    def submit(self, jobs: list[Job]) -> None:
        """Hand over the jobs of one request; on the loop. The engine wakes when the loop has no more at hand.

        Raises:
          QueueFull: see `Driver.submit`.
          EngineFailed: see `Driver.submit`.
        """
        self._driver.submit(jobs, wakes=False)
        if not self._is_waking:
            self._is_waking = True
            asyncio.get_running_loop().call_soon(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        self._driver.wake()

    def tell(self, loop: asyncio.AbstractEventLoop, inbox: Inbox, index: int, update: Update) -> None:
        """Put news into an inbox of the loop; on the engine's thread."""
        self._news.append((inbox, (index, update)))
        # The order matters: whoever takes the news out resets this first.
        if not self._is_called:
            self._is_called = True
            # The loop is closed when the server stops before the engine does.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_called = False
        while self._news:
            inbox, news = self._news.popleft()
            inbox.put(*news)
