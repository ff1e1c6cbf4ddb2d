"""What a command makes of a file's algorithm: names decide, nothing is set in vain, own recipes are found."""

import itertools
import sys
import textwrap
from pathlib import Path

import pytest

from empg_jax.algorithms import parts
from empg_jax.algorithms.keys import FACTORIES, spelled
from empg_jax.config import load_config
from empg_jax.config.algorithm import RECIPES
from empg_jax.errors import ConfigError
from empg_jax.run.assembly import (
    describe_algorithm,
    make_algorithm_from,
    make_recipe_from,
    needs_reference,
)

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
LEARNER = "algorithm.entropy_source=learner"


def first_line(config, *overrides):
    return describe_algorithm(load_config(config, [f"algorithm.{override}" for override in overrides]))


def test_the_first_line_names_the_algorithm_in_full():
    assert first_line("quickstart") == "GRPO + EMPG (k=1, k'=1, zeta=0.05, batch)"
    assert first_line("quickstart", "name=grpo") == "GRPO"
    assert first_line("quickstart", "name=grpo_empg") == "GRPO + EMPG (k=1, k'=1, zeta=0.05, batch)"
    assert first_line("quickstart", "name=gigpo_aem") == "GiGPO + AEM (lambda=1, group, min_range=0.1)"
    assert first_line("quickstart", "name=dapo", "modulation=aem").startswith("DAPO + AEM (lambda=1, group")
    assert first_line("quickstart", "modulation=none") == "GRPO"
    line = first_line("quickstart", "clip_high=0.3")
    assert line.endswith("; ppo_clip(clip_low=0.2, clip_high=0.3, dual_clip=3)")
    assert "turn_penalty(amount=0.1)" in first_line("alfworld_verl")
    line = first_line("quickstart", "name=crbc_aem", "graph.beta=0.9")
    assert line.startswith("CRBC + AEM (lambda=1, group, min_range=0.1); crbc(beta=0.9, weight=5, ")
    assert first_line("quickstart", "name=graft", "turn_ratio=product").startswith("GRAFT; turn_ratio_clip(")
    assert first_line("quickstart", "name=sampo") == "SAMPO; drop_uniform(unit=group)"


def test_entropy_ratio_clipping_stands_beside_other_corrections():
    learner = ["algorithm.entropy_source=learner"]
    named = load_config("quickstart", ["algorithm.name=erc", *learner])
    assert [part.name for part in make_recipe_from(named).correct] == ["entropy_ratio"]
    options = make_recipe_from(named).correct[0].options
    assert (
        options == {"low": 0.95, "high": 1.05}
        and make_recipe_from(named).objective.options["dual_clip"] == 10
    )
    keys = ["algorithm.correction.kind=tis", "algorithm.correction.entropy_high=1.2", *learner]
    keys += ["algorithm.correction.sequence_delta=0.3"]
    recipe = make_recipe_from(load_config("quickstart", ["algorithm.name=sapo", *keys]))
    assert {part.name for part in recipe.correct} == {"tis", "sequence_mask", "entropy_ratio"}
    assert next(part for part in recipe.correct if part.name == "entropy_ratio").options["high"] == 1.2
    both = load_config("quickstart", ["algorithm.name=erc", *keys])
    assert len(make_recipe_from(both).correct) == 3
    off = ["algorithm.correction.entropy_low=null", "algorithm.correction.entropy_high=null"]
    for start, key, bounds in (
        ("sapo", "entropy_low=0.8", (0.8, None)),
        ("sapo", "entropy_high=1.3", (None, 1.3)),
        ("erc", "entropy_high=null", (0.95, None)),
        ("erc", "entropy_low=null", (None, 1.05)),
    ):
        keys = [f"algorithm.name={start}", f"algorithm.correction.{key}"]
        (part,) = make_recipe_from(load_config("quickstart", [*keys, *learner])).correct
        assert tuple(part.options.values()) == bounds
    with pytest.raises(ValueError, match=r"entropy_low and .*entropy_high are both null: give one"):
        parts.entropy_ratio()
    assert make_recipe_from(load_config("quickstart", ["algorithm.name=erc", *learner, *off])).correct == ()


