"""The seven question sets of the papers: in the forms their authors publish, as panels, in one evaluation."""

import gzip
import json
import re
import sys

import pytest
from typer.testing import CliRunner

from empg_envs.deepsearch.passages import read_corpus
from empg_envs.deepsearch.questions import make_panels, read_questions
from empg_envs.rows import DataError, read_rows
from empg_jax.cli import app
from empg_jax.config import load_config
from tests.test_eval_endpoint import faking, said

# A row of each set as its authors, or the hub's copy of it, have it; and the answers that count.
PUBLISHED = {
    "nq": ({"question": "who sings it", "answer": ["Ann", "Ann Lee"]}, ("Ann", "Ann Lee")),
    "triviaqa": (
        {
            "question": "Who?",
            "question_id": "tc_2",
            "answer": {"value": "Ann", "aliases": ["Ann", "A."], "normalized_aliases": ["ann"]},
        },
        ("Ann", "A."),
    ),
    "triviaqa_own": (
        {"Question": "Who?", "QuestionId": "tc_3", "Answer": {"Value": "Ann", "Aliases": ["A."]}},
        ("Ann", "A."),
    ),
    "popqa": ({"id": 4222362, "question": "What?", "possible_answers": '["poet", "bard"]'}, ("poet", "bard")),
    "hotpotqa": ({"_id": "5a8b", "question": "Were they?", "answer": "yes", "level": "hard"}, ("yes",)),
    "2wiki": ({"_id": "8813", "question": "When?", "answer": "1947", "type": "bridge"}, ("1947",)),
    "musique": (
        {
            "id": "2hop__1_2",
            "question": "Who?",
            "answer": "Ann",
            "answer_aliases": ["A."],
            "answerable": True,
        },
        ("Ann", "A."),
    ),
    "one_alias": (
        {"id": "2hop__3_4", "question": "Who?", "answer": "Ann", "answer_aliases": "Bob"},
        ("Ann", "Bob"),
    ),
    "one_alias_inside": ({"question": "Who?", "answer": {"value": "Ann", "aliases": "Bob"}}, ("Ann", "Bob")),
    "bamboogle": ({"Question": "When did it end?", "Answer": "28 March 1969"}, ("28 March 1969",)),
    "flashrag": ({"id": "test_0", "question": "Who?", "golden_answers": ["Ann"]}, ("Ann",)),
}


def write_parquet(path, rows) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("form", ["lines", "array", "gzip", "parquet", "wrapped"])
def test_rows_as_they_are_published(tmp_path, name, form) -> None:
    row, answers = PUBLISHED[name]
    path, text = tmp_path / f"{name}.file", json.dumps(row)
    if form == "parquet":
        write_parquet(path, [row])
    elif form == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        wrapped = json.dumps({"Data": [row], "Version": 1.0}, indent=1)
        path.write_text({"lines": f"{text}\n", "array": f"\n [{text}]", "wrapped": wrapped}[form])
    (question,) = read_questions(str(path))
    assert question.golden_answers == answers and question.group == name
    assert question.text == (row.get("question") or row["Question"])
    given = [str(row[key]) for key in ("id", "_id", "question_id", "QuestionId") if key in row]
    assert question.id == (given or ["1"])[0]


