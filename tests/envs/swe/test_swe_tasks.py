"""Task rows, panels, sources, predictions."""

import hashlib
import json
from pathlib import Path

import pytest

from empg_envs import make_env
from empg_envs.rows import DataError
from empg_envs.swe import tasks
from empg_envs.swe.predictions import append_prediction, prediction, read_predictions, write_predictions
from empg_envs.swe.tasks import broken_tree, load_panels, parse_row
from empg_envs.swe.tree import File, pack

ROW = {
    "instance_id": "astropy__astropy-12907",
    "repo": "astropy/astropy",
    "base_commit": "d16bfe05",
    "problem_statement": "p",
    "patch": "",
    "test_patch": "",
    "FAIL_TO_PASS": '["a::b"]',
    "PASS_TO_PASS": ["c"],
    "version": "4.3",
}


def test_rows_of_the_hub() -> None:
    task = parse_row(ROW)
    assert task.fail_to_pass == ("a::b",) and task.pass_to_pass == ("c",)
    assert task.image == "docker.io/swebench/sweb.eval.x86_64.astropy_1776_astropy-12907:latest"
    assert not task.has_tree and task.test_files == {"a", "c"}
    assert parse_row({**ROW, "version": "5"}).content_hash != task.content_hash


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instance_id": None}, "'instance_id'"),
        ({"FAIL_TO_PASS": "a::b"}, "FAIL_TO_PASS is neither"),
        ({"FAIL_TO_PASS": [1]}, "FAIL_TO_PASS is not a list of test names"),
        ({"PASS_TO_PASS": None}, "'PASS_TO_PASS'"),
        ({"runner": "nose"}, "unknown runner 'nose'"),
    ],
)
def test_bad_rows_are_named(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_row({**ROW, **change})


def test_embedded_panels() -> None:
    panels = load_panels("tiny")
    assert list(panels) == ["train", "valid", "test"] and sum(map(len, panels.values())) == 120
    for task in (task for panel in panels.values() for task in panel):
        assert task.has_tree and task.fail_to_pass and task.patch
        assert len(broken_tree(task)) == 2  # which also checks the repository's hash
    assert {task.repo for task in panels["train"]} == {"grid", "ledger", "rota", "spans", "units", "words"}


def test_a_value_of_null_is_none_at_all(tmp_path: Path) -> None:
    """Parquet gives None for a column that only other rows have."""
    path = tmp_path / "t.jsonl"
    empty = dict.fromkeys(["patch", "test_patch", "bug_patch", "runner", "test_path", "version", "image"])
    path.write_text(json.dumps({**ROW, **empty}))
    task = load_panels({"test": str(path)})["test"][0]
    assert (task.patch, task.test_patch, task.bug_patch, task.version) == ("",) * 4
    assert (task.runner, task.test_path) == ("pytest", ".") and task.image == parse_row(ROW).image


def test_files_split_by_field_or_hash(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{**ROW, "instance_id": f"i{number}"} for number in range(60)] + [{**ROW, "split": "extra"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    panels = load_panels(str(path))
    assert list(panels) == ["train", "valid", "test", "extra"] and len(panels["extra"]) == 1
    assert [len(panel) for panel in load_panels({"b": str(path)}).values()] == [61]
    with pytest.raises(DataError, match="'i0' occurs twice"):
        load_panels({"a": str(path), "b": str(path)})
    path.write_text(json.dumps(ROW) + "\nnope")
    with pytest.raises(DataError, match=r"t\.jsonl line 2: not JSON"):
        load_panels({"a": str(path)})
    with pytest.raises(DataError, match=r"no file .*missing"):
        load_panels(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps([ROW, 7]).encode(), r"t\.json row 2: int; expected a JSON object"),
        (json.dumps([ROW]).encode()[:-5], r"t\.json: not JSON: "),
        (b"\xff\xfe\x00", r"t\.json line 1: not JSON: 'utf"),
        (
            json.dumps({**ROW, "FAIL_TO_PASS": []}).encode(),
            r"t\.json line 1: task .*FAIL_TO_PASS names no test, .* never be resolved",
        ),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}".encode(), r"t\.json line 2: task .* occurs twice"),
        (json.dumps({**ROW, "repo": None}).encode(), r"t\.json line 1: .* no value in field 'repo'"),
    ],
)
def test_files_that_hold_no_tasks_are_told(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        make_env("swe", tasks=str(path))


def test_sources_are_found_by_hash_and_checked(tmp_path: Path) -> None:
    data = pack({"m.py": File(b"x\n")})
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(DataError, match="fetch it"):
        tasks.load_base(f"sdist:{digest}", str(tmp_path))
    (tmp_path / f"{digest}.tar.gz").write_bytes(data)
    assert tasks.load_base(f"sdist:{digest}", str(tmp_path)) == {"m.py": File(b"x\n")}
    (tmp_path / f"{'0' * 64}.tar.gz").write_bytes(data)
    with pytest.raises(DataError, match="SHA-256"):
        tasks.load_base(f"sdist:{'0' * 64}", str(tmp_path))
    with pytest.raises(DataError, match="no embedded repository"):
        tasks.load_base("embedded:../../swe")
    with pytest.raises(DataError, match="not the one"):
        tasks.load_base("embedded:spans@0")
    with pytest.raises(DataError, match="container image"):
        tasks.load_base("d16bfe05")


def test_predictions_go_out_and_come_in(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [prediction("a", "m", "one")])
    append_prediction(path, prediction("b", "m", "two\n"))
    append_prediction(path, prediction("a", "m", "three"))
    assert [set(json.loads(line)) for line in path.read_text().splitlines()] == [
        {"instance_id", "model_name_or_path", "model_patch"}
    ] * 3
    assert read_predictions(path) == {"a": "three", "b": "two\n"}
    for text in (
        '[{"instance_id": "a", "model_patch": null}]',
        '{"a": {"model_name_or_path": "m", "model_patch": ""}}',
    ):
        path.write_text(text)
        assert read_predictions(path) == {"a": ""}
    for content, says in (
        (b'{"instance_id": "a"}\n', "prediction 1 has no field 'model_patch'"),
        (b'{"a": "one"}', r"predictions\.jsonl: 'a' is 'one'; expected an object with 'model_patch'"),
        (b'{"instance_id": "\xff"}', r"predictions\.jsonl line 1: not JSON: 'utf-8' codec"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=says):
            read_predictions(path)
