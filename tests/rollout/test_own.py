"""Prompt builders, parsers and environments of one's own: from the configuration to what the policy reads."""

import pytest

from empg_envs.conformance import Subject, checks
from empg_jax.errors import RunError
from empg_jax.rollout.own_code import ParserFault, PromptFault
from empg_jax.run import assembly, sampling
from empg_jax.run.announcing import say_once
from empg_jax.run.environment import check_warm_start, find_spec
from empg_jax.types import Status
from tests import runs
from tests.rollout.scripted import Speaker, attempts, run

CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'


class Stage:
    """Plays with a configuration; keeps what was sampled at, told and said."""

    def __init__(self, spec, said, *overrides):
        own = ["env.name=null", f"env.entry_point=tests.rollout.own:{spec}", "env.options={}"]
        # A byte is a token, so that any text can be said.
        own += [
            "sft.updates=0",
            "model.tokenizer=bytes",
            "rollout.max_tokens=4096",
            "train.micro_tokens=4096",
        ]
        self.overrides = [*own, *overrides]
        self.config = runs.configure("unused", *self.overrides)
        self.language = assembly.make_language(self.config)
        self.engine = Speaker([*self.language.tokenizer.encode(said), self.language.renderer.end_id])
        self.events, self.said = [], []

    def play(self, count=1, *, num_tasks=None):
        """Plays tasks one after another; their trajectories."""
        tell = say_once(self.said.append, lambda event, /, **fields: self.events.append((event, fields)))
        with sampling.make_pool(self.config, tell) as pool:
            collector = sampling.make_collector(
                self.config, self.engine, pool, self.language, stream=0, num_tasks=num_tasks
            )
            return list(run(collector, attempts(count)).values())

    @property
    def prompts(self):
        decode = self.language.tokenizer.decode
        return [decode(prompt, skip_special=False) for prompt in self.engine.prompts]


@pytest.mark.parametrize("context", ["transcript", "window"])
@pytest.mark.parametrize("parser", [[], ["env.parser=tool_call"]])
def test_declared_tools_are_told_in_words_where_the_template_has_no_place(context, parser):
    stage = Stage("PLAIN", CALL, "env.options.kind=tools", f"env.context={context}", *parser)
    assert not stage.language.renderer.tells_tools
    (found,) = stage.play()
    assert [turn.is_valid for turn in found.turns] == [True, True]
    told = stage.prompts if context == "window" else stage.prompts[:1]
    for prompt in told:
        assert (
            prompt.count('{"name": "look", "description": "look around"') == 1 and "Call one with" in prompt
        )
        assert '"act"' not in prompt  # the environment has no such tool


def test_a_call_is_asked_for_where_no_tools_are_declared():
    stage = Stage("PLAIN", "go", "env.parser=tool_call")
    stage.play()
    assert '{"name": "act", "arguments": {"action": "..."}}' in stage.prompts[0]


def test_a_parser_that_raises_costs_its_episodes_and_is_said_once():
    stage = Stage("RAISING", "bad")
    found = stage.play(3)
    assert {(t.outcome.status, t.outcome.reason) for t in found} == {(Status.DISCARDED, "parser_error")}
    (line,) = stage.said
    assert line == (
        "the action parser tests.rollout.own.make_raising.<locals>.parse raised KeyError: 'oops'; the "
        "response begins 'bad' (task train/0)"
    )
    assert stage.events == [("parser_error", {"detail": line})]
    (fine,) = Stage("RAISING", "good").play()
    assert fine.outcome.is_trained


def test_a_parser_that_raises_at_every_task_ends_the_run():
    with pytest.raises(ParserFault, match=r"raised KeyError: 'oops'.*; so it was with 3 tasks of env\.split"):
        Stage("RAISING", "bad").play(4, num_tasks=3)


