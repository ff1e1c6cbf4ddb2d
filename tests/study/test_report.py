"""The report of made-up lines against values worked out by hand."""

import random
import re

import pytest
from study import main
from study_line import spent_at
from study_pictures import draw
from study_report import write_report
from study_results import compare_arms, gather

from tests.study import made_up

# The success on the way, by arm, for seeds 3, 4 and 5; the areas are 0.3, 0.4, 0.5 and 0.4, 0.6, 0.5.
CURVES = {
    "plain": ([0.2, 0.3, 0.4], [0.2, 0.4, 0.6], [0.3, 0.5, 0.7]),
    "aem": ([0.2, 0.4, 0.6], [0.2, 0.7, 0.8], [0.3, 0.5, 0.7]),
}


@pytest.fixture
def study(tmp_path):
    return made_up.make_study(tmp_path / "study")


@pytest.fixture
def lines(study):
    """On the shop every run of AEM has an area 0.1 above that of the plain one."""
    found = []
    for triple in study.triples():
        curve = CURVES[triple.arm][triple.seed - 3]
        if triple.task == "shop":
            curve = [0.3, 0.3] if triple.arm == "plain" else [0.3, 0.5]
        found.append(made_up.line(study, triple, curve))
    return found


@pytest.mark.parametrize(
    "option, name, told",
    [("--out", "no/x.md", "there is no folder"), ("--png", "no/x.png", "there"), ("--png", ".", "that is a")],
)
def test_a_file_that_cannot_be_written_is_told_before_the_report_is_made(
    study, tmp_path, monkeypatch, capsys, option, name, told
):
    monkeypatch.setattr("study_report.write_report", lambda *_: pytest.fail("the report was made"))
    assert main(["report", str(study.folder), option, str(tmp_path / name)]) == 2
    assert f"error: {option} {tmp_path / name}: {told}" in capsys.readouterr().err


PRIMARY = "Primary measure: paired differences"


def row(text, *cells):
    """The one row of a table that begins with these cells, as the rest of its cells."""
    start = "| " + " | ".join(cells) + " | "
    (found,) = [line for line in text.splitlines() if line.startswith(start)]
    return found.removeprefix(start).removesuffix(" |").split(" | ")


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_means_intervals_and_times(study, lines):
    text = section(write_report(study, lines), "Results by task and arm")
    plain = row(text, "house", "plain")
    assert plain == [
        "3",
        "40.0",
        "40.0",
        "23.3",
        "56.7",
        "20 (2 of 3)",
        "50",
        "100",
    ]
    assert row(text, "house", "aem")[5] == "20 (3 of 3)"
    assert row(text, "shop", "plain")[1:6] == [
        "30.0",
        "30.0",
        "30.0",
        "30.0",
        "not reached (0 of 3)",
    ]


def test_paired_differences(study, lines):
    """On the house 0.1, 0.2 and 0; on the shop 0.1 three times."""
    text = section(write_report(study, lines), PRIMARY)
    # Of 8 signs of 0.1, 0.2, 0 a sum of 0.3 has 2 + 2; all 6 signs of both tasks: 2 of 0.6, doubled by the 0.
    house, shop, pooled = (row(text, task, "aem - plain") for task in ("house", "shop", "all tasks"))
    assert house == ["3", "+10.0", "0.5000", "0.5000", "10.0", "-", "4"]
    assert shop == ["3", "+10.0", "0.2500", "0.5000", "0.0", "-", "4"]
    # sd: root of (0.01 + 0) / 2; detectable, of 4 degrees: (2.776 + 0.941) x root of (0.01 / 3 + 0) / 2.
    assert pooled == ["6", "+10.0", "0.0625", "0.0625", "7.1", "10.7", "4"]
    ends = section(write_report(study, lines), "Secondary measure: success at the end")
    assert row(ends, "house", "aem - plain")[1] == "+13.3"


