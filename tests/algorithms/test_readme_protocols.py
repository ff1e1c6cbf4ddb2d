"""The table of protocols in the algorithms' README against the protocols themselves."""

import inspect
import re
from pathlib import Path

import pytest

from empg_jax import algorithms
from empg_jax.algorithms import contract

PLACES = {
    "penalise": contract.Penalise,
    "estimate": contract.Estimate,
    "modulate": contract.Modulate,
    "objective": contract.Objective,
    "keep": contract.Keep,
    "aggregate": contract.Aggregate,
    "kl": contract.Penalty,
    "critic": contract.CriticLoss,
}
PAGE = (Path(algorithms.__file__).parent / "README.md").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_arguments_of_a_part(place):
    (told,) = re.findall(rf"^\| `{place}` \| `\(([\w, ]+)\) ->", PAGE, re.M)
    given = list(inspect.signature(PLACES[place].__call__).parameters)[1:]
    assert told.split(", ") == given
