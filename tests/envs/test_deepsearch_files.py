"""Deep Search's data: files, panels, and retrievers over a corpus."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import empg_envs
from empg_envs import make_env
from empg_envs.deepsearch.passages import (
    Passage,
    load_corpus,
    make_retriever,
    parse_contents,
    read_corpus,
    words_of,
)
from empg_envs.deepsearch.questions import make_panels, read_questions
from empg_envs.rows import DataError, find_file
from empg_jax.workers.pool import EnvPool
from tests.shared import find_shared

ROOT = Path(empg_envs.__file__).resolve().parents[2]
PASSAGES = [
    Passage("a", "Oslo", "Oslo is the capital of Norway."),
    Passage("b", "Rome", "Rome is the capital of Italy, a town of seven hills."),
    Passage("c", "São Paulo", "A town in Brazil."),
    Passage("d", "Nothing", ""),
]
LEXICAL = ("builtin", "bm25s", "tantivy")


def write(path: Path, rows: list, *, packed: bool = False) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    return str(path)


def question(number: int, text: str | None = None) -> dict:
    return {"id": f"q{number}", "question": text or f"Question number {number}?", "golden_answers": ["x"]}


@pytest.mark.parametrize("packed", [False, True])
def test_corpora_in_both_spellings(tmp_path, packed) -> None:
    rows = [
        {"id": "0", "contents": '"A "quoted" title"\nFirst line.\nSecond line.'},
        {"id": 1, "contents": "Bare title\ntext"},
        {"id": "2", "title": "T", "text": "t"},
        {"id": "3", "contents": "no second line"},
    ]
    passages = read_corpus(write(tmp_path / "corpus.bin", rows, packed=packed))
    assert passages == [
        Passage("0", 'A "quoted" title', "First line.\nSecond line."),
        Passage("1", "Bare title", "text"),
        Passage("2", "T", "t"),
        Passage("3", "no second line", ""),
    ]
    assert parse_contents("0", passages[0].contents) == passages[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: list; expected a JSON object"),
        ('{"contents": "x"}', "line 2: 'id' is None; expected text"),
        ('{"id": "0", "contents": "again"}', r"line 2: id '0' occurs before, in .* line 1"),
        ('{"id": "5", "contents": 3.5}', "line 2: 'contents' is 3.5; expected text"),
        ('{"id": "5", "title": "x"}', "line 2: 'text' is None"),
        ('{"id": true, "contents": "x"}', "line 2: 'id' is True"),
    ],
)
def test_wrong_corpus_lines_are_named(tmp_path, line, message) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "0", "contents": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"corpus\.jsonl {message}"):
        read_corpus(str(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**question(1), "golden_answers": []}, "'golden_answers' is"),
        ({**question(1), "golden_answers": [3]}, "'golden_answers' is"),
        ({**question(1), "golden_answers": ["x", " "]}, r"'golden_answers' is .* not blank"),
        ({**question(1), "question": "  "}, "'question' is '  '"),
        ({**question(1), "metadata": 3}, "'metadata' is 3"),
    ],
)
def test_wrong_question_lines_are_named(tmp_path, row, message) -> None:
    path = write(tmp_path / "questions.jsonl", [question(0), row])
    with pytest.raises(DataError, match=f"questions.jsonl line 2: {message}"):
        read_questions(path)


def test_empty_broken_and_missing_files(tmp_path) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    for read in (read_corpus, read_questions):
        with pytest.raises(DataError, match="expected one JSON object per line"):
            read(empty)
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b'{"id": "0", "contents": "x"}\n' * 900)[:-20])
    with pytest.raises(DataError, match=r"broken gzip file|occurs before"):
        read_corpus(str(broken))
    with pytest.raises(DataError, match=r"no file .*nowhere"):
        read_corpus(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="the form is hub:owner/name"):
        find_file("hub:owner")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80))
def test_any_bytes_are_a_corpus_or_an_error(tmp_path, data) -> None:
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(data)
    for read in (read_corpus, read_questions):
        with pytest.raises(DataError, match=r"bytes\.jsonl"):
            read(str(path))


def test_a_hub_file_is_asked_for_as_a_data_set(monkeypatch, tmp_path) -> None:
    import huggingface_hub

    asked = []

    def download(repo: str, **kwargs: object) -> str:
        asked.append((repo, kwargs))
        if kwargs["allow_patterns"] == ["gone.jsonl"]:
            raise OSError("404")
        (tmp_path / "nq").mkdir()
        write(tmp_path / "nq" / "test.jsonl", [question(0)])
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_questions("hub:owner/sets/nq/test.jsonl")[0].id == "q0"
    wanted = {"repo_type": "dataset", "revision": None, "allow_patterns": ["nq/test.jsonl"]}
    assert asked == [("owner/sets", wanted)]
    with pytest.raises(DataError, match=r"hub:owner/sets/gone\.jsonl: the hub did not give"):
        read_questions("hub:owner/sets/gone.jsonl")


def test_one_file_is_divided_by_hash(tmp_path) -> None:
    rows = [question(number) for number in range(500)]
    panels = make_panels(write(tmp_path / "a.jsonl", rows))
    sizes = [panels.num_tasks(split) for split in panels.splits]
    assert panels.splits == ["train", "valid", "test"] and sum(sizes) == 500
    assert 370 < sizes[0] < 430 and min(sizes) > 30
    backwards = make_panels(write(tmp_path / "b.jsonl", rows[::-1] + rows[:9]))
    assert [panels.panel_hash(split) for split in panels.splits] == [
        backwards.panel_hash(split) for split in backwards.splits
    ]
    fewer = make_panels(write(tmp_path / "d.jsonl", rows[1:]))
    changed = [split for split in panels.splits if panels.panel_hash(split) != fewer.panel_hash(split)]
    assert len(changed) == 1  # the panel that the missing question was in


def test_training_gives_way_to_held_out_panels(tmp_path) -> None:
    train = write(tmp_path / "train.jsonl", [question(0), question(1), question(2, "QUESTION  number 9?")])
    test = write(tmp_path / "test.jsonl", [question(9), question(9), question(1)])
    files = {"train": train, "test": test, "test:hotpot": [test], "test_ood": test}
    panels = make_panels(files)
    assert [panels.get("train", i).text for i in range(panels.num_tasks("train"))] == ["Question number 0?"]
    assert panels.num_tasks("test") == 4
    assert {panels.get("test", i).group for i in range(4)} == {"test", "hotpot"}
    assert panels.get("test_ood", 0).group == "test"  # the file's name
    assert make_panels({"test:hotpot": test}).get("test", 0).group == "hotpot"
    with pytest.raises(DataError, match="panel 'train' holds no question"):
        make_panels({"train": test, "test": test})


def test_held_out_panels_keep_the_same_words_with_other_answers_and_groups(tmp_path, caplog) -> None:
    rows = [
        {**question(n, "What is X?"), "golden_answers": [answer]} for n, answer in enumerate(["jazz", "rock"])
    ]
    both, one = write(tmp_path / "both.jsonl", rows), write(tmp_path / "one.jsonl", rows[:1])
    train = write(tmp_path / "train.jsonl", [*rows, question(7)])
    panels = make_panels({"train": train, "test:nq": both, "test:hotpotqa": one})
    sizes = {split: panels.num_tasks(split) for split in panels.splits}
    assert sizes == {"train": 1, "test": 3, "test:nq": 2, "test:hotpotqa": 1}
    answers = {panels.get("test:nq", index).golden_answers for index in range(2)}
    assert answers == {("jazz",), ("rock",)}
    assert "2 training questions are left out" in caplog.text


@pytest.mark.parametrize("name", LEXICAL)
def test_lexical_retrievers(name) -> None:
    if name != "builtin":
        pytest.importorskip(name)
    retriever = make_retriever(name, PASSAGES)
    operators = 'title:"x" AND (town OR -capital) ^2 [a TO b] *'
    queries = ["capital of Italy", "zebra", "the of", "sao PAULO", operators]
    capital, unknown, empty, accents, plain = retriever.search(queries, 3)
    assert [hit.passage.id for hit in capital] == ["b", "a"]
    assert capital[0].score > capital[1].score > 0
    assert unknown == [] == empty
    assert [hit.passage.id for hit in accents] == ["c"]
    assert {hit.passage.id for hit in plain} == {"a", "b", "c"}  # a query is words, no language
    assert [len(hits) for hits in retriever.search(["town", "town"], 1)] == [1, 1]
    assert retriever.search([], 3) == []
    retriever.close()


def test_the_two_bm25s_are_one() -> None:
    pytest.importorskip("bm25s")
    passages = [
        *PASSAGES,
        *(Passage(str(n), f"Town {n % 7}", "hills " * (n % 5) + "town") for n in range(40)),
    ]
    queries = ["town hills", "capital town 3", "seven hills Rome Rome", "town"]
    ours, theirs = (make_retriever(name, passages).search(queries, 10) for name in ("builtin", "bm25s"))
    for one, two in zip(ours, theirs, strict=True):
        assert [hit.passage.id for hit in one] == [hit.passage.id for hit in two]  # ties in corpus order
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in two], rel=1e-5)


def test_a_package_that_is_missing_is_named(monkeypatch) -> None:
    for module in (
        "bm25s",
        "tantivy",
        "empg_envs.deepsearch.bm25_numpy",
        "empg_envs.deepsearch.bm25_tantivy",
    ):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(
        ValueError,
        match=r"'bm25s' needs the package 'bm25s': in the clone: pip install -e '\.\[deepsearch\]'",
    ):
        make_retriever("bm25s", PASSAGES)


def test_bm25s_loads_no_jax() -> None:
    pytest.importorskip("bm25s")
    script = (
        "import sys; from empg_envs.deepsearch.passages import *\n"
        "found = make_retriever('bm25s', [Passage('0', 'Oslo', 'a town')]).search(['oslo'], 1)\n"
        "assert found[0][0].passage.id == '0'; print(sorted({'jax', 'empg_jax'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_analysis() -> None:
    assert words_of("The Bishop of Élmham's 997") == ["bishop", "elmham", "s", "997"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_server_that_is_down_costs_the_episode_not_the_policy(tmp_path) -> None:
    options = {
        "questions": {"train": write(tmp_path / "train.jsonl", [question(0)])},
        "retriever": "remote",
        "retriever_options": {"urls": ["http://127.0.0.1:9/retrieve"], "attempts": 1},
    }
    with EnvPool("deepsearch", options, num_workers=1) as pool:
        pool.reset(0, seed=0, split="train", index=0)
        (reply,) = pool.poll(None)
        assert reply.failure is None and reply.observation == "Question number 0?"
        pool.step(0, "<search>anything</search>")
        (reply,) = pool.poll(None)
    assert reply.failure is not None and reply.failure.reason == "env_error"
    assert "RetrieverError: 1 requests failed; http://127.0.0.1:9/retrieve" in reply.failure.detail


@pytest.fixture(scope="module")
def wiki() -> dict[str, str]:
    """The shared 2Wiki set."""
    files = {"corpus": "corpus_2wiki.jsonl.gz", "questions": "2wiki_aligned_dev.jsonl.gz"}
    return {name: str(find_shared("deepsearch", file)) for name, file in files.items()}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", LEXICAL)
def test_first_hop_on_2wiki(wiki, name) -> None:
    if name != "builtin":
        pytest.importorskip(name)
    questions = read_questions(wiki["questions"])
    retriever = make_retriever(name, load_corpus(wiki["corpus"]))
    found = retriever.search([question.text for question in questions], 3)
    first = both = 0
    for asked, hits in zip(questions, found, strict=True):
        titles = {hit.passage.title.lower() for hit in hits}
        wanted = asked.metadata["supporting_titles"]
        first += wanted[0] in titles
        both += all(title in titles for title in wanted)
    assert len(questions) == 433
    assert first / len(questions) >= 0.92
    assert both / len(questions) < 0.6  # the other hop needs a search of its own


@pytest.mark.shared_data
def test_an_episode_on_2wiki(wiki) -> None:
    pytest.importorskip("bm25s")
    env = make_env("deepsearch", **wiki, topk=3)
    assert sum(env.num_tasks(split) for split in env.list_splits()) == 433
    _, info = env.reset(split="test", index=0)
    observation = env.step(f"<search>{info['task']}</search>")[0]
    firsts = [passage.contents.partition("\n")[0] for passage in load_corpus(wiki["corpus"])]
    titles = re.findall(r"^(?:<information>)?Doc \d\(Title: (.*?)\) ", observation, re.M)
    assert len(titles) == 3 and all(title.startswith('"') and title in firsts for title in titles)
    golden = env.get_task("test", 0)["golden_answers"][0]
    assert env.step(f"<think>so</think><answer>{golden}</answer>")[1:3] == (1.0, True)
