"""Success by group of tasks, and several held-out panels at once, from a configuration to every report."""

import csv
import json

import pytest
from typer.testing import CliRunner

from empg_envs import make_env
from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.metrics import group_success, read_metrics
from empg_jax.run.environment import eval_panels
from tests import runs
from tests.episodes import Episodes

GROUPS = {"examine", "pick", "clean"}  # of the tiny houses


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run that is evaluated on two panels, before, during and after training."""
    folder = tmp_path_factory.mktemp("groups")
    short = ["train.updates=2", "sft.updates=0", "eval.tasks=6", "eval.every=1", "log.transcripts=0"]
    return runs.train(folder / "run", *runs.HOUSE, *short, "env.eval_split=[valid, test]")


def call(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def mean(values, tasks):
    return sum(values[name] * count for name, count in tasks.items()) / sum(tasks.values())


@pytest.mark.slow
def test_a_line_of_metrics_says_the_success_of_every_group(run_dir):
    for line in read_metrics(run_dir / "metrics.jsonl"):
        groups = {name.removeprefix("success/"): v for name, v in line.items() if name.startswith("success/")}
        assert groups and groups.keys() <= GROUPS
        assert min(groups.values()) <= line["success_rate"] <= max(groups.values())


@pytest.mark.slow
def test_each_panel_is_evaluated_and_reported(run_dir):
    during = read_metrics(run_dir / "metrics.jsonl")[0]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval_tasks"] == 12 == len(summary["eval_wins_after"])
    for values, end in ((during, ""), (summary, "_before"), (summary, "_after")):
        panels = [values[f"eval_success/{panel}{end}"] for panel in ("valid", "test")]
        assert sum(panels) / 2 == pytest.approx(values[f"eval_success{end}"])
        for panel in ("valid", "test"):
            assert any(f"eval_success/{panel}/{group}{end}" in values for group in GROUPS)
    wins = summary["eval_wins_after"]  # the panels in the order of the configuration
    assert summary["eval_success/valid_after"] == pytest.approx(wins[:6].count("1") / 6)
    assert summary["eval_success/test_after"] == pytest.approx(wins[6:].count("1") / 6)


@pytest.mark.slow
def test_the_evaluation_has_a_row_for_every_panel_and_group(run_dir, tmp_path):
    said = json.loads(call("eval", run_dir, "--out", tmp_path))
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (said["split"], said["eval_tasks"]) == ("valid+test", 12)
    for name, found in said["groups"].items():
        assert found["mean@k"]["1"]["value"] == pytest.approx(summary[f"eval_success/{name}_after"])
    assert {"valid", "test"} < said["groups"].keys()
    table = (tmp_path / "eval.md").read_text()
    assert all(f"| {name} | " in table for name in said["groups"]) and "| valid | 6 | " in table
    one = json.loads(call("eval", run_dir, "--split", "valid", "--out", tmp_path))
    assert one["groups"].keys() <= GROUPS and one["eval_success"] == summary["eval_success/valid_after"]


@pytest.mark.slow
def test_the_comparison_of_runs_measures_groups(run_dir, tmp_path):
    call("report", run_dir, "--out", tmp_path)
    with (tmp_path / "report.csv").open() as file:
        means = {row["measure"]: row["mean"] for row in csv.DictReader(file)}
    summary = json.loads((run_dir / "summary.json").read_text())
    assert float(means["held-out success of test, end"]) == summary["eval_success/test_after"]
    assert any(f"success of {group}, end" in means for group in GROUPS)


@pytest.mark.parametrize("given", ["valid_seen+valid_unseen", "[valid_seen, valid_unseen]"])
def test_panels_are_written_with_a_plus_or_as_a_list(given):
    config = load_config("alfworld_transcript", [f"env.eval_split={given}"])
    assert config.env.eval_split == "valid_seen+valid_unseen"
    assert eval_panels(config) == ("valid_seen", "valid_unseen")


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("household", {"pick", "examine", "clean", "heat", "cool", "pick_two"}),
        ("alfworld", {"pick", "examine", "clean", "heat", "cool", "pick_two"}),
        ("deepsearch", {"1-hop", "2-hop"}),
        ("webshop", {"tiny"}),
    ],
)
def test_environments_name_the_group_of_a_task(name, groups):
    env = make_env(name)
    seen = {env.reset(split="train", index=index)[1]["group"] for index in range(12)}
    assert seen and seen <= groups
    env.close()


def test_departments_of_a_shop_are_its_groups():
    env = make_env("webshop", level="standard")
    seen = {env.reset(split="train", index=index)[1]["group"] for index in range(40)}
    assert len(seen) > 2 and all(name and "\u203a" not in name for name in seen)


def test_shares_by_hand():
    made = [("valid", "pick", True), ("valid", "pick", False), ("valid", "heat", True)]
    episodes = Episodes()

    def make(split, group, won):
        return episodes.transcript([(1, 1)], split=split, group=group, is_success=won)

    one = [make(*each) for each in made]
    assert group_success("success", one) == {"success/pick": 0.5, "success/heat": 1.0}
    two = [*one, make("test", "", False)]
    assert group_success("success", two) == {
        "success/test": 0.0,
        "success/valid": pytest.approx(2 / 3),
        "success/valid/heat": 1.0,
        "success/valid/pick": 0.5,
    }
    assert group_success("success", [make("test", "", True)]) == {}