def test_the_merged_file_of_search_r1_has_its_sets_as_groups(tmp_path) -> None:
    sets = ("nq", "popqa", "bamboogle")
    rows = [
        {
            "id": f"test_{number}",
            "question": f"Question {number}?",
            "golden_answers": ["x"],
            "data_source": sets[number % 3],
            "reward_model": {"style": "rule", "ground_truth": {"target": ["x"]}},
            "metadata": None,
        }
        for number in range(7)
    ]
    panels = make_panels({"test": write_parquet(tmp_path / "test.parquet", rows)})
    assert panels.splits[0] == "test" and set(panels.splits[1:]) == {f"test:{name}" for name in sets}
    assert [panels.num_tasks(f"test:{name}") for name in sets] == [3, 2, 2]
    assert {panels.get("test:nq", index).group for index in range(3)} == {""}  # no groups inside a group
    assert {panels.get("test", index).group for index in range(7)} == set(sets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "Who?"}', "line 1: 'golden_answers' is missing, as are possible_answers, answer"),
        ('{"answer": "x"}', "line 1: 'question' is missing, as are Question"),
        ('{"question": "Who?", "answer": null}', "line 1: 'answer' is None; expected a list of texts"),
        ('{"question": "Who?", "possible_answers": "poet"}', "line 1: 'possible_answers' is 'poet'"),
        ('{"question": "Who?", "answer": {"x": 1}}', "line 1: 'answer' is {'x': 1}"),
        ('{"question": "Who?", "answer": "x", "answer_aliases": 7}', "line 1: 'answer_aliases' is 7"),
        ('{"question": "Who?", "golden_answers": ["x"]}', "line 1: 'id' is None"),
        ('{"question": "Who?", "answer": "x", "answerable": false}', "line 1: 'answerable' is false"),
        ('[{"question": "Who?", "answer": "x"}, 3]', "row 2: int; expected a JSON object"),
        ('[{"question": "Who?"', "not JSON"),
        ("PAR1 and nothing of it", "broken parquet file"),
    ],
)
def test_rows_that_are_none(tmp_path, text, message) -> None:
    if text.startswith("PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "set.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"set\.jsonl:? {re.escape(message)}"):
        read_questions(str(path))


def test_a_corpus_may_be_parquet_and_the_package_is_named(tmp_path, monkeypatch) -> None:
    rows = [{"id": "1", "contents": '"Oslo"\nA town.'}, {"id": "2", "contents": '"Rome"\nA town.'}]
    path = write_parquet(tmp_path / "corpus.parquet", rows)
    assert [passage.title for passage in read_corpus(path)] == ["Oslo", "Rome"]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        DataError, match=r"needs the package 'pyarrow': in the clone: pip install -e '\.\[par"
    ):
        list(read_rows(path))


SEVEN = ("test:nq", "test:hotpotqa", "test_ood:triviaqa", "test_ood:popqa", "test_ood:2wiki")
SEVEN += ("test_ood:musique", "test_ood:bamboogle")


def test_the_packaged_configuration_names_the_seven_sets() -> None:
    named = load_config("deepsearch_search_r1", []).env.options["questions"]
    assert set(SEVEN) == set(named) - {"train"}


def test_one_command_makes_a_table_of_the_sets(tmp_path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "1", "contents": "\\"Oslo\\"\\nA town."}\n')
    files = {}
    for number, name in enumerate(("train", *SEVEN)):
        row = {"Question": f"Question of {name}?", "Answer": "x"}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([row, {**row, "Question": f"Another of {name}?"}]))
        files[name] = str(path)
    options = {"style": "search_r1", "questions": files, "corpus": str(corpus), "retriever": "builtin"}

    def knows_only_nq(number, body):
        return said(f"<answer>{'x' if 'of test:nq' in body['messages'][-1]['content'] else 'y'}</answer>")

    with faking(knows_only_nq) as policy:
        command = ["eval", policy.url, "--config", "deepsearch_search_r1", "--split", "+".join(SEVEN)]
        command += ["env.options={}"]  # the next line's options replace the file's
        command += [f"env.options={json.dumps(options)}", "workers.num=1", "--out", str(tmp_path)]
        result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["eval_tasks"] == 14 and set(found["groups"]) == set(SEVEN)
    shares = {name: group["mean@k"]["1"]["value"] for name, group in found["groups"].items()}
    assert shares == {name: float(name == "test:nq") for name in SEVEN}
    table = (tmp_path / "eval.md").read_text()
    assert all(f"| {name} | 2 | " in table for name in SEVEN)
