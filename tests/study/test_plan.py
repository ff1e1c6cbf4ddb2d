"""The file of a study: what is refused, and that every study here can be run as it stands."""

import itertools
import math
import re
from pathlib import Path

import pytest
import yaml
from study_plan import Triple, read_study

from empg_jax.errors import ConfigError
from empg_jax.report.statistics import detectable
from tests.study import made_up

STUDIES = sorted(path.parent for path in (made_up.ROOT / "scripts" / "studies").glob("*/study.yaml"))


@pytest.fixture(scope="module")
def shipped():
    return {folder.name: read_study(folder) for folder in STUDIES}


def test_seeds_are_outermost(tmp_path):
    study = made_up.make_study(tmp_path, seeds=(7, 8))
    names = [triple.name for triple in study.triples()]
    cells = ["house-plain", "house-aem", "shop-plain", "shop-aem"]
    assert names == [f"{cell}-{seed}" for seed in (7, 8) for cell in cells]
    expected = ["webshop_tiny", "eval.every=10", "train.updates=20", "algorithm.name=grpo_aem", "seed=8"]
    assert study.settings(Triple("shop", "aem", 8)) == expected
    assert study.load(Triple("shop", "aem", 8)).train.updates == 20
    assert study.comparisons == (("aem", "plain"),) and study.baseline == "plain"


def test_the_registration_is_kept_letter_for_letter(tmp_path):
    study = made_up.make_study(tmp_path)
    text = (tmp_path / "study.yaml").read_text()
    assert study.registration in text
    assert study.registration.startswith("preregistration:\n") and study.registration.endswith("\n  seeds: 3")
    assert "all seeds  # and no look before" in study.registration and study.planned_effect == 4


@pytest.mark.parametrize(
    "folder", [folder for folder in STUDIES if folder.name != "smollm2"], ids=lambda f: f.name
)
def test_a_registered_effect_follows_from_its_pairs_and_their_spread(folder):
    """Where a registration from before says another one, the comment above it has the right one."""
    text = (folder / "study.yaml").read_text()
    registered = yaml.safe_load(text)["preregistration"]["minimum_detectable_effect"]
    pairs, spread = re.search(r"(\d+) pairs, paired sd of (\d+) points", registered["assumes"]).groups()
    found = detectable(int(spread) / math.sqrt(int(pairs)), int(pairs) - 1)
    corrected = re.search(r"Student's t, by which the detectable effect is ([\d.]+) points", text)
    assert float(corrected[1] if corrected else registered["points"]) == round(found, 1)
    assert corrected is None or (folder / "runs.jsonl").exists()  # else the registration itself is put right


def test_a_configuration_of_ones_own_lies_beside_the_study(tmp_path):
    (tmp_path / "mine.yaml").write_text("env: {name: household, options: {level: tiny}}")
    study = made_up.make_study(tmp_path, replace={"house: quickstart": "house: mine.yaml"})
    assert study.load(Triple("house", "plain", 3)).name == "mine"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("overrides: [eval", "overides: [eval", "overides is no key of a study .did you mean overrides"),
        ("seeds: [3, 4, 5]", "seds: 3", "seds is no key"),
        ("\nseeds: [3, 4, 5]", "", "has no seeds"),
        ("\nseeds: [3, 4, 5]", "\nseeds: 3-5", "seeds='3-5' is neither"),
        ("\nseeds: [3, 4, 5]", "\nseeds: [3, 3, 5]", "a seed comes twice"),
        ("\nseeds: [3, 4, 5]", "\nseeds: 3..6", "preregistration.seeds=3, but the study has 4 seeds"),
        ("  question: Which is better?\n", "", "preregistration lacks question"),
        ("{points: 4}", "a lot", "needs its size as points: NUMBER"),
        ("grpo_aem]", "grpo_aen]", "(?s)arm aem of house is refused: .*grpo_aen is unknown"),
        ("grpo_aem]", "grpo]", "the arms plain and aem are the same on house"),
        ("eval.every=10", "eval.every=0", "house, plain: eval.every=0 leaves no curve"),
        ("[algorithm.name=grpo]", "algorithm.name=grpo", "arms.plain: .* is no list of overrides"),
        ("config: webshop_tiny", "configs: webshop_tiny", "tasks.shop: .* is neither a configuration nor"),
        (
            "house: quickstart",
            "house: {config: quickstart, arms: {aim: [seed=1]}}",
            "house.arms: 'aim' is no arm",
        ),
        (
            "house: quickstart",
            "house: {config: quickstart, arms: {aem: 1}}",
            "arms.aem: 1 is no list of overrides",
        ),
        ("  aem:", "  a/m:", "'a/m' is no name of a folder"),
        ("\nseeds: [", "\nbaseline: plane\nseeds: [", "there is no arm plane .did you mean plain"),
        ("\nseeds: [", "\ncomparisons: [[aem, plain, aem]]\nseeds: [", "is no pair of two arms"),
        ("\nseeds: [", "\ncomparisons: [aem, [aem, plain]]\nseeds: [", "aem with plain comes twice"),
        ("\nseeds: [", "\ncomparisons: [5]\nseeds: [", "is no list of arms"),
        ("\nseeds: [", "\nend_tasks: lots\nseeds: [", "end_tasks='lots' is no positive number"),
        ("\nseeds: [", "\nend_tasks: -3\nseeds: [", "end_tasks=-3 is no positive number"),
        ("\nseeds: [", "\nwhole_seeds: 1\nseeds: [", "whole_seeds=1 is no true or false"),
        (
            "\nseeds: [",
            "\nmeasure: seconds\nseeds: [",
            "measure: seconds is none of updates, env",
        ),
        ("{points: 4}", "{points: .nan}", "needs its size as points: NUMBER"),
        (
            "arms:\n  plain: [algorithm.name=grpo]\n  aem: [algorithm.name=grpo_aem]",
            "arms: {}",
            "arms must give names",
        ),
    ],
)
def test_what_is_refused(tmp_path, old, new, told):
    with pytest.raises(ConfigError, match=told):
        made_up.make_study(tmp_path, replace={old: new})


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_every_arm_of_a_study_here_loads(folder, shipped):
    """`read_study` loads every cell with its first seed; another seed is the only difference within one."""
    study = shipped[folder.name]
    for task, arm in itertools.product(study.tasks, study.arms):
        config = study.load(Triple(task, arm, study.seeds[-1]))
        assert config.seed == study.seeds[-1]
        assert config.eval.every == (3 if folder.name == "smollm2" else 10)
        assert not [note for note in config.notes if "algorithm.empg.zeta=0.05 of" not in note]


