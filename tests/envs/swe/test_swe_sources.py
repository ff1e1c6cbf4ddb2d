"""Tasks in parquet files."""

import sys
from pathlib import Path
from typing import Any

import pytest

from empg_envs import make_env
from empg_envs.rows import DataError, read_rows
from empg_envs.swe.tasks import load_panels

pa = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra 'parquet'")

ROW = {
    "instance_id": "o__r-1",
    "repo": "o/r",
    "base_commit": "d16bfe05",
    "problem_statement": "p",
    "patch": "",
    "test_patch": "",
    "FAIL_TO_PASS": '["a::b"]',
    "PASS_TO_PASS": "[]",
    "hints_text": "not needed",
    "version": None,
}
OF_R2E = {
    "repo_name": "r",
    "docker_image": "r2e/r",
    "commit_hash": "c",
    "problem_statement": "p",
    "expected_output_json": '{"A.test_a": "PASSED"}',
    "parsed_commit_content": "large",
}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_rows_of_parquet_files(tmp_path: Path) -> None:
    rows = [{**ROW, "instance_id": f"o__r-{number}"} for number in range(150)]
    swe = write_parquet(tmp_path / "swe.parquet", rows)
    r2e = write_parquet(tmp_path / "r2e.parquet", [OF_R2E])
    panels = load_panels({"train": str(r2e), "test": str(swe)})
    assert [task.instance_id for task in panels["test"]] == [row["instance_id"] for row in rows]
    assert panels["test"][0].fail_to_pass == ("a::b",) and "hints_text" not in panels["test"][0].row
    task = panels["train"][0]
    assert task.image == "r2e/r" and task.expected and "parsed_commit_content" not in task.row
    env = make_env("swe", tasks={"test": str(swe)}, backend="docker")
    assert env.num_tasks("test") == 150


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(tmp_path / "t.parquet", [{"instance_id": "a", "text": "b"}])
    with pytest.raises(DataError, match=r"t\.parquet: no column 'repo'; its columns are instance_id, text"):
        load_panels(str(file))
    file = write_parquet(tmp_path / "t.parquet", [{**ROW, "repo": None}, ROW])
    with pytest.raises(DataError, match="'o__r-1' has no value in field 'repo'"):
        load_panels(str(file))
    file.write_bytes(b"text")
    with pytest.raises(DataError, match=r"t\.parquet: broken parquet file: "):
        load_panels(str(file))
    with pytest.raises(DataError, match=r"no file .*none\.parquet"):
        load_panels(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match="the form is hub:owner/name"):
        load_panels("hub:name")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs the package 'pyarrow': .* pip install -e '\.\[parquet\]'"):
        list(read_rows(file))