# Every sixth pair: each name meets several configurations, and each configuration several names.
PAIRS = [
    pytest.param(path, name, id=f"{path.stem}-{name}")
    for (i, path), (j, name) in itertools.product(enumerate(CONFIGS), enumerate(RECIPES))
    if (i + j) % 6 == 0
]


@pytest.mark.parametrize(("path", "name"), PAIRS)
def test_every_name_and_modulation_works_on_packaged_configs(path, name):
    for kind in ("", "_empg", "_aem"):
        config = load_config(path.stem, [f"algorithm.name={name}{kind}", "algorithm.kl_coef=0"])
        assert (config.algorithm.name, config.algorithm.modulation) == (name, kind[1:] or "none")
        recipe = make_recipe_from(config)
        assert (recipe.modulate.name if recipe.modulate else "") == kind[1:]


def test_what_a_packaged_file_set_for_replaced_parts_is_dropped_and_said():
    config = load_config("quickstart", ["algorithm.name=grpo"])
    assert config.algorithm.empg.zeta == 0.1
    (note,) = config.notes
    assert note == "algorithm.empg.zeta=0.05 of quickstart.yaml is dropped: algorithm.name=grpo replaces empg"
    config = load_config("swe_verified", ["algorithm.loss=gspo"])
    assert config.algorithm.clip_high is None and "clip_high=0.28" in config.notes[0]
    assert make_recipe_from(config).objective.options["clip_high"] == 4e-4
    config = load_config("swe_verified", ["algorithm.name=dr_grpo"])
    assert config.algorithm.aggregation == "seq-mean-token-const" and "aggregation" in config.notes[0]
    assert load_config("quickstart", ["algorithm.empg.k=2"]).notes == ()
    kept = load_config("quickstart", ["algorithm.name=dapo", "algorithm.modulation=empg"])
    assert kept.algorithm.empg.zeta == 0.05 and not kept.notes


def test_a_name_in_a_command_decides_over_a_file_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("algorithm: {name: grpo_empg, loss: ppo_clip, aggregation: token-mean}\n")
    assert first_line(path) == "GRPO + EMPG (k=1, k'=1, zeta=0.1, batch)"
    assert first_line(path, "name=grpo") == "GRPO"
    assert first_line(path, "name=gspo_aem") == "GSPO + AEM (lambda=1, group, min_range=0.1)"
    assert first_line(path, "modulation=aem") == "GRPO + AEM (lambda=1, group, min_range=0.1)"


@pytest.mark.parametrize(
    ("filed", "key", "part"),
    [
        ("{name: grpo_empg, empg: {zeta: 0.3}}", "empg.zeta=0.3", "empg"),
        ("{name: gspo, modulation: aem, aem: {lam: 2}}", "aem.lam=2", "aem"),
    ],
)
def test_a_name_in_a_command_drops_the_keys_of_the_modulation_that_it_replaces(tmp_path, filed, key, part):
    path = tmp_path / "own.yaml"
    path.write_text(f"algorithm: {filed}\n")
    others = {"empg": "aem", "aem": "empg"}
    for name, modulation in (("dapo", "none"), (f"grpo_{others[part]}", others[part])):
        config = load_config(path, [f"algorithm.name={name}"])
        assert config.algorithm.modulation == modulation
        said = f"algorithm.{key} of own.yaml is dropped: algorithm.name={name} replaces {part}"
        assert config.notes == (said,)
    stays = load_config(path, [f"algorithm.name=dapo_{part}"])
    assert not stays.notes and part in first_line(path, f"name=dapo_{part}").lower()
    with pytest.raises(ConfigError, match="it belongs to"):
        load_config(path, ["algorithm.name=dapo", f"algorithm.{key}"])  # said in the command itself


