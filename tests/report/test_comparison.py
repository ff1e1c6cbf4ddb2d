"""``empg-jax report``: arms, means, intervals and pairs of runs that were made by hand."""

import csv
import json

import pytest
import yaml
from typer.testing import CliRunner

from empg_jax.cli import app
from empg_jax.config import load_config
from empg_jax.report import comparison_page


def make_run(folder, *, seed, modulation="empg", success=(0.0, 1.0), held_out=None, updates=None, **metrics):
    folder.mkdir(parents=True)
    config = {"name": folder.name, "seed": seed, "run_dir": str(folder)}
    config["algorithm"] = {"name": "grpo", "modulation": modulation}
    config["train"] = {"updates": len(success) if updates is None else updates}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"update": n, "success_rate": value, **metrics} for n, value in enumerate(success, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {"updates": len(success)}
    if held_out is not None:
        summary |= dict(zip(("eval_success_before", "eval_success_after"), held_out, strict=True))
    if updates in (None, len(success)):  # it is finished
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(*arguments):
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(out):
    with (out / "report.csv").open() as file:
        return {(row["measure"], row["arm"], row["against"]): row for row in csv.DictReader(file)}


def test_lines_that_are_damaged_are_told_and_change_nothing_else(tmp_path):
    whole, damaged = (make_run(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b")))
    path = damaged / "metrics.jsonl"
    path.write_text(
        path.read_text()
        + '{"update": 2, "succ\n'
        + '{"update": 2, "entropy": "abc"}\n'
        + f'{{"update": 2, "episode_turns": 1{"0" * 400}}}\n'
    )
    result = report(whole, damaged, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert f"{path}: 1 damaged lines are skipped (3)" in result.stderr
    assert "damaged lines" in (tmp_path / "out" / "report.html").read_text()
    names = {arm for _, arm, _ in rows(tmp_path / "out")}
    assert names == {"grpo_empg"}  # one arm of two seeds, named with its modulation
    assert CliRunner().invoke(app, ["view", str(damaged)]).exit_code == 0


def test_two_arms_of_seeds_are_compared_in_pairs(tmp_path):
    ends = {"empg": (0.4, 0.6, 0.8), "none": (0.3, 0.6, 0.6)}
    made = [
        make_run(
            tmp_path / f"{arm}-{seed}",
            seed=seed,
            modulation=arm,
            success=(0.0, end),
            held_out=(0.2, end),
            seconds_rollout=2.0,
            entropy=None,
        )
        for arm, values in ends.items()
        for seed, end in enumerate(values)
    ]
    out = tmp_path / "out"
    result = report(*made, "--out", out)
    assert result.exit_code == 0 and result.stdout == f"{out}/report.html\n"
    found = rows(out)
    first, second = "modulation=empg", "modulation=none"
    end = found["held-out success, end", first, ""]
    assert (end["runs"], float(end["mean"]), float(end["iqm"])) == (
        "3",
        pytest.approx(0.6),
        pytest.approx(0.6),
    )
    assert (end["low"], end["high"]) == ("", "")  # six seeds are needed
    assert float(found["held-out success, area", second, ""]["mean"]) == pytest.approx((0.25 + 0.4 + 0.4) / 3)
    assert float(found["rollout, seconds", first, ""]["mean"]) == 2
    pair = found["success, end", second, first]
    assert (pair["runs"], float(pair["mean"])) == ("3", pytest.approx(-0.1)) and float(pair["p"]) == 0.5
    assert not any(measure.startswith(("entropy", "lag")) for measure, _, _ in found)  # never recorded
    page = (out / "report.html").read_text()
    assert "Paired differences" in page and "modulation=none - modulation=empg" in page
    assert "data:image/png;base64," in page and "http" not in page
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_has_only_begun_is_drawn_beside_a_long_one(tmp_path):
    """Curves of 200 updates are smoothed over 10, more than the lines that both have."""
    made = [
        make_run(tmp_path / f"run-{seed}", seed=seed, success=[0.5] * count)
        for seed, count in enumerate((200, 5))
    ]
    result = report(*made, "--out", tmp_path / "out")
    assert result.exit_code == 0 and (tmp_path / "out" / "report.html").exists()


def test_runs_that_were_cut_off_count_in_no_number(tmp_path):
    """All curves are the same; half the runs of one arm end at a third of it."""
    curve = [update / 180 for update in range(1, 181)]
    made = [
        make_run(
            tmp_path / f"{arm}-{seed}",
            seed=seed,
            modulation=arm,
            success=curve[:60] if arm == "empg" and seed >= 3 else curve,
            updates=180,
        )
        for arm in ("none", "empg")
        for seed in range(6)
    ]
    result = report(*made, "--out", tmp_path / "out")
    for seed in (3, 4, 5):
        assert f"empg-{seed} is not finished (60 of 180 updates)" in result.stderr
    assert result.stderr.count("\n") == 3
    found = rows(tmp_path / "out")
    assert found["success, end", "modulation=empg", ""]["runs"] == "3"
    for measure in ("success, area", "success, end"):
        pair = found[measure, "modulation=empg", "modulation=none"]
        assert (pair["runs"], float(pair["mean"])) == ("3", 0)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "empg-3 is not finished" in page and "180, 180, 180, 60 of 180, 60 of 180" in page


def test_the_longest_run_counts_only_if_it_is_finished(tmp_path):
    """It is the longest of all, and still short of its own updates."""
    done = make_run(tmp_path / "done", seed=0, modulation="none", success=[0.1, 0.2])
    cut = make_run(tmp_path / "cut", seed=0, success=[0.1, 0.2, 0.3], updates=9)
    result = report(done, cut, "--out", tmp_path / "out")
    assert "cut is not finished (3 of 9 updates): it is drawn, and left out" in result.stderr
    assert {arm for _, arm, _ in rows(tmp_path / "out")} == {"modulation=none, train.updates=2"}


def test_a_run_in_its_last_evaluation_is_not_finished(tmp_path):
    """All of its updates have lines; one run has no summary, the other that of its updates before."""
    made = [
        make_run(tmp_path / name, seed=seed, success=[0.1, 0.2], held_out=(0.1, 0.5))
        for seed, name in enumerate(("done", "evaluates", "went_on"))
    ]
    (made[1] / "summary.json").unlink()
    (made[2] / "summary.json").write_text('{"eval_success_after": 0.9, "updates": 1}')
    result = report(*made, "--out", tmp_path / "out")
    for run in made[1:]:
        told = f"{run} is not finished (2 updates, without the evaluation after them): it is drawn"
        assert told in result.stderr
    assert "done is not finished" not in result.stderr
    line = rows(tmp_path / "out")["held-out success, end", "grpo_empg", ""]
    assert (line["runs"], float(line["mean"])) == ("1", 0.5)


def test_runs_stopped_at_the_same_update_are_compared(tmp_path):
    made = [
        make_run(tmp_path / arm, seed=0, modulation=arm, success=[0.1, end], updates=9)
        for arm, end in (("none", 0.2), ("empg", 0.4))
    ]
    made.append(make_run(tmp_path / "behind", seed=1, modulation="empg", success=[0.9], updates=9))
    result = report(*made, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for arm, told in (
        ("none", "is not finished (2 of 9 updates): no run is, so it is compared"),
        ("empg", "is not finished (2 of 9 updates): no run is, so it is compared"),
        ("behind", "is not finished (1 of 9 updates): it is drawn, and left out of all numbers"),
    ):
        assert f"{arm} {told}" in result.stderr and f"{arm} {told}" in page
    assert rows(tmp_path / "out")["success, end", "modulation=empg", ""]["runs"] == "1"
    pair = rows(tmp_path / "out")["success, end", "modulation=empg", "modulation=none"]
    assert float(pair["mean"]) == pytest.approx(0.2)


def test_one_run_has_no_interval_and_foreign_seeds_no_pair(tmp_path):
    made = [make_run(tmp_path / "a", seed=0), make_run(tmp_path / "b<i>", seed=1, modulation="aem")]
    assert report(*made, "--out", tmp_path / "out").exit_code == 0
    line = rows(tmp_path / "out")["success, end", "modulation=empg", ""]
    assert (line["runs"], line["low"], line["high"]) == ("1", "", "")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No two arms share a seed" in page and "b&lt;i&gt;" in page


def test_runs_that_repeat_a_seed_are_no_seeds_more(tmp_path):
    """Three copies of each of two seeds make two pairs, whose p is 0.5, and one value each."""
    ends = {("a", 0): 0.2, ("a", 1): 0.4, ("b", 0): 0.5, ("b", 1): 0.9}
    made = [
        make_run(tmp_path / f"{arm}-{seed}-{copy}", seed=seed, modulation=arm, success=(0.0, end + copy / 10))
        for (arm, seed), end in ends.items()
        for copy in range(1 if arm == "a" else 3)
    ]
    report(*made, "--out", tmp_path / "out")
    found = rows(tmp_path / "out")
    line = found["success, end", "modulation=b", ""]
    assert (line["runs"], float(line["mean"])) == ("2", pytest.approx(0.8))
    pair = found["success, end", "modulation=b", "modulation=a"]
    assert (pair["runs"], float(pair["p"]), float(pair["mean"])) == ("2", 0.5, pytest.approx(0.5))


def test_six_seeds_have_an_interval(tmp_path):
    made = [make_run(tmp_path / str(seed), seed=seed, success=(0.0, seed / 10)) for seed in range(6)]
    assert report(*made, "--out", tmp_path / "out").exit_code == 0
    line = rows(tmp_path / "out")["success, end", "grpo_empg", ""]
    assert float(line["low"]) < 0.25 < float(line["high"])


def test_equal_settings_are_one_arm_named_after_the_algorithm(tmp_path):
    made = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    report(*made, "--out", tmp_path / "out")
    assert rows(tmp_path / "out")["success, area", "grpo_empg", ""]["runs"] == "3"


def test_an_algorithm_of_ones_own_is_named_by_its_entry_point(tmp_path):
    made = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    own = {"name": None, "entry_point": "mine:RECIPE", "modulation": "none"}
    for run in made:
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"algorithm": own}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    report(*made, "--out", tmp_path / "out")
    assert {arm for _, arm, _ in rows(tmp_path / "out")} == {"mine:RECIPE"}


def test_arms_of_whole_configurations_have_short_names(tmp_path):
    """Of the settings of EMPG only that is named in which the two arms with EMPG differ."""
    arms = (["algorithm.name=grpo"], [], ["algorithm.empg.k=2"], ["algorithm.name=grpo_aem"])
    made = []
    for number, overrides in enumerate(arms):
        made.append(make_run(tmp_path / str(number), seed=0))
        config = load_config("quickstart", [*overrides, "train.updates=2", "train.warmup_updates=0"])
        (made[-1] / "config.yaml").write_text(config.to_yaml())
    assert report(*made, "--out", tmp_path / "out").exit_code == 0
    names = {arm: None for _, arm, against in rows(tmp_path / "out") if not against}
    assert list(names) == [
        "modulation=none",
        "modulation=empg, empg.k=1.0",
        "modulation=empg, empg.k=2.0",
        "modulation=aem",
    ]


@pytest.mark.parametrize(
    ("lacking", "changed", "names"),
    [
        (["train.max_kl", "workers.ray_resources"], [], {"grpo_empg"}),
        ([], ["train.max_kl=7"], {"grpo_empg", "train.max_kl=7.0"}),
        (["train.max_kl"], ["train.max_kl=7"], {"grpo_empg", "train.max_kl=7.0"}),
        (["env.options.style"], [], {"env.options.style=terse", "grpo_empg"}),
    ],
)
def test_keys_of_another_version_of_the_program_make_no_arm(tmp_path, lacking, changed, names):
    """The first run's file lacks keys that came later, and has one that is gone."""
    made = []
    for seed, overrides in enumerate(([], changed)):
        made.append(make_run(tmp_path / str(seed), seed=seed))
        config = load_config("quickstart", [*overrides, "train.updates=2", "train.warmup_updates=0"])
        (made[-1] / "config.yaml").write_text(config.to_yaml())
    values = yaml.safe_load((made[0] / "config.yaml").read_text())
    values["train"]["gone"] = 1
    for path in lacking:
        *sections, key = path.split(".")
        section = values
        for name in sections:
            section = section[name]
        del section[key]
    (made[0] / "config.yaml").write_text(yaml.safe_dump(values))
    assert report(*made, "--out", tmp_path / "out").exit_code == 0
    assert {arm for _, arm, against in rows(tmp_path / "out") if not against} == names


def test_dollars_in_the_name_of_an_arm_are_no_mathematics(tmp_path):
    made = [make_run(tmp_path / str(n), seed=0, modulation=f"$HOME/{{{n} and $") for n in range(2)]
    assert report(*made, "--out", tmp_path / "out").exit_code == 0
    assert "modulation=$HOME/{1 and $" in (tmp_path / "out" / "report.html").read_text()


def test_a_report_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_page, "draw", lambda arms: pytest.fail("no picture"))
    with pytest.raises(pytest.fail.Exception):
        report(make_run(tmp_path / "run", seed=0), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path):
    good = make_run(tmp_path / "good", seed=0)
    empty = make_run(tmp_path / "empty", seed=0, success=())
    (tmp_path / "none").mkdir()
    for bad, message in (
        ("none", "is no run to compare"),
        ("missing", "No such file"),
        ("empty", "no line of metrics"),
    ):
        result = report(good, tmp_path / bad, "--out", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()
    (empty / "config.yaml").write_text("3")
    assert report(empty).exit_code == 2
    result = report(good, good / ".." / "good", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "is named twice" in result.stderr and not (tmp_path / "out").exists()