@pytest.mark.parametrize(("count", "is_told"), [(6, False), (7, True)])
def test_what_holm_cannot_reach_is_not_called_detectable(tmp_path, count, is_told):
    """On two tasks apart p = 1 / 32 of six pairs becomes 1 / 16; pooled, twelve pairs are one comparison."""
    study = made_up.make_study(tmp_path / "study", seeds=range(count))
    lines = [
        made_up.line(study, each, [0.2, 0.3 + 0.01 * each.seed * (each.arm == "aem")])
        for each in study.triples()
    ]
    text = section(write_report(study, lines), PRIMARY)
    assert (row(text, "house", "aem - plain")[-2] != "-") == is_told
    assert row(text, "all tasks", "aem - plain")[-2] != "-"
    assert "| detectable after Holm |" in text


def test_the_registration_comes_first_and_verbatim(study, lines):
    text = write_report(study, lines)
    assert (
        text.index(study.registration) < text.index("## ") and f"```yaml\n{study.registration}\n```" in text
    )


def test_a_pair_with_different_starts_is_left_out(study, lines):
    (odd,) = [each for each in lines if (each["task"], each["arm"], each["seed"]) == ("house", "aem", 4)]
    odd["weights_before"] = "elsewhere"
    results = gather(study, lines)
    assert results.differences("house", "aem", "plain", "area") == pytest.approx([0.1, 0.0])
    text = write_report(study, lines)
    told = (
        "the pair aem, plain of house, seed 4, is left out: the weights before RL differ (elsewhere, start of"
    )
    assert told in section(text, "Left out")
    assert row(section(text, PRIMARY), "house", "aem - plain")[0] == "2"
    assert row(section(text, "Results by task and arm"), "house", "aem")[0] == "3"  # the run itself counts


def test_failed_and_missing_runs_are_told(study, lines):
    broken = lines[0] | {"status": "failed", "reason": "exit code 1: out of luck"}
    for key in ("curve", "area", "series", "commits"):
        del broken[key]
    text = write_report(study, [broken, *lines[1:-1], {**lines[1], "task": "former"}])
    assert "10 of 12 runs are finished, 1 failed, 1 are missing." in text
    assert "1 runs of other tasks, arms or seeds are left out." in text
    left = section(text, "Left out")
    assert "- house-plain-3 failed: exit code 1: out of luck" in left
    assert "seed 3, is left out: no finished run of plain" in left
    assert "- not run yet: shop-aem-5" in left
    # Made again, it counts, and nothing tells of the failure any more.
    assert "12 of 12 runs are finished, 0 failed" in write_report(study, [broken, *lines])


