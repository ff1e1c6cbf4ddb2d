"""The examples on the adapters' page are configurations, and their options exist."""

import re

import pytest

from empg_envs import ENVS
from empg_jax.config import load_config
from empg_jax.run.environment import find_spec
from tests import runs

PAGE = (runs.ROOT / "envs" / "empg_envs" / "adapters" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.M | re.S)
ADAPTED = [
    name for name, spec in ENVS.items() if spec.make.resolve().__module__.startswith("empg_envs.adapters")
]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_loads(number, tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text(EXAMPLES[number], encoding="utf-8")
    assert find_spec(load_config(file, [])).name in ADAPTED
    assert len(EXAMPLES[number].splitlines()) <= 12


def test_every_adapter_has_one():
    assert {load for load in ADAPTED if f"name: {load}\n" in "".join(EXAMPLES)} == set(ADAPTED)