def test_the_studies_are_those_that_were_planned(shipped):
    confirm, rates, ablations = (shipped[name] for name in ("confirm", "rates", "ablations"))
    assert {task.config for task in confirm.tasks.values()} == {"quickstart", "alfworld_tiny", "webshop_tiny"}
    assert confirm.seeds == tuple(range(100, 116)) and len(list(confirm.triples())) == 16 * 9
    assert ablations.seeds == tuple(range(200, 210)) and rates.seeds == (50, 51, 52)
    for one, other in itertools.combinations(shipped.values(), 2):
        assert not set(one.seeds) & set(other.seeds)  # nothing is confirmed on the seeds it was found on
    for arm in confirm.arms:
        modulation = confirm.load(Triple("household", arm, 100)).algorithm.modulation
        assert modulation == arm.removeprefix("grpo").removeprefix("_") or (arm, modulation) == (
            "grpo",
            "none",
        )


def test_the_panel_has_every_method_that_has_a_file(shipped):
    panel = shipped["panel"]
    methods = [path.stem for path in (made_up.ROOT / "configs" / "methods").glob("*.yaml")]
    algorithms = {arm: panel.load(Triple("household", arm, 400)).algorithm for arm in panel.arms}
    names = {each.name for each in algorithms.values()}
    # Gains of information need known answers, which the tasks of the panel have not.
    assert names == {*methods, "grpo", "gigpo"} - {"kl_v32", "igpo", "a2tgpo"} and "kl_unbiased" in panel.arms
    for arm, algorithm in algorithms.items():
        kind = arm.rpartition("_")[2]
        assert algorithm.modulation == (kind if kind in ("empg", "aem") else "none"), arm
    # What a task ranks by CPU seconds must be measured at every evaluation.
    assert panel.load(Triple("webshop_tiny", "grpo", 400)).log.every == 1
    assert {arm for arm, _ in panel.comparisons} == set(panel.arms) - {"grpo"}


def test_a_task_may_have_settings_of_its_own_for_an_arm(shipped):
    load = shipped["panel"].load
    assert [load(Triple(task, "graft", 400)).algorithm.graph.lam for task in shipped["panel"].tasks] == [
        0.95,
        0.95,
        0.8,
    ]
    assert [load(Triple(task, "crbc_aem", 400)).env.anchor for task in shipped["panel"].tasks] == [
        "state",
        "state",
        "observation",
    ]
    assert load(Triple("webshop_tiny", "grpo", 400)).env.anchor == "observation"


def test_rates_are_tuned_on_validation_tasks_alone(shipped):
    configs = [shipped["rates"].load(Triple("household", arm, 50)) for arm in shipped["rates"].arms]
    assert [config.train.learning_rate for config in configs] == [5e-4, 1e-3, 2e-3]
    assert all(config.env.eval_split == "valid" for config in configs) and shipped["rates"].end_tasks is None
    assert shipped["confirm"].load(Triple("household", "grpo", 100)).env.eval_split == "test"


def test_each_ablation_changes_one_key(shipped):
    study = shipped["ablations"]
    algorithms = {arm: study.load(Triple("household", arm, 200)).algorithm for arm in study.arms}
    changed = {}
    for arm, against in study.comparisons:
        if against != "grpo":
            kind = algorithms[arm].modulation
            mine, theirs = (vars(getattr(algorithms[each], kind)) for each in (arm, against))
            changed[arm] = {key: value for key, value in mine.items() if value != theirs[key]}
            assert algorithms[against].modulation == kind
    assert changed == {
        "empg_scaling_only": {"zeta": 0},
        "empg_bonus_only": {"k": 0},
        "empg_mixed_groups_only": {"mixed_groups_only": True},
        "empg_shuffled": {"shuffle_seed": 1},
        "empg_reversed": {"reverse": True},
        "aem_batch_scope": {"scope": "batch"},
        "aem_no_dead_zone": {"min_range": 0},
        "aem_shuffled": {"shuffle_seed": 1},
        "aem_reversed": {"reverse": True},
    }
    assert set(study.arms) == {"grpo", "empg", "aem", *changed}


def test_the_page_of_scripts_names_every_study():
    page = Path(made_up.ROOT / "scripts" / "README.md").read_text()
    assert all(f"scripts/studies/{folder.name}" in page for folder in STUDIES)
