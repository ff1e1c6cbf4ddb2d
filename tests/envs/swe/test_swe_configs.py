"""Configurations: what a run with repositories is refused, and the time limits of the packaged ones."""

from pathlib import Path

import pytest

import empg_envs
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.run.environment import find_spec

CONFIGS = Path(empg_envs.__file__).resolve().parents[2] / "configs"


def test_a_run_whose_turns_end_before_the_work_is_graded_is_refused() -> None:
    graded = ["env.options.tools=terse", "env.options.submit_at_limit=true"]
    for changes in ([*graded, "env.options.max_turns=9"], [*graded, "env.max_turns=5"]):
        with pytest.raises(
            ConfigError, match=r"submit_at_limit grades an episode after max_turns=.*make them equal"
        ):
            find_spec(load_config("swe_tiny", changes))
    for changes in (graded, [*graded, "env.max_turns=9"], ["env.max_turns=5"]):
        assert find_spec(load_config("swe_tiny", changes)).name == "swe"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*swe*.yaml")), ids=lambda path: path.stem)
def test_the_last_step_of_an_episode_has_the_time_that_it_may_take(path: Path) -> None:
    config = load_config(str(path))
    options = {"command_timeout": 90.0, "grade_timeout": 300.0, **config.env.options}
    # A last command; what is installed or made for the judge, and two sessions of tests.
    assert config.workers.step_timeout >= options["command_timeout"] + 3 * options["grade_timeout"] + 20
