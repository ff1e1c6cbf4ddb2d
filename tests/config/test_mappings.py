"""Overrides of mappings: emptied by {} and by null, and left out with another environment."""

import pytest

from empg_jax.config import list_choices, load_config
from empg_jax.config.yaml import find_packaged
from empg_jax.errors import ConfigError

OWN = ["env.name=null", "env.entry_point=my_module:MyEnv"]


def load(*overrides, name="quickstart"):
    config = load_config(name, overrides)
    return config, list(config.notes)


@pytest.mark.parametrize("empty", ["{}", "null", ""])
@pytest.mark.parametrize("name", ["alfworld_verl", "quickstart"])
def test_an_empty_mapping_replaces_what_the_file_says(name, empty):
    config, notes = load(f"env.options={empty}", f"env.prompt_options={empty}", name=name)
    assert (config.env.options, config.env.prompt_options, notes) == ({}, {}, [])
    assert load(f"model.chat_options={empty}")[0].model.chat_options == {}
    assert load(f"env.options={empty}", "env.options.level=easy")[0].env.options == {"level": "easy"}


def test_an_empty_mapping_inside_a_table_replaces_too():
    assert load("env={options: {}}")[0].env.options == {}
    assert load("algorithm={empg: {}}")[0].algorithm.empg.zeta != load()[0].algorithm.empg.zeta == 0.05


def test_a_mapping_with_entries_is_merged():
    assert load("env.options={level: easy}")[0].env.options == {"level": "easy", "style": "terse"}


def test_a_file_may_leave_a_mapping_blank(tmp_path):
    (tmp_path / "mine.yaml").write_text("env:\n  options:\n  prompt_options: null\n")
    assert load_config(tmp_path / "mine.yaml").env.options == {}


@pytest.mark.parametrize("given", [OWN, ["env={name: null, entry_point: my_module:MyEnv}"]])
def test_an_environment_of_ones_own_does_not_inherit_options(given):
    config, notes = load(*given, name="alfworld_verl")
    assert (config.env.options, config.env.prompt_options) == ({}, {})
    (note,) = notes
    assert note.startswith("env.entry_point=my_module:MyEnv: env.options and env.prompt_options of the")


def test_options_of_the_same_command_stay_wherever_they_stand():
    for overrides in (["env.options.size=3", *OWN], [*OWN, "env.options={size: 3}"]):
        assert load(*overrides)[0].env.options == {"size": 3}


def test_options_beside_an_entry_point_in_the_same_file_stay(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("env: {name: null, entry_point: 'my_module:MyEnv', options: {size: 3}}\n")
    for overrides in ([], OWN, ["env.entry_point=null", "env.name=household"]):
        config, notes = load(*overrides, name=file)
        assert config.env.options == {"size": 3} and notes == []


def test_choices_are_those_that_are_accepted():
    choices = list_choices()
    assert choices["train.schedule"] == ["linear", "cosine", "constant"]
    assert "grpo_aem" in choices["algorithm.name"] and "seed" not in choices
    for name in choices["train.schedule"]:
        load(f"train.schedule={name}")


def test_every_packaged_configuration_says_what_it_is():
    found = find_packaged()
    assert {"quickstart", "swe_tiny", "alfworld_verl"} <= found.keys()
    for name, sentence in found.items():
        assert load(name=name) and len(sentence) > 30, name


def test_too_many_devices_are_told_as_devices():
    with pytest.raises(ConfigError, match=r"mesh\.data=4 x .* \(this mesh takes 4 devices\)"):
        load("mesh.data=4")
