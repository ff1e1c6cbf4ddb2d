"""Batching and caching of searches: many callers share one search engine."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from empg_envs.deepsearch.passages import Hit, Retriever

Found = tuple[int, list[Hit]]  # requested number of results, and the results


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    queries: list[str]
    topk: int
    future: Future[dict[str, Found]]


class Batcher:
    """A thread-safe front of a search engine; one thread owns the engine.

    While a search runs, the queries of other callers wait in a queue. The next search takes all of them (up
    to a limit) at once. A cache holds the results of the most recently used queries.
    """

    def __init__(self, retriever: Retriever, *, cache_size: int = 65536, max_batch: int = 64) -> None:
        """Start the thread.

        Args:
          retriever: the engine. Its best results must not depend on the requested number, because a cached
            result also serves requests for fewer passages.
          cache_size: number of cached queries; 0 turns the cache off.
          max_batch: number of queries in one search. A single call with more queries is still one search.
        """
        self._retriever, self._cache_size, self._max_batch = retriever, cache_size, max_batch
        self._cache: collections.OrderedDict[str, Found] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._is_closed = False
        self.hits = self.misses = 0
        self._thread = threading.Thread(target=self._work, name="search", daemon=True)
        self._thread.start()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the engine's results for each query. Exceptions of the engine are raised here.

        Raises:
          RuntimeError: the batcher is closed.
        """
        with self._lock:  # nothing is queued behind the end
            if self._is_closed:
                raise RuntimeError("the search engine is closed")
            known = self._look_up(queries, topk)
            missing = [query for query in dict.fromkeys(queries) if query not in known]
            job = _Job(missing, topk, Future())
            if missing:
                self._jobs.put(job)
        if missing:
            known |= job.future.result()
        return [known[query][1][:topk] for query in queries]

    def close(self) -> None:
        """Finish the queued searches and end the thread; later searches fail."""
        with self._lock:
            self._is_closed = True
            self._jobs.put(None)
        self._thread.join()

    def _look_up(self, queries: Sequence[str], topk: int) -> dict[str, Found]:
        """Return what the cache knows; the caller holds the lock."""
        known: dict[str, Found] = {}
        for query in queries:
            found = self._cache.get(query)
            if found is not None and found[0] >= topk:
                self._cache.move_to_end(query)
                known[query] = found
        self.hits += sum(query in known for query in queries)
        self.misses += sum(query not in known for query in queries)
        return known

    def _work(self) -> None:
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            while jobs[-1] is not None and sum(len(job.queries) for job in jobs if job) < self._max_batch:
                try:
                    jobs.append(self._jobs.get_nowait())
                except queue.Empty:
                    break
            is_open = jobs[-1] is not None
            self._serve([job for job in jobs if job is not None])

    def _serve(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        queries = list(dict.fromkeys(query for job in jobs for query in job.queries))
        topk = max(job.topk for job in jobs)
        try:
            results = self._retriever.search(queries, topk)
            found = {query: (topk, hits) for query, hits in zip(queries, results, strict=True)}
        except Exception as error:  # passed on to the callers; this thread continues
            for job in jobs:
                job.future.set_exception(error)
            return
        with self._lock:
            for query, result in found.items() if self._cache_size else ():
                self._cache[query] = result
                self._cache.move_to_end(query)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        for job in jobs:
            job.future.set_result({query: found[query] for query in job.queries})
