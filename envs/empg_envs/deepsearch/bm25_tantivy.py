"""BM25 by the ``tantivy`` package, a search engine in Rust."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tantivy

from empg_envs.cache import allow_mapping
from empg_envs.deepsearch.passages import Hit, Passage, index_words, words_of


class TantivyBm25:
    """BM25 with tantivy's own constants (k1 1.2, b 0.75) over terms of `index_words`.

    Only passages that share a term with the query are found.
    """

    _FIELD = "terms"

    def __init__(self, passages: Sequence[Passage], *, folder: Path | None = None) -> None:
        """Build the index in memory, or open the one in a folder (`build`)."""
        self._passages = passages
        self._schema = self._make_schema()
        if folder is None:
            index = tantivy.Index(self._schema)
            self._fill(index, passages)
        else:
            allow_mapping(folder)
            index = tantivy.Index(self._schema, path=str(folder))
        self._searcher = index.searcher()

    @classmethod
    def build(cls, passages: Iterable[Passage], folder: Path) -> None:
        """Write the index of these passages to a new folder."""
        folder.mkdir()
        cls._fill(tantivy.Index(cls._make_schema(), path=str(folder)), passages)

    @classmethod
    def _make_schema(cls) -> tantivy.Schema:
        builder = tantivy.SchemaBuilder()
        # The indexed text consists of analyzed terms, separated by blanks.
        builder.add_text_field(cls._FIELD, tokenizer_name="whitespace")
        builder.add_unsigned_field("number", stored=True)
        return builder.build()

    @classmethod
    def _fill(cls, index: tantivy.Index, passages: Iterable[Passage]) -> None:
        writer = index.writer(num_threads=1)
        for number, passage in enumerate(passages):
            writer.add_document(
                tantivy.Document(**{cls._FIELD: [" ".join(index_words(passage))], "number": number})
            )
        writer.commit()
        writer.wait_merging_threads()
        index.reload()

    def search(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Return the best passages for each query; see `Retriever`."""
        return [self._search(query, topk) for query in queries]

    def close(self) -> None:
        """Do nothing: the index is only memory."""

    def _search(self, query: str, topk: int) -> list[Hit]:
        terms = words_of(query)
        if not terms:
            return []
        # Build the query term by term, so that no text is taken for tantivy's query language.
        parts = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self._schema, self._FIELD, term))
            for term in terms
        ]
        found = self._searcher.search(tantivy.Query.boolean_query(parts), limit=topk, count=False).hits
        numbers = [int(self._searcher.doc(address)["number"][0]) for _, address in found]
        return [
            Hit(self._passages[number], float(score))
            for number, (score, _) in zip(numbers, found, strict=True)
        ]
