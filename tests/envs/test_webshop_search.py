"""The search engine: stems, words, scores and ranks are Lucene's."""

import gzip
import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_envs.webshop.analyzer import MAX_TOKEN, analyze, tokenize
from empg_envs.webshop.bm25 import K1, MAX_QUERY_TERMS, B, Index, IndexBuilder, length_to_byte
from empg_envs.webshop.bm25 import _byte_to_length as byte_to_length
from empg_envs.webshop.porter import stem
from empg_envs.webshop.schema import read_product
from tests.shared import find_shared


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        # The examples of Porter's paper, step by step.
        *(("caresses", "caress"), ("ponies", "poni"), ("caress", "caress"), ("cats", "cat")),
        *(("feed", "feed"), ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled")),
        *(("motoring", "motor"), ("sing", "sing"), ("conflated", "conflat"), ("troubled", "troubl")),
        *(("hopping", "hop"), ("falling", "fall"), ("hissing", "hiss"), ("filing", "file")),
        *(("happy", "happi"), ("sky", "sky"), ("relational", "relat"), ("rational", "ration")),
        *(("digitizer", "digit"), ("conformabli", "conform"), ("vietnamization", "vietnam")),
        *(("formaliti", "formal"), ("sensibiliti", "sensibl"), ("triplicate", "triplic")),
        *(("hopefulness", "hope"), ("electriciti", "electr"), ("allowance", "allow")),
        *(("adoption", "adopt"), ("replacement", "replac"), ("bowdlerize", "bowdler")),
        *(
            ("probate", "probat"),
            ("rate", "rate"),
            ("cease", "ceas"),
            ("controll", "control"),
            ("roll", "roll"),
        ),
        *(("generalizations", "gener"), ("oscillators", "oscil"), ("syzygy", "syzygi"), ("yyy", "yyi")),
        *(("possibly", "possibl"), ("archaeology", "archaeolog")),  # the two departures
        *(("as", "as"), ("is", "is"), ("", "")),  # Lucene leaves words of two letters alone
    ],
)
def test_stems(word: str, expected: str) -> None:
    assert stem(word) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Men's T-Shirts, the RED ones", ["men", "t", "shirt", "red", "on"]),
        (
            "description:solid 3.5mm 1,000 f2.7 5'2 v.1",
            ["description:solid", "3.5mm", "1,000", "f2.7", "5'2", "v", "1"],
        ),
        ("don\u2019t you're James\u2019 dogs'S", ["don\u2019t", "you'r", "jame", "dog"]),
        ("I ❤️ ★ and ♡! 🇫🇷 👨‍💼 ®", ["i", "❤️", "★", "♡", "🇫🇷", "👨‍💼", "®"]),
        ("中文 カタカナ ひら 한국어", ["中", "文", "カタカナ", "ひ", "ら", "한국어"]),
        ("snake_case __ _x 360º naïve e\u0301t", ["snake_cas", "_x", "360º", "naïv", "e\u0301t"]),
        ("a/b \u200b 10.5.\x00½", ["b", "10.5"]),
        ("", []),
    ],
)
def test_terms(text: str, expected: list[str]) -> None:
    assert analyze(text) == expected


def test_long_words_are_cut_as_lucene_cuts_them() -> None:
    assert [len(token) for token in tokenize("x" * (2 * MAX_TOKEN + 3))] == [MAX_TOKEN, MAX_TOKEN, 3]


@pytest.mark.parametrize(
    "unit", ["_", "a.", "_\u0301", "1,", "🌸\u200d", "\u200d", "[", "a'", "カ_", "\ud800"]
)
def test_time_is_linear_in_hostile_text(unit: str) -> None:
    """Any quadratic step would take hours here."""
    assert len(analyze(unit * 400_000)) <= 400_000


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_words_are_pieces_of_the_text_in_order(text: str) -> None:
    position = 0
    for token in tokenize(text):
        position = text.index(token, position) + len(token)


