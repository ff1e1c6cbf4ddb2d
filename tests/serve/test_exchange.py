"""The border between the event loop and the engine's thread, without an engine."""

import asyncio
import threading

from empg_jax.serve.driver import Update
from empg_jax.serve.exchange import Exchange


class FakeDriver:
    def __init__(self):
        self.submitted, self.wakes = [], []

    def submit(self, jobs, *, wakes):
        assert not wakes
        self.submitted += jobs

    def wake(self):
        self.wakes.append(len(self.submitted))


def test_requests_at_hand_wake_the_engine_once():
    driver = FakeDriver()

    async def main():
        exchange = Exchange(driver)

        async def ask(name):
            exchange.submit([name])

        await asyncio.gather(*map(ask, "abc"))
        assert driver.wakes == [3]
        await ask("d")
        await asyncio.sleep(0)
        assert driver.wakes == [3, 4]

    asyncio.run(main())


def test_news_cross_together_and_none_is_lost():
    crossings = []
    count = 500

    async def main():
        loop, exchange = asyncio.get_running_loop(), Exchange(FakeDriver())
        queues = [asyncio.Queue() for _ in range(4)]
        cross = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: crossings.append(call) or cross(*call)

        def tell():
            for number in range(count):
                for index, queue in enumerate(queues):
                    exchange.tell(loop, queue, index, Update(None, number))

        thread = threading.Thread(target=tell)
        thread.start()
        for index, queue in enumerate(queues):
            found = [await asyncio.wait_for(queue.get(), 60) for _ in range(count)]
            assert found == [(index, Update(None, number)) for number in range(count)]
        thread.join()
        assert len(crossings) <= count * len(queues)
        before = len(crossings)
        for _ in range(10):  # the loop is busy meanwhile: they share a crossing
            exchange.tell(loop, queues[0], 0, Update(None))
        assert len(crossings) == before + 1
        for _ in range(10):
            await asyncio.wait_for(queues[0].get(), 60)

    asyncio.run(main())


def test_a_closed_loop_is_no_error():
    loop = asyncio.new_event_loop()
    loop.close()
    Exchange(FakeDriver()).tell(loop, asyncio.Queue(), 0, Update(None))
