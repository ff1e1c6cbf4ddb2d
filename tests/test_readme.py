"""The Python of README.md runs as it stands, and what it defines works."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from empg_jax.algorithms import ALGORITHMS
from empg_jax.cli import app
from tests.algorithms.batches import make_batch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture
def table():
    """The table of algorithms takes new entries for a test only."""
    before = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(before)


def run(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs(number):
    run(BLOCKS[number])


def block_with(text):
    (found,) = [block for block in BLOCKS if text in block]
    return found


def test_the_functions_in_a_loop_of_ones_own():
    names = run(block_with("with_empg"))
    base, mask = names["base"], names["turn_mask"]
    assert names["with_empg"].shape == names["with_aem"].shape == mask.shape
    np.testing.assert_allclose(names["with_empg"].mean(), 0, atol=1e-6)  # centered
    np.testing.assert_array_equal(np.sign(names["with_aem"]), np.sign(base))
    assert np.abs(names["with_aem"] - base).max() > 0.05


@pytest.mark.usefixtures("table")
def test_the_recipe_of_an_algorithm():
    names = run(block_with("best_of_group"))
    assert len(block_with("best_of_group").splitlines()) <= 20
    batch, scores, *_ = make_batch()
    credit = jax.jit(names["algorithm"].credit)(batch, scores)
    tokens = np.asarray(credit.advantages)[np.asarray(batch.loss_mask)]
    owners = np.asarray(batch.trajectory_ids)[np.asarray(batch.loss_mask)]
    best = np.isin(owners, [0, 2, 3, 4])  # returns 1 0 | 1 1 | 0.5 0
    assert (tokens[best] > 0).all() and not tokens[~best].any()


PAGES = [
    "README.md",
    "envs/README.md",
    "configs/README.md",
    "scripts/README.md",
    "empg_jax/algorithms/README.md",
    "empg_jax/serve/README.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`(?:python )?((?:scripts|configs|tests|envs|empg_jax)/[\w/.]+\.\w+)", text):
        assert (ROOT / name).is_file(), name
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link
    for command in re.findall(r"(?m)^(?:\.venv/bin/)?empg-jax (\S+)", text):
        assert command in COMMANDS, command
    for name in re.findall(r"empg-jax train ([a-z][\w./]*\w)", text):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name


def test_the_front_page_is_short_and_leads_to_the_long_ones():
    assert len(README.split()) < 1500
    assert all(f"]({page})" in README for page in PAGES[1:])


def test_the_tree_shows_every_room():
    tree = README.partition("## The tree")[2].split("```")[1]
    package = ROOT / "empg_jax"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/*.py")} | {
        path.name for path in package.glob("*.py")
    }
    shown = set(re.findall(r"(?m)^  (\w+/|\w+\.py)|; (\w+\.py):", tree))
    assert {first or second for first, second in shown} == rooms - {"__init__.py", "__main__.py"}