def test_lengths_in_one_byte() -> None:
    codes = [length_to_byte(length) for length in range(5000)]
    assert codes == sorted(codes) and codes[:40] == list(range(40))
    for length, code in enumerate(codes):
        assert byte_to_length(code) <= length < byte_to_length(code + 1)
    assert [length_to_byte(n) for n in (40, 41, 42, 1_000_000)] == [40, 40, 41, 24 + 17 * 8 + 7]


def make_index(texts: list[str]) -> Index:
    builder = IndexBuilder()
    for text in texts:
        builder.add(text)
    return Index(len(texts), dict(builder.finish()).get)


def plain_scores(texts: list[str], query: str) -> list[float]:
    """The formula in float64, term by term; lengths below 40 pass through the byte unchanged."""
    documents = [Counter(analyze(text)) for text in texts]
    mean = sum(sum(d.values()) for d in documents) / len(documents)
    scores = [0.0] * len(texts)
    for term, count in Counter(analyze(query)).items():
        holders = sum(term in d for d in documents)
        weight = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
        for number, d in enumerate(documents):
            length = sum(d.values())
            scores[number] += count * weight * d[term] / (d[term] + K1 * (1 - B + B * length / mean))
    return scores


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.sampled_from(["red", "blue", "shirt", "lamp", "lamps", "oak", "10"]), max_size=30),
        min_size=1,
        max_size=12,
    ),
    query=st.lists(st.sampled_from(["red", "blue", "shirts", "lamp", "oak", "10", "zinc"]), max_size=6),
)
def test_scores_are_the_formula(texts: list[list[str]], query: list[str]) -> None:
    joined = [" ".join(words) for words in texts]
    found = make_index(joined).search(" ".join(query), 50)
    expected = plain_scores(joined, " ".join(query)) if any(texts) else [0.0] * len(texts)
    assert {n for n, _ in found} == {n for n, score in enumerate(expected) if score > 0}
    for number, score in found:
        assert score == pytest.approx(expected[number], rel=1e-5)
    assert found == sorted(found, key=lambda pair: (-pair[1], pair[0]))


def test_ties_go_by_document_also_where_the_list_is_cut() -> None:
    index = make_index(["lamp"] * 30 + ["lamp lamp"])
    assert [n for n, _ in index.search("lamp", 4)] == [30, 0, 1, 2]
    assert index.search("", 4) == index.search("zinc of the", 4) == []


def test_only_the_first_terms_of_an_endless_query_count() -> None:
    index = make_index(["oak", "red"])
    filler = " ".join(f"w{n}" for n in range(MAX_QUERY_TERMS - 1))
    assert [n for n, _ in index.search(f"{filler} oak red", 4)] == [0]


@pytest.mark.shared_data
def test_terms_of_real_products_are_lucenes() -> None:
    texts = dict(zip(*official_texts(), strict=True))
    with gzip.open(find_shared("webshop") / "lucene_english_tokens_sample.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 300
    assert [row["asin"] for row in rows if analyze(texts[row["asin"]]) != row["tokens"]] == []


@pytest.mark.shared_data
def test_ranking_is_lucenes() -> None:
    """All 822 recorded lists, in order, with their scores to the recorded four decimals."""
    ids, texts = official_texts()
    index = make_index(texts)
    with gzip.open(find_shared("webshop") / "lucene_bm25_top50.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    differing = []
    for row in rows:
        found = index.search(row["query"], 50)
        if [ids[n] for n, _ in found] != [asin for asin, _ in row["hits"]]:
            differing.append(row["query"])
        np.testing.assert_allclose([s for _, s in found], [s for _, s in row["hits"]], atol=6e-5)
    assert differing == [] and len(rows) == 822


def official_texts() -> tuple[list[str], list[str]]:
    """Ids in their order, and what is indexed of each product."""
    with gzip.open(find_shared("webshop") / "items_shuffle_1000.json.gz") as file:
        products = sorted((read_product(row, None) for row in json.load(file)), key=lambda p: p.asin)
    return [p.asin for p in products], [p.search_text() for p in products]
