"""Names of options are checked against what an environment takes, as far as it tells."""

import inspect

import pytest

from empg_envs import ENVS, EnvSpec, check_options, make_env, options_of
from empg_envs.base import PlainParser, PlainPrompts
from empg_envs.swe.backends import make_backend
from empg_envs.swe.env import SweEnv
from empg_envs.swe.images import ImageBackend


def take_all(**options):
    return options


def take_some(size=1, *, color="red", **options):
    return options


def spec(make=take_all, prompts=PlainPrompts, parser=PlainParser):
    return EnvSpec("mine", make, prompts, parser)


def test_an_environment_that_takes_any_name_is_believed():
    check_options(spec(), {"anything": 1})
    check_options(spec(take_some), {"anything": 1})
    check_options(spec(dict), {"anything": 1})  # written in C


def test_names_behind_a_catch_all_may_be_told(monkeypatch):
    monkeypatch.setattr(take_some, "more_options", ("shape",), raising=False)
    check_options(spec(take_some), {"shape": 1, "color": 2})
    message = r"mine has no option 'shpe' \(did you mean 'shape'\?\); its options are size, color, shape"
    with pytest.raises(TypeError, match=message):
        check_options(spec(take_some), {"shpe": 1})


def test_a_prompt_option_may_belong_to_either():
    both = spec(prompts=lambda style: None, parser=lambda strict: None)
    check_options(both, {}, {"style": 1, "strict": 2})
    given = {"style": 1, "strict": 2}
    assert options_of(both.prompts, given) == {"style": 1} and options_of(both.parser, given) == {"strict": 2}
    assert options_of(PlainParser, given) == {} and options_of(take_all, given) == given
    with pytest.raises(TypeError, match=r"has no prompt option 'sty'.*its prompt options are style, strict"):
        check_options(both, {}, {"sty": 1})


@pytest.mark.parametrize("name", ENVS)
def test_every_packaged_environment_tells_its_options(name):
    for kind, options in (("option", ({"zzz": 1},)), ("prompt option", ({}, {"zzz": 1}))):
        with pytest.raises(
            TypeError, match=f"environment {name} has no {kind} 'zzz'; it(s {kind}s are | has no )"
        ):
            check_options(ENVS[name], *options)


def test_the_options_of_swe_are_those_of_its_backends():
    of_backends = {*inspect.signature(make_backend).parameters} - {"name", "options"}
    # The judge's layers are not for a configuration to take away.
    of_images = {*inspect.signature(ImageBackend).parameters} - {"kind", "limits", "layers"}
    assert set(SweEnv.more_options) == of_backends | of_images


def test_a_wrong_option_in_python_is_told_alike():
    with pytest.raises(TypeError, match=r"household has no option 'levle' \(did you mean 'level'\?\)"):
        make_env("household", levle="tiny")