# Accepted in vain before: the key that nothing reads, and what the refusal says.
IN_VAIN = {
    ("name=sapo", "clip_low=0.1"): r"clip_low=0\.1 .* algorithm\.loss=sapo: it belongs to ppo_clip",
    ("name=gspo", "dual_clip=5"): r"dual_clip=5.* algorithm\.loss=gspo: it belongs to ppo_clip",
    ("name=cispo", "dual_clip=5"): r"dual_clip=5.* algorithm\.loss=cispo: it belongs to ppo_clip",
    ("name=reinforce", "scale_by_std=true"): r"scale_by_std=True .*name=reinforce: it belongs to grpo",
    ("name=ppo", "singleton=raw"): r"singleton=raw .*algorithm\.name=ppo: it belongs to rloo and grpo",
    ("kl_kind=k2",): r"kl_kind=k2 has no effect with algorithm\.kl_coef=0",
    ("name=grpo", "empg.zeta=0.2"): r"empg\.zeta=0\.2 .*algorithm\.modulation=none: it belongs to empg",
    ("aem.lam=2",): r"aem\.lam=2.*algorithm\.modulation=empg: it belongs to aem",
    ("name=grpo", "critic.value_coef=1"): r"value_coef=1.*algorithm\.name=grpo: it belongs to ppo",
    ("loss=turn_ratio_clip", "ratio_unit=turn"): r"ratio_unit=turn.* it belongs to gspo",
    ("turn_ratio=product",): r"turn_ratio=product.* it belongs to turn_ratio_clip",
    (
        "name=gigpo",
        "graph.beta=0.9",
    ): r"graph\.beta=0\.9.*name=gigpo: it belongs to crbc and graph_hca and graft",
    ("name=crbc", "graph.lam=0.5"): r"graph\.lam=0\.5.*name=crbc: it belongs to graft",
    ("name=gigpo", "hgpo.history=3"): r"hgpo\.history=3.*name=gigpo: it belongs to hgpo",
    ("loss=decoupled_ppo",): r"loss=decoupled_ppo compares learner and sampler.*entropy_source=learner",
    ("overlong_factor=2",): r"overlong_factor=2.* has no effect with algorithm\.overlong_length=null",
    ("correction.sequence_logprobs=learner",): r"no effect with algorithm\.correction\.sequence_delta=null",
    ("name=gspo", "dual_clip=3"): r"dual_clip=3.* belongs to ppo_clip",  # in a command even the default
    ("loss_scale=4",): r"loss_scale=4.*aggregation=token-mean: it belongs to seq-mean-token-sum-norm",
}


@pytest.mark.parametrize("keys", IN_VAIN, ids=" ".join)
def test_a_key_that_no_part_reads_is_refused(keys):
    with pytest.raises(ConfigError, match=IN_VAIN[keys]):
        load_config("quickstart", [f"algorithm.{key}" for key in keys])


OF_FILES = [keys for keys in IN_VAIN if keys != ("name=gspo", "dual_clip=3")]


@pytest.mark.parametrize("keys", OF_FILES, ids=" ".join)
def test_so_is_one_in_a_file_of_ones_own(tmp_path, keys):
    lines = {"entropy_source": "engine"} | dict(key.split("=") for key in keys)
    lines.setdefault("modulation", "empg" if "name" not in lines else "none")
    sections = "\n".join(
        f"  {key}: {value}" if "." not in key else f"  {key.split('.')[0]}: {{{key.split('.')[1]}: {value}}}"
        for key, value in lines.items()
    )
    (tmp_path / "own.yaml").write_text(f"algorithm:\n{sections}\n")
    with pytest.raises(ConfigError, match=IN_VAIN[keys]):
        load_config(tmp_path / "own.yaml")


@pytest.mark.parametrize("name", RECIPES)
def test_every_loss_stands_in_for_a_recipes_own(name):
    for loss in map(spelled, FACTORIES["objective"]):
        keys = [f"algorithm.name={name}", f"algorithm.loss={loss}", LEARNER]
        if name == "a2tgpo" and loss in ("sapo", "reinforce"):
            with pytest.raises(ConfigError, match="clips no ratio"):
                load_config("quickstart", keys)
            continue
        config = load_config("quickstart", keys)
        assert config.algorithm.loss == spelled(make_recipe_from(config).objective.name) == loss