def test_a_study_without_runs_has_a_report(study, tmp_path):
    text = write_report(study, [])
    assert "0 of 12 runs are finished, 0 failed, 12 are missing." in text
    assert row(text, "house", "plain") == ["0", *["-"] * 7]
    draw(study, [], tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 10_000


def test_holm_is_over_the_comparisons_of_a_family(tmp_path):
    """One task and two comparisons, of which one is clear: its p-value doubles."""
    both = "\n  rloo: [algorithm.name=rloo]\nseeds: 0..7\nend_tasks: 256"
    study = made_up.make_study(
        tmp_path,
        seeds=range(8),
        replace={
            "  shop: {config: webshop_tiny, overrides: [train.updates=20]}\n": "",
            f"\nseeds: {list(range(8))}": both,
        },
    )
    heights = {
        "plain": lambda seed: 0.3,
        "aem": lambda seed: 0.4,
        "rloo": lambda seed: 0.2 + 0.2 * (seed % 2),
    }
    lines = [made_up.line(study, each, [heights[each.arm](each.seed)] * 2) for each in study.triples()]
    found = compare_arms(gather(study, lines), "area")
    assert [(each.task, each.arm) for each in found] == [("house", "aem"), ("house", "rloo")]
    assert [each.difference.p for each in found] == [2 / 2**8, 1]
    assert [each.adjusted for each in found] == [4 / 2**8, 1]


def find(lines, task, arm, seed):
    (found,) = [each for each in lines if (each["task"], each["arm"], each["seed"]) == (task, arm, seed)]
    return found


def test_a_comparison_without_runs_is_one_of_the_family(study, lines):
    """The arm that has not begun makes nothing more certain, and what is pooled is named."""
    text = section(write_report(study, [each for each in lines if each["task"] == "house"]), PRIMARY)
    assert row(text, "house", "aem - plain")[2:4] == ["0.5000", "1.0000"]  # of two on single tasks
    assert row(text, "pooled: house", "aem - plain")[2:4] == ["0.5000", "0.5000"]


def test_pairs_of_different_code_or_packages_are_left_out(study, lines):
    find(lines, "house", "aem", 4)["commits"] = ["b" * 40]
    find(lines, "shop", "plain", 3)["versions"] = {"python": "3.12.1", "jax": "0.10.2"}
    text = write_report(study, lines)
    assert text.count("is left out: they are of different commits or versions of packages") == 2
    find(lines, "house", "aem", 5)["changes"] = ["0123456789abcdef"]
    text = write_report(study, lines)
    assert "seed 5, is left out: they are of different code that is not committed" in text
    assert "aaaaaaaaa with changes |" in text
    find(lines, "house", "plain", 5)["changes"] = ["0123456789abcdef"]  # the same code counts
    text = write_report(study, lines)
    assert "not committed" not in text
    assert [row(section(text, PRIMARY), task, "aem - plain")[0] for task in ("house", "shop")] == ["2", "2"]


def test_where_seeds_are_whole_all_arms_tell_of_the_same_ones(tmp_path, lines):
    study = made_up.make_study(
        tmp_path / "whole", replace={"overrides: [eval": "whole_seeds: true\noverrides: [eval"}
    )
    text = write_report(study, [each for each in lines if each is not find(lines, "house", "aem", 5)])
    assert "11 of 12 runs are finished, 0 failed, 1 are missing." in text
    assert "- house-plain-5 is left out: not every arm has finished on house with seed 5" in text
    # Of seeds 3 and 4, plain has 0.3 and 0.4; on the shop all three count.
    rows = section(text, "Results by task and arm")
    assert row(rows, "house", "plain")[:2] == ["2", "35.0"] and row(rows, "shop", "plain")[0] == "3"


def test_what_happens_on_the_way(study, lines):
    for number, each in enumerate(lines):
        each["series"]["grad_norm"] = [0.2, 0.4, 0.8]
        each["series"]["entropy_drift_measured"] = [None, None, None]
        each["series"]["mixed_groups"] = [0.8, 0.5, 0.1 * (number % 2)]
    text = section(write_report(study, lines), "On the way")
    assert row(text, "house", "aem") == [
        "0.100 to 0.400",
        "0.80 to 0.10",
        "0.10 to 0.40",
        "0.233",
        "1.00",
        "-",
    ]


def test_the_same_lines_give_the_same_report_and_picture(study, lines, tmp_path):
    text = write_report(study, lines)
    draw(study, lines, tmp_path / "one.png")
    random.Random(0).shuffle(lines)
    assert write_report(study, lines) == text
    draw(study, lines, tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "other.png").read_bytes()
    assert not re.search(r"\bnan\b|None", text)


# ------------------------------------------------------------------------------------- at equal amounts


@pytest.fixture
def spending(study, lines):
    """AEM takes twice the steps and half the CPU seconds; seed 5 of the plain arm on the house took less."""
    for each in lines:
        updates, is_plain = [update for update, _ in each["curve"]], each["arm"] == "plain"
        scale = 0.5 if (each["task"], each["arm"], each["seed"]) == ("house", "plain", 5) else 1
        steps, seconds = (10 * scale, 4) if is_plain else (20, 2)
        each["spent"] = {
            "environment_steps": [steps * update for update in updates],
            "cpu_seconds": [seconds * update for update in updates],
        }
    return lines


def test_one_table_at_equal_steps_and_equal_seconds(study, spending):
    text = section(write_report(study, spending), "At equal environment steps and at equal CPU seconds")
    # House: seed 5 of the plain arm ends at 20 x 5 = 100 steps; AEM's runs end at 20 x 2 = 40 seconds.
    assert "- house: 100 environment steps; 40 CPU seconds" in text
    assert "- shop: 100 environment steps; 20 CPU seconds" in text
    # Steps. Plain: seeds 3 and 4 are read at update 10, seed 5 at 20; AEM's at update 5 each.
    # Areas 0.25, 0.3, 0.5 and 0.25, 0.325, 0.35, so that AEM is 0, 0.025 and -0.15 above.
    # Seconds. Plain at update 10: 0.25, 0.3, 0.4 (at 0.3, 0.4, 0.5); AEM at 20, the whole: 0.4, 0.6, 0.5.
    plain, aem = row(text, "house", "plain"), row(text, "house", "aem")
    assert plain == ["3", "35.0", "46.7", "", "", "3", "31.7", "40.0", "", "", "-"]
    assert [aem[1].split()[0], aem[2], aem[3].split()[0]] == ["30.8", "38.3", "-4.2"]
    assert [aem[6].split()[0], aem[7], aem[8].split()[0]] == ["50.0", "70.0", "+18.3"]
    # Of the 8 signs of 0.15, 0.3, 0.1 and of 0.1, 0.1, 0.1 two have a sum this large; Holm over both tasks.
    assert aem[9] == "0.5000"
    # The shop: over steps AEM is at 0.3 to 0.4, over seconds at 0.3 to 0.5; the arm with more comes first.
    shop = row(text, "shop", "aem")
    assert [shop[3].split()[0], shop[8].split()[0]] == ["+5.0", "+10.0"]
    assert text.index("| house | aem ") < text.index("| house | plain ")
    pooled = row(text, "all tasks", "aem - plain")
    assert [pooled[0], pooled[1].split()[0]] == ["6", "+0.4"]
    assert [pooled[3], pooled[4].split()[0]] == ["6", "+14.2"]


def test_the_primary_measure_is_the_registered_one(tmp_path, spending):
    """Over the steps AEM is behind on the house, over the seconds ahead."""
    for measure, found in (("environment_steps", "-4.2"), ("cpu_seconds", "+18.3"), ("updates", "+10.0")):
        study = made_up.make_study(
            tmp_path / measure, replace={"\nseeds: [3": f"\nmeasure: {measure}\nseeds: [3"}
        )
        text = section(write_report(study, spending), PRIMARY)
        assert row(text, "house", "aem - plain")[1].split()[0] == found
        assert ("over CPU seconds, as below," in text) == (measure == "cpu_seconds")
        none = section(write_report(study, []), PRIMARY)
        assert row(none, "house", "aem - plain")[:2] == ["0", "-"]


def test_runs_without_a_record_of_what_they_spent_are_named(study, spending):
    del spending[0]["spent"]  # of an older version
    spending[1]["spent"] = None  # a line of its metrics is missing
    text = section(write_report(study, spending), "At equal environment steps and at equal CPU seconds")
    assert "Without a record of what they spent: house-plain-3, house-aem-3." in text
    assert row(text, "house", "plain")[0] == "2"
    for each in spending:
        each["spent"] = None
    assert "At equal" not in write_report(study, spending)


def test_cpu_seconds_of_different_machines_are_not_compared(study, spending):
    find(spending, "house", "aem", 4)["hardware"] = {"processor": "slide rule", "cpus": 1, "devices": ["cpu"]}
    text = section(write_report(study, spending), "At equal environment steps and at equal CPU seconds")
    assert (
        "Not compared over CPU seconds, since the machines differ: aem, plain of house, seed 4 (1 x " in text
    )
    # Over seconds 0.15 and 0.1 are left, over steps all three.
    aem = row(text, "house", "aem")
    assert [aem[0], aem[3].split()[0], aem[5], aem[8].split()[0]] == ["3", "-4.2", "2", "+12.5"]
    pooled = row(text, "all tasks", "aem - plain")
    assert [pooled[0], pooled[3]] == ["6", "5"]


def test_cpu_seconds_under_different_load_are_not_compared(study, spending):
    """Wall time per CPU second on the house: 2 of the plain arm, 5, 4 and unknown (an old line) of AEM."""
    for each in spending:
        if each["task"] == "house":
            loads = {3: 5, 4: 4, 5: None} if each["arm"] == "aem" else {3: 2, 4: 2, 5: 2}
            load = loads[each["seed"]]
            each["process_seconds"] = None if load is None else load * each["cpu_seconds"]
    text = section(write_report(study, spending), "At equal environment steps and at equal CPU seconds")
    assert "wall s / CPU s of their runs differs by more than a factor of 2" in text
    assert "are left out of CPU seconds (1): aem, plain of house, seed 3 (5.0 and 2.0)." in text
    plain, aem = row(text, "house", "plain"), row(text, "house", "aem")
    assert (plain[-1], aem[-1], row(text, "shop", "aem")[-1]) == ("2.0", "4.5", "-")
    # Over seconds 0.3 and 0.1 are left, over steps all three.
    assert [aem[0], aem[3].split()[0], aem[5], aem[8].split()[0]] == ["3", "-4.2", "2", "+20.0"]


def test_machines_have_budgets_of_their_own(tmp_path):
    """All curves are the same; AEM has no run on the machine that is three times slower."""
    shop = "  shop: {config: webshop_tiny, overrides: [train.updates=20]}\n"
    study = made_up.make_study(tmp_path, seeds=range(3, 11), replace={shop: ""})
    lines = []
    for triple in study.triples():
        is_slow = triple.seed >= 7
        if triple.arm == "aem" and is_slow:
            continue
        each = made_up.line(study, triple, [0.2, 0.4, 0.6, 0.8])
        seconds = [(3 if is_slow else 1) * update for update in (0, 10, 20, 30)]
        each["spent"] = {"environment_steps": [0, 100, 200, 300], "cpu_seconds": seconds}
        each["hardware"] = {**each["hardware"], "processor": "slide rule" if is_slow else "abacus"}
        lines.append(each)
    text = section(write_report(study, lines), "At equal environment steps and at equal CPU seconds")
    assert "300 environment steps; 30 CPU seconds on 2 x abacus, 90 CPU seconds on 2 x slide rule" in text
    plain, aem = row(text, "house", "plain"), row(text, "house", "aem")
    assert (plain[0], aem[0]) == ("8", "4")
    # Over the four seeds of a pair: too few for an interval.
    assert plain[5:8] == aem[5:8] == ["4", "50.0", "80.0"]
    assert (
        "for want of a pair on one machine under like load: house-plain-7, house-plain-8, house-plain-9, "
        "house-plain-10." in text
    )


def test_all_comparisons_of_a_study_with_one_task_are_at_equal_amounts(tmp_path, spending):
    shop = "  shop: {config: webshop_tiny, overrides: [train.updates=20]}\n"
    more = "\n  rloo: [algorithm.name=rloo]\ncomparisons: [aem, [rloo, aem]]\nseeds: [3, 4, 5]"
    study = made_up.make_study(tmp_path / "one", replace={shop: "", "\nseeds: [3, 4, 5]": more})
    house = [each for each in spending if each["task"] == "house"]
    rloo = [each | {"arm": "rloo"} for each in house if each["arm"] == "aem"]
    text = section(write_report(study, house + rloo), "At equal environment steps and at equal CPU seconds")
    assert row(text, "house", "rloo - aem")[:2] == ["3", "+0.0"]


def test_what_was_spent_is_summed_up_to_each_point():
    records = [{"update": n, "environment_steps": 10.0 * n, "cpu_seconds": 0.5} for n in (1, 2, 3, 4)]
    found = spent_at([0, 2, 4], records)
    assert found == {"environment_steps": [0, 30, 100], "cpu_seconds": [0, 1, 2]}
    assert spent_at([0, 2, 4], records[1:]) is None  # a line is lost
    assert spent_at([0, 4], [{"update": n} for n in (1, 2, 3, 4)]) is None  # of an older version
    assert spent_at([0], []) is None