@pytest.mark.parametrize(("context", "method"), [("transcript", "start"), ("window", "window")])
def test_a_prompt_builder_that_raises_at_a_task_costs_its_episodes_and_is_said_once(context, method):
    more = [f"env.context={context}", f"env.prompt_options.method={method}"]
    stage = Stage("PICKY", "go", "env.options.kind=hint", "env.options.length=1", *more)
    first, *others = stage.play(3, num_tasks=100)
    assert first.outcome.is_trained
    assert {(t.outcome.status, t.outcome.reason) for t in others} == {(Status.DISCARDED, "prompt_error")}
    (line,) = stage.said
    assert line == (
        f"the prompt builder Picky: {method} raised KeyError: 'hint'; the observation begins "
        "'a page, step 0' (task train/1)"
    )
    told = [event for event in stage.events if event[0] != "task_quarantined"]
    assert told == [("prompt_error", {"detail": line})]


@pytest.mark.parametrize("method", ["start", "follow"])
def test_a_prompt_builder_that_raises_at_every_task_ends_the_run(method):
    told = rf"the prompt builder Picky: {method} raised KeyError.* 3 tasks of env\.split=train, and no "
    with pytest.raises(PromptFault, match=told):
        Stage("PICKY", "go", f"env.prompt_options.method={method}").play(4, num_tasks=3)


def test_an_option_may_be_the_prompt_builders_alone():
    """The plain parser beside it takes none."""
    stage = Stage("PICKY", "go", "env.prompt_options.method=other")
    assert stage.play()[0].outcome.is_trained
    config = runs.configure("unused", *stage.overrides, "sft.updates=1")
    check_warm_start(config, find_spec(config))
    subject = Subject("tests.rollout.own:PICKY", prompt_options={"method": "other"})
    checks.check_parser(subject)
    checks.check_prompts(subject)


def test_what_a_parser_returns_is_checked():
    with pytest.raises(RunError, match=r"own\.make_texting\S+ returned str 'go'; expected a ParsedAction"):
        Stage("TEXTING", "go").play()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("SILENT", "the prompt builder Silent: follow returned NoneType None; expected str"),
        ("LOOSE", r"the prompt builder Loose: start returned as message 1 dict \{'role': 'user'\}; expected"),
    ],
)
def test_what_a_prompt_builder_returns_is_checked(spec, told):
    with pytest.raises(RunError, match=told):
        Stage(spec, "go").play()


def test_a_control_token_in_an_observation_is_said_once():
    stage = Stage("PLAIN", "go", "env.options.kind=control")
    end = stage.language.renderer.end_token
    assert end == "<|end|>"
    stage.play(2)
    (line,) = stage.said
    assert line.startswith(f"an observation of tests.rollout.own:PLAIN holds {end}, which the model reads")
    assert "'a page with <|end|> in it, step 0', at character 12" in line
    ((event, fields),) = stage.events
    assert (event, fields["token"]) == ("control_token_observed", end)
    assert fields["environment"] == "tests.rollout.own:PLAIN"


@pytest.mark.parametrize(
    ("more", "is_said"),
    [
        (["algorithm.name=graft"], True),
        (["algorithm.name=graft", "env.anchor=state"], False),
        (["algorithm.name=grpo"], False),
    ],
)
def test_states_that_read_alike_are_said_once_where_credit_compares_them(more, is_said):
    stage = Stage("PLAIN", "go", "env.options.kind=still", "algorithm.modulation=none", *more)
    stage.play(2)
    told = "'Nothing happens.' in several states of a task, and algorithm.name=graft takes them for one"
    assert [told in line and "env.anchor=state" in line for line in stage.said] == [True] * is_said
    assert [event for event, _ in stage.events] == ["states_merged"] * is_said


def test_declared_tools_are_checked():
    with pytest.raises(
        RunError, match=r"the environment's info: tools\[0\] must be \{\"type\": \"function\""
    ):
        Stage("PLAIN", CALL, "env.options.kind=nameless").play()