def test_a_key_of_the_recipes_own_loss_is_refused_beside_another(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("algorithm: {name: turn_ppo, loss: ppo_clip, dual_clip: null, turn_ratio: product}\n")
    with pytest.raises(ConfigError, match=r"turn_ratio=product .*ppo_clip: it belongs to turn_ratio_clip"):
        load_config(path)


def test_samples_of_older_weights_are_corrected_by_default():
    config = load_config("quickstart", ["train.max_lag=2"])
    assert (config.algorithm.entropy_source, config.algorithm.correction.kind) == ("learner", "tis")
    assert all("because train.max_lag=2" in note for note in config.notes) and len(config.notes) == 2
    assert load_config("quickstart", ["train.max_lag=0"]).algorithm.correction.kind == "none"
    for own in ("algorithm.correction.kind=mis", "algorithm.loss=decoupled_ppo"):
        config = load_config("quickstart", ["train.max_lag=2", own])
        assert [note.split(",")[0] for note in config.notes] == ["algorithm.entropy_source=learner"]
        assert config.algorithm.correction.kind == ("mis" if "mis" in own else "none")
    *_, note = load_config("quickstart", ["train.max_lag=2", "algorithm.correction.kind=none"]).notes
    assert "max_lag=2" in note and "without a correction" in note


def test_a_lag_of_the_file_with_the_samplers_entropies_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_text("algorithm: {entropy_source: engine}\ntrain: {max_lag: 1}\n")
    with pytest.raises(ConfigError, match=r"entropy_source=engine needs on-policy data.*max_lag=1"):
        load_config(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("algorithm: {entropy_source: learner}\ntrain: {max_lag: 1}\n")
    assert load_config(tmp_path / "own.yaml").algorithm.correction.kind == "tis"


def test_a_lag_and_repeatable_runs_exclude_each_other():
    with pytest.raises(ConfigError, match=r"rollout\.deterministic=true with train\.max_lag=1"):
        load_config("quickstart", ["train.max_lag=1", "rollout.deterministic=true"])


def test_lengths_and_units_that_cannot_be_are_refused():
    longest = 10 * 8
    over = [f"algorithm.overlong_length={longest + 1}", "algorithm.overlong_cache=4"]
    with pytest.raises(ConfigError, match=rf"overlong_length=81 is never reached.* at most {longest} tokens"):
        load_config("quickstart", over)
    # A trajectory may lie in several rows, so its ratio would depend on how rows are packed.
    with pytest.raises(ConfigError, match=r"ratio_unit='trajectory'.*choose segment or turn"):
        load_config("quickstart", ["algorithm.loss=gspo", "algorithm.ratio_unit=trajectory"])


# ------------------------------------------------------------------------------------ a recipe of one's own

OWN = """
import jax.numpy as jnp
from empg_jax.algorithms import Modulation, Recipe, parts

def best(batch, scores, worth):
    return jnp.broadcast_to((worth.returns > 0)[:, None], worth.mask.shape).astype(jnp.float32)

def flat(batch, scores, worth):
    return worth.returns

def nan(batch, scores, worth):
    return jnp.full(worth.mask.shape, jnp.nan)

def bad_loss(logprobs, rows, scores, advantages):
    return jnp.sum(logprobs), {}

def bare(base, turns, batch):
    return base

def raises(batch, scores, worth):
    return worth.retuns

def branches(batch, scores, worth):
    return worth.mask * (1.0 if worth.returns.sum() > 0 else 0.0)

def halve(base, turns, batch):
    factors = jnp.where(turns.mask, jnp.full_like(base, 0.5), 0)
    return Modulation(base * factors, factors, jnp.zeros_like(base))

RECIPE = Recipe(estimate=best, modulate=parts.empg(zeta=0.2), correct=parts.tis(cap=3.0), kl=parts.kl(0.1))
HALVED = Recipe(estimate=parts.grpo(), modulate=halve)
FLAT, NAN, RAISES = Recipe(estimate=flat), Recipe(estimate=nan), Recipe(estimate=raises)
BRANCHES = Recipe(estimate=branches)
LOSS, BARE = Recipe(estimate=best, objective=bad_loss), Recipe(estimate=best, modulate=bare)
NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The module ``own_recipes`` in the current folder, which is not on the path."""
    monkeypatch.chdir(tmp_path)
    others = [path for path in sys.path if path not in ("", str(tmp_path))]
    monkeypatch.setattr(sys, "path", others)
    (tmp_path / "own_recipes.py").write_text(textwrap.dedent(OWN))
    yield tmp_path
    for name in ("own_recipes", "own_broken", "own_failing"):
        sys.modules.pop(name, None)


def entry(attribute, *overrides):
    return load_config("quickstart", [f"algorithm.entry_point={attribute}", LEARNER, *overrides])


@pytest.mark.slow
def test_a_recipe_of_ones_own_is_found_composed_and_described(own):
    config = entry("own_recipes:RECIPE")
    assert config.algorithm.name is None and config.algorithm.modulation == "empg"
    a = config.algorithm
    assert (a.empg.zeta, a.correction.cap, a.kl_coef) == (0.2, 3.0, 0.1)
    assert needs_reference(config) and make_algorithm_from(config).credit is not None
    line = describe_algorithm(config)
    assert line.startswith("own_recipes:RECIPE + EMPG (k=1, k'=1, zeta=0.2, batch); best; ")
    (own / "again.yaml").write_text(config.to_yaml())
    assert load_config(own / "again.yaml").algorithm == config.algorithm
    changed = entry("own_recipes:RECIPE", "algorithm.modulation=aem", "algorithm.clip_high=0.3")
    recipe = make_recipe_from(changed)
    assert recipe.modulate.name == "aem" and recipe.objective.options["clip_high"] == 0.3
    assert recipe.estimate.__name__ == "best"
    assert describe_algorithm(entry("own_recipes:HALVED")).startswith("own_recipes:HALVED + halve; grpo(")
    assert make_algorithm_from(entry("own_recipes:HALVED")).credit is not None


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("own_missing:RECIPE", r"own_missing:RECIPE: there is no module 'own_missing'"),
        ("own_recipes:RECIPES", r"own_recipes' has no attribute 'RECIPES'; its recipes: RECIPE"),
        ("own_recipes:NUMBER", r"own_recipes:NUMBER is a int, not an empg_jax\.algorithms\.Recipe"),
        ("own_broken:RECIPE", r"own_broken\.py, line 2: "),
        ("own_failing:RECIPE", r"own_failing cannot be imported: ZeroDivisionError: .*line 1"),
        ("nonsense", r"algorithm\.entry_point='nonsense'"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_one_message(own, attribute, says):
    (own / "own_broken.py").write_text("x = 1\ndef f(:\n")
    (own / "own_failing.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=says) as caught:
        entry(attribute)
    assert "algorithm.entry_point=" in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("FLAT", r"own_recipes:FLAT: flat returned shape \(5,\); expected float\[N, K\] = \(5, 2\)"),
        ("NAN", r"own_recipes:NAN: nan returned numbers that are not finite"),
        (
            "LOSS",
            r"own_recipes:LOSS: bad_loss \(objective\) returned shape \(\); expected float\[B, T\] = ",
        ),
        ("BARE", r"own_recipes:BARE: bare returned .*; expected a Modulation"),
        ("RAISES", r"own_recipes:RAISES: AttributeError: .*retuns.*own_recipes\.py, line \d+"),
        ("BRANCHES", r"own_recipes:BRANCHES: TracerBoolConversionError: .*own_recipes\.py, line \d+"),
    ],
)
def test_a_function_that_returns_the_wrong_thing_is_named(own, attribute, says):
    with pytest.raises(ConfigError, match=says):
        make_algorithm_from(entry(f"own_recipes:{attribute}"))


def test_a_name_and_an_entry_point_exclude_each_other(own):
    both = ["algorithm.name=grpo", "algorithm.entry_point=own_recipes:RECIPE"]
    with pytest.raises(ConfigError, match=r"name=grpo and algorithm\.entry_point=own_recipes:RECIPE exclude"):
        load_config("quickstart", both)
