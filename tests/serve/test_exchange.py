"""The border between the event loop and the engine's thread, without an engine."""

import asyncio
import threading

from empg_jax.serve.driver import Update
from empg_jax.serve.exchange import Exchange, Inbox


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


def test_news_cross_together_and_the_newest_are_not_lost():
    crossings = []
    count = 500

    async def main():
        loop, exchange = asyncio.get_running_loop(), Exchange(FakeDriver())
        inboxes = [Inbox() for _ in range(4)]
        cross = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *call: crossings.append(call) or cross(*call)

        def tell():
            for number in range(count):
                for index, inbox in enumerate(inboxes):
                    exchange.tell(loop, inbox, index, Update(None, number, is_final=number == count - 1))

        thread = threading.Thread(target=tell)
        thread.start()
        for index, inbox in enumerate(inboxes):
            found = [await asyncio.wait_for(inbox.get(), 60)]
            while not found[-1][1].is_final:
                found.append(await asyncio.wait_for(inbox.get(), 60))
            numbers = [update.cached for _, update in found]
            assert {place for place, _ in found} == {index}
            assert numbers == sorted(set(numbers)) and numbers[-1] == count - 1
        thread.join()
        assert len(crossings) <= count * len(inboxes)
        before = len(crossings)
        for _ in range(10):  # the loop is busy meanwhile: they share a crossing
            exchange.tell(loop, inboxes[0], 0, Update(None))
        assert len(crossings) == before + 1
        await asyncio.wait_for(inboxes[0].get(), 60)

    asyncio.run(main())


def test_a_closed_loop_is_no_error():
    loop = asyncio.new_event_loop()
    loop.close()
    Exchange(FakeDriver()).tell(loop, Inbox(), 0, Update(None))


def test_a_slow_reader_finds_the_newest_of_each_job_and_learns_when_it_is_left():
    async def main():
        inbox = Inbox()
        for number in range(1000):
            inbox.put(number % 2, Update(None, number, is_final=number >= 998))
        assert [await inbox.get() for _ in range(2)] == [
            (0, Update(None, 998, is_final=True)),
            (1, Update(None, 999, is_final=True)),
        ]
        waiting = asyncio.ensure_future(inbox.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        inbox.leave()
        assert await asyncio.wait_for(waiting, 60) is None

    asyncio.run(main())
