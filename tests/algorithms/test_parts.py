"""Parts and recipes: what is read as text is what Python says; one part is exchanged alone."""

import inspect

import pytest

from empg_jax.algorithms import Recipe, parts
from empg_jax.algorithms.configure import _make, configure, spec_of
from empg_jax.algorithms.keys import Chosen, named_spec, read_keys
from empg_jax.algorithms.recipe import AGGREGATES
from empg_jax.algorithms.recipes import RECIPES
from empg_jax.algorithms.signatures import FACTORIES
from empg_jax.algorithms.signatures import RECIPES as READ


def factory_of(slot, name):
    return AGGREGATES[name] if slot == "aggregate" else getattr(parts, name)


ALL = [(slot, name) for slot, names in FACTORIES.items() for name in names]


@pytest.mark.parametrize(("slot", "name"), ALL)
def test_signatures_are_read_as_python_reads_them(slot, name):
    found = inspect.signature(factory_of(slot, name)).parameters
    assert {key: value.default for key, value in found.items()} == {
        key: value.default for key, value in FACTORIES[slot][name].items()
    }
    assert all(parameter.sentence.endswith(".") for parameter in FACTORIES[slot][name].values())


def test_every_factory_is_read():
    public = {name for name, value in vars(parts).items() if inspect.isfunction(value)}
    assert public <= {name.replace("-", "_") for names in FACTORIES.values() for name in names}
    for slot, names in FACTORIES.items():
        for name in names:
            options = {"amount": 0.1, "length": 9, "cache": 3, "coef": 0.1}
            options = {
                key: options.get(key) for key, value in names[name].items() if value.default is inspect._empty
            }
            if name == "entropy_ratio":  # needs one of its two bounds
                options["low"] = 0.95
            made = _make(slot, Chosen(name, options))
            assert made.name == name and made.options.keys() >= names[name].keys()


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_of_recipes_is_read_as_python_reads_it(name):
    assert READ.keys() == RECIPES.keys()
    whole, read = spec_of(RECIPES[name]), named_spec(name)
    assert whole.pop("entropy")[0].options == {"entropy_coef": RECIPES[name].entropy_coef}
    for slot, chosen in whole.items():
        assert [part.factory for part in chosen] == [part.factory for part in read.get(slot, ())], slot
        for part, text in zip(chosen, read.get(slot, ()), strict=True):
            defaults = {key: value.default for key, value in FACTORIES[slot][part.factory].items()}
            expected = defaults | text.options
            assert {key: part.options[key] for key in defaults} == expected, slot
    assert read_keys(whole) == read_keys(read)


def test_one_part_is_exchanged_and_the_others_stay():
    def own(batch, scores, worth):
        return worth.turn_scores

    recipe = Recipe(estimate=own, modulate=parts.empg(zeta=0.3), correct=(parts.tis(), parts.sequence_mask()))
    changed = configure(recipe, {"empg.k": 2.0, "correction.cap": 3.0, "loss": "sapo"})
    assert changed.estimate is own and changed.aggregate is recipe.aggregate
    assert (changed.modulate.options["zeta"], changed.modulate.options["k"]) == (0.3, 2.0)
    assert [part.name for part in changed.correct] == ["tis", "sequence_mask"]
    assert changed.correct[0].options["cap"] == 3.0 and changed.correct[1] is recipe.correct[1]
    assert changed.objective.name == "sapo"
    with pytest.raises(ValueError, match=r"omega=2.0 has no effect .*own: it belongs to gigpo"):
        configure(recipe, {"omega": 2.0})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"estimate": parts.ppo()}, "ppo needs a critic"),
        ({"aggregate": "mean"}, "aggregation='mean'"),
        ({"estimate": parts.reinforce_pp(reward_kl_coef=0.1), "kl": parts.kl(0.1)}, "not in both"),
        ({"objective": parts.decoupled_ppo(), "correct": parts.tis()}, "already weighs"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**{"estimate": parts.grpo()} | fields)
