"""Many callers, one search engine: concurrent queries are searched together, repeated ones remembered."""

from __future__ import annotations

import collections
import dataclasses
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from empg_envs.deepsearch.passages import Hit, Retriever

Found = tuple[int, list[Hit]]  # how many were asked for, and what was found


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    queries: list[str]
    topk: int
    future: Future[dict[str, Found]]


class Batcher:
    """Thread-safe searches through one thread that owns the engine.

    While a search runs, queries of other callers gather; the next search takes all of them (up to a limit)
    at once. Results are remembered, least recently used ones forgotten first.
    """

    def __init__(self, retriever: Retriever, *, cache_size: int = 65536, max_batch: int = 64) -> None:
        """Start the thread.

        Args:
          retriever: the engine; its better results do not depend on how many are asked for.
          cache_size: queries to remember; 0 remembers none.
          max_batch: queries in a search (one call with more of them is still one search).
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
        """What the engine finds for each query; raises what it raises.

        Raises:
          RuntimeError: after `close`.
        """
        if self._is_closed:
            raise RuntimeError("the search engine is closed")
        known = self._look_up(queries, topk)
        missing = [query for query in dict.fromkeys(queries) if query not in known]
        if missing:
            job = _Job(missing, topk, Future())
            self._jobs.put(job)
            known |= job.future.result()
        return [known[query][1][:topk] for query in queries]

    def close(self) -> None:
        """End the thread after the searches that are queued; later ones fail."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            if job is not None:
                job.future.set_exception(RuntimeError("the search engine is closed"))

    def _look_up(self, queries: Sequence[str], topk: int) -> dict[str, Found]:
        known: dict[str, Found] = {}
        with self._lock:
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
        except Exception as error:  # the callers' to handle; this thread goes on
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
