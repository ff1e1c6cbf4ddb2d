"""Two evaluations task by task: an exact test, and an interval that is never without width."""

import json

import pytest
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.report.pairing import compare, pair, render_comparison, sign_test


def write(folder, shares, *, attempts=1, groups=("",), begins=None, **about):
    """An evaluation's folder; `shares` are successes of each task, `begins` what each begins with."""
    folder.mkdir()
    turns = {} if begins is None else {"turns": [{"observation": begins}]}
    records = [
        {
            "split": "test",
            "task": task,
            "success": member < wins,
            "group": groups[task % len(groups)],
            **turns,
        }
        for task, wins in shares.items()
        for member in range(attempts)
    ]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "eval.json").write_text(json.dumps({"env": "household", **about}))
    return folder


def test_the_sign_test_is_the_binomial_one():
    assert sign_test(0, 0) == 1.0 and sign_test(3, 3) == 1.0
    assert sign_test(5, 0) == sign_test(0, 5) == 2 / 32
    assert sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)


def test_one_attempt_each_is_counted():
    found = pair([0] * 10 + [1] * 10, [1] * 8 + [0] * 2 + [1] * 8 + [0] * 2)
    assert (found["gained"], found["lost"], found["method"]) == (8, 2, "score")
    assert found["gain"] == pytest.approx(0.3) and found["p_value"] == sign_test(8, 2)
    low, high = found["interval"]
    assert low < 0 < 0.3 < high  # p is above 0.05, so the interval holds 0


def test_without_a_change_the_interval_has_width():
    found = pair([1] * 16, [1] * 16)
    assert found["gain"] == 0 and found["p_value"] == 1 and found["method"] == "score"
    assert found["interval"][1] == -found["interval"][0] == pytest.approx(0.1936, abs=1e-4)


def test_several_attempts_are_resampled_by_task():
    found = pair([0.25, 0.5, 0.0, 1.0] * 8, [0.5, 0.75, 0.25, 1.0] * 8)
    assert found["method"] == "bootstrap" and found["gained"] == 24 and found["lost"] == 0
    assert found["interval"][0] > 0.1 and found["p_value"] == 2 / 2**24


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([0.25, 0.5, 0.5], [0.5, 0.75, 0.75]),  # all by the same
        ([0.25, 0.5], [0.25, 0.5]),  # none
        ([0.25, 0.5, 0.5], [0.75, 0.75, 0.75]),  # few
        ([0.5] * 20, [0.75] * 5 + [0.5] * 15),  # few of many
    ],
)
def test_what_resampling_says_too_little_of_has_width(before, after):
    found = pair(before, after)
    low, high = found["interval"]
    assert found["method"] == "score" and found["p_value"] > 0.05
    assert low < 0 <= found["gain"] < high


def test_few_shares_have_wider_intervals_than_percentiles():
    """Of 8 tasks the plain percentiles reach from 0.125 to 0.234."""
    before, after = [0.25] * 8, [0.5, 0.5, 0.25, 0.5, 0.375, 0.5, 0.375, 0.5]
    low, high = pair(before, after)["interval"]
    assert low < 0.125 and high > 0.2344


def test_tasks_are_paired_by_panel_and_number(tmp_path):
    first = write(tmp_path / "a", {0: 0, 1: 1, 2: 0, 3: 1}, groups=("heat", "look|x"))
    second = write(tmp_path / "b", {3: 1, 2: 1, 1: 1, 9: 1}, groups=("heat", "look|x"))
    found = compare(first, second)
    assert (found["tasks"], found["unpaired"], found["gained"], found["lost"]) == (3, 2, 1, 0)
    assert {name: each["tasks"] for name, each in found["groups"].items()} == {"heat": 1, "look|x": 2}
    table = render_comparison(found)
    assert "| all tasks | 3 | 66.7% | 100.0% | +33.3 [" in table and "| look\\|x | 2 |" in table
    code = CliRunner().invoke(app, ["compare", str(first), str(second), "--markdown"])
    assert code.stdout == table


TINY, HARD = ({"env_options": {"level": level, "style": "terse"}} for level in ("tiny", "hard"))


@pytest.mark.parametrize("begins", [(None, None), ("in a hall", "in a cellar")])
def test_tasks_of_other_options_are_not_paired(tmp_path, begins):
    first, second = (
        write(tmp_path / name, {0: 0, 1: 1}, begins=text, **options)
        for name, text, options in zip("ab", begins, (TINY, HARD), strict=True)
    )
    result = CliRunner().invoke(app, ["compare", str(first), str(second)])
    assert result.exit_code == 2 and result.stdout == ""
    assert "are of different tasks: env.options.level is tiny and hard\n" in result.stderr


@pytest.mark.parametrize(
    ("options", "begins", "note"),
    [
        ((TINY, TINY), (None, None), ""),
        (
            (TINY, HARD),
            ("in a hall", "in a hall"),
            "env.options.level is tiny and hard, though all tasks begin",
        ),
        (({}, {}), ("in a hall", "in a hall"), ""),
        (({}, TINY), (None, None), "could not be checked: eval.json has no env_options"),
        (({}, TINY), ("in a hall", "in a cellar"), "note: 2 of 2 tasks begin with another"),
        ((TINY, TINY), ("in a hall", "in a cellar"), "note: 2 of 2 tasks begin with another observation"),
    ],
)
def test_what_speaks_against_equal_tasks_is_told(tmp_path, options, begins, note):
    first, second = (
        write(tmp_path / name, {0: 0, 1: 1}, begins=text, **about)
        for name, text, about in zip("ab", begins, options, strict=True)
    )
    result = CliRunner().invoke(app, ["compare", str(first), str(second)])
    assert result.exit_code == 0 and json.loads(result.stdout)["tasks"] == 2
    assert note in result.stderr if note else result.stderr == ""
    table = CliRunner().invoke(app, ["compare", str(first), str(second), "--markdown"]).stdout
    assert ("\n\nNote: " in table) == bool(note)


def test_what_cannot_be_paired_is_told(tmp_path):
    first = write(tmp_path / "a", {0: 0})
    for second, says in (
        (write(tmp_path / "b", {1: 0}), "no task in common"),
        (write(tmp_path / "c", {0: 0}, env="webshop"), "is of household"),
        (tmp_path / "nothing", "holds no evaluation: expected episodes.jsonl"),
    ):
        result = CliRunner().invoke(app, ["compare", str(first), str(second)])
        assert result.exit_code == 2 and says in result.stderr and result.stdout == ""
    told = b'{"split": "test", "task": 0, "success": "false"}\n'
    for damaged in (b"{}\n", b'{"split": "\xff"}\n', told):
        (first / "episodes.jsonl").write_bytes(damaged)
        result = CliRunner().invoke(app, ["compare", str(first), str(tmp_path / "b")])
        assert result.exit_code == 2 and "episodes.jsonl, line 1: no episode" in result.stderr
