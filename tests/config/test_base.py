"""A file on top of another: its algorithm is laid over the base's as a command's over a packaged file's."""

import pytest

from empg_jax.config import load_config
from empg_jax.config.algorithm import RECIPES
from empg_jax.config.yaml import find_file


@pytest.fixture(params=["packaged", "own"])
def lay(request, tmp_path):
    """Reads a file with the given algorithm on top of the quickstart, or of the user's copy of it."""
    base = tmp_path / "quickstart.yaml"
    base.write_text(find_file("quickstart").read_text())
    path = tmp_path / "mine.yaml"

    def load(algorithm):
        name = "quickstart" if request.param == "packaged" else base.name
        path.write_text(f"base: {name}\nalgorithm: {algorithm}\n")
        return load_config(path)

    return load


@pytest.mark.parametrize(
    "keys",
    [
        {"name": "gagpo", "modulation": "none"},
        {"modulation": "none"},
        {"modulation": "aem"},
        {"name": "dapo", "modulation": "empg"},
        {"kl_coef": 0.1},
        *({"name": name} for name in RECIPES),
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_file_over_its_base_is_as_a_command_over_a_packaged_file(lay, keys):
    filed = lay("{" + ", ".join(f"{key}: {value}" for key, value in keys.items()) + "}")
    commanded = load_config("quickstart", [f"algorithm.{key}={value}" for key, value in keys.items()])
    assert (filed.algorithm, filed.notes) == (commanded.algorithm, commanded.notes)


def test_the_note_names_the_base_and_what_replaces_its_part(lay):
    (note,) = lay("{name: gagpo, modulation: none, turn_gamma: 0.9}").notes
    cause = "algorithm.name=gagpo algorithm.modulation=none replaces empg"
    assert note == f"algorithm.empg.zeta=0.05 of quickstart.yaml is dropped: {cause}"


def test_an_empty_table_removes_the_bases_algorithm(lay):
    default = load_config("quickstart", ["algorithm={}"]).algorithm
    assert lay("{}").algorithm == default and default.modulation == "none"
    assert lay("{empg: {}}").algorithm.empg.zeta == 0.1


def test_a_section_may_be_null_in_the_file_below(tmp_path):
    (tmp_path / "first.yaml").write_text("base: quickstart\nalgorithm: {empg: null}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\nalgorithm: {empg: {zeta: 0.3}}\n")
    assert load_config(tmp_path / "second.yaml").algorithm.empg.zeta == 0.3
    assert load_config(tmp_path / "first.yaml", ["algorithm.empg.zeta=0.2"]).algorithm.empg.zeta == 0.2


def test_packaged_files_on_top_of_packaged_ones_say_nothing_of_it():
    assert not [note for note in load_config("papers/aem_gspo_alfworld_7b").notes if "dropped" in note]
