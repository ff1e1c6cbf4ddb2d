"""Action parsers by name, from the configuration to what the environment in its worker receives."""

import json

import pytest

from empg_envs import ENVS
from empg_envs.base import ParsedAction, PlainPrompts, after_thought
from empg_envs.guided import GuidedPrompts
from empg_envs.harness.server import Session
from empg_envs.parsers import PARSERS, REQUESTS, ask_for, make_parser
from empg_jax.config import load_config
from empg_jax.errors import ConfigError
from empg_jax.rollout.episode import Attempt
from empg_jax.run import assembly, sampling
from empg_jax.sft.demonstrations import DemonstrationError, record_demonstrations
from tests.rollout.scripted import Speaker, run

OWN = ["env.name=null", "env.entry_point=tests.fakes:CountingEnv", "sft.updates=0", "workers.num=1"]
THOUGHT = '<think>\nI could say <action>wait</action>\nor {"action": "wait"}.\n</think>\n\n'
CALL = '<tool_call>\n{"name": "act", "arguments": {"action": "go north"}}\n</tool_call>'
# What the model says after its thought, and what the environment receives of it.
SAID = {
    None: ("go north\nbecause", "go north"),
    "line": ("go north\nbecause", "go north"),
    "tags": ("I go.\n<action> go north </action>\nThere.", "go north"),
    "json": ('```json\n{"why": {"action": "wait"}, "action": "go north"}\n```', "go north"),
    "tool_call": (CALL, "go north"),
    "whole": ("go\nnorth", "go\nnorth"),
}


@pytest.fixture(scope="module")
def pool():
    config = load_config("quickstart", OWN)
    with sampling.make_pool(config) as pool:
        yield pool


@pytest.fixture
def opening(tmp_path):
    """The setting of a chat template whose prompts open a thought."""
    path = tmp_path / "opening.jinja"
    path.write_text(
        "{% for message in messages %}{{ '<|' ~ message.role ~ '|>' ~ message.content ~ '<|end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
    )
    return f"model.chat_template={path}"


def tell(pool, name, text, *more):
    """The turns of an episode whose policy always says ``text``; the second one shows the first action."""
    config = load_config(
        "quickstart", [*OWN, f"env.parser={'null' if name is None else name}", "env.max_turns=2", *more]
    )
    language = assembly.make_language(config)
    engine = Speaker(language.tokenizer.encode(text))
    collector = sampling.make_collector(config, engine, pool, language, stream=0)
    (trajectory,) = run(collector, [Attempt("train", 0, 0, 0)]).values()
    return trajectory.turns


@pytest.mark.parametrize(
    "thought", ["", THOUGHT, THOUGHT.removeprefix("<think>")], ids=["bare", "thinks", "led"]
)
@pytest.mark.parametrize("name", SAID)
def test_the_environment_receives_the_action(pool, name, thought):
    said, action = SAID[name]
    first, second = tell(pool, name, thought + said)
    assert first.is_valid and second.observation.endswith(f"after {action!r}")


@pytest.mark.parametrize("name", SAID)
def test_a_thought_without_an_end_has_no_action(pool, name):
    open_thought = "<think>I could say <action>wait</action>"
    for text in (open_thought, f"<think>Hm.</think>\n{open_thought}"):
        first, second = tell(pool, name, text)
        assert not first.is_valid and second.observation.endswith("after ''")


@pytest.mark.parametrize("name", SAID)
def test_a_thought_that_the_prompt_opens_has_no_action(pool, name, opening):
    said, action = SAID[name]
    first, second = tell(pool, name, said, opening)  # cut, or never ended
    assert not first.is_valid and second.observation.endswith("after ''")
    assert first.response == said
    first, second = tell(pool, name, f"Hm.</think>{said}", opening)
    assert first.is_valid and second.observation.endswith(f"after {action!r}")


def test_tags_by_the_rules_of_verl_count_the_tag_of_the_prompt(opening):
    settings = [
        "sft.updates=0",
        "env.prompt_options={style: alfworld, parser: tags}",
        "model.tokenizer=bytes",
    ]
    for more, is_valid in (([opening], True), ([], False)):
        parser = assembly.make_language(load_config("quickstart", [*settings, *more])).parser
        assert parser("Hm.</think><action>look</action>", {}) == ParsedAction("look", is_valid)


def test_a_program_gets_no_call_out_of_a_thought_that_the_prompt_opens(opening):
    settings = ["env.name=harness", "env.options.command=true", "sft.updates=0", opening]
    parser = assembly.make_language(load_config("quickstart", settings)).parser
    tools = [{"type": "function", "function": {"name": "act", "parameters": {}}}]
    for said, is_called in ((f"Or {CALL}", False), (f"Hm.</think>{CALL}", True)):
        session = Session()
        call = session.add({"messages": [{"role": "user", "content": "a"}], "tools": tools})
        session.answer(call, parser(said, {}).action)
        message = call.wait()
        assert ("tool_calls" in message) == is_called
        again = [{"role": "user", "content": "a"}, message, {"role": "user", "content": "b"}]
        kept = session.add({"messages": again, "tools": tools}).messages[1]["content"]
        assert kept == (said if is_called else f"<think>{said}")


def test_an_expert_of_bare_actions_is_refused_where_the_prompt_opens_a_thought(opening):
    config = load_config("quickstart", ["model.tokenizer=bytes", opening])
    with pytest.raises(DemonstrationError, match=r"opens a thought before every answer.*set sft\.updates=0"):
        record_demonstrations(config, assembly.make_language(config), 2)


@pytest.mark.parametrize("name", ["tags", "json", "tool_call"])
def test_a_response_in_another_format_is_invalid_and_told(pool, name):
    first, second = tell(pool, name, "go north")
    assert not first.is_valid and second.observation.endswith("after 'go north'")


def test_calls_of_tools_reach_the_environment_as_json():
    parser, tools = make_parser("tool_call"), [{"type": "function", "function": {"name": "find"}}]
    call = {"name": "find", "arguments": {"word": "caf\u00e9"}}
    for text in (f"<tool_call>{json.dumps(call)}</tool_call>", json.dumps(call)):
        parsed = parser(text, {"tools": tools})
        assert parsed.is_valid and json.loads(parsed.action) == call
    other = '{"name": "drop", "arguments": {}}'
    for text in (other, f"<tool_call>{other}</tool_call>"):
        assert not parser(text, {"tools": tools}).is_valid


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("<answer>4</answer> or <answer>5</answer>", "5"),
        ("say <action> and then <action>go</action>", "go"),
        ("<action>a\nb</action>", "a\nb"),
        ("<action></action>", None),
        ("<action>go</answer>", None),
    ],
)
def test_the_last_pair_of_tags_counts(text, action):
    parsed = make_parser("tags")(text, {})
    assert (parsed.action, parsed.is_valid) == (action, True) if action else not parsed.is_valid


def test_json_that_is_no_text_stays_json():
    parse = make_parser("json")
    assert parse('{"action": {"x": 1}}', {}).action == '{"x": 1}' and parse('{"action": 3}', {}).action == "3"
    assert not parse('{"move": 3} {"action"', {}).is_valid
    assert after_thought("a < b </think> c </think> d") == " d"


def test_prompts_ask_for_the_format_unless_they_have_words_of_their_own():
    assert REQUESTS.keys() == PARSERS.keys()
    (message,) = ask_for("tags", PlainPrompts()).start("seen", {})
    assert message["content"] == f"{REQUESTS['tags']}\n\nseen"
    (message,) = ask_for("json", GuidedPrompts("Win.")).start("seen", {})
    assert message["content"] == f"Win.\n{REQUESTS['json']}\n\nseen"
    first, *_, last = ask_for("line", PlainPrompts()).window([("a", "b")], "seen", {}, 3)
    assert first["content"].startswith(REQUESTS["line"]) and last["content"] == "seen"
    prompts = ENVS["household"].prompts()
    assert ask_for("line", prompts) is prompts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["env.parser=jsn"], r"env.parser='jsn': unknown choice \(did you mean json\?\)"),
        (["env.parser=json"], "env.parser=json: the expert shows bare actions with sft.updates=130"),
        (
            ["env.name=harness", "env.options.command=true", "env.parser=line"],
            "env.parser=line: an answer to",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        assembly.make_language(load_config("quickstart", overrides))


def test_tools_that_have_names_only_are_left_to_the_environment():
    """As a search engine's: the parser knows no tools then."""
    parser, told = make_parser("tool_call"), {"tools": ["search", "answer"]}
    assert not parser("hi", told).is_valid
    found = parser('<tool_call>{"name": "act", "arguments": {"action": "go"}}</tool_call>', told)
    assert found.is_valid and found.action == "go"


def test_a_long_call_that_never_ends_is_read_in_no_time():
    """Linear, where it was quadratic: 100,000 blanks took minutes."""
    text = "<tool_call>{" + " \n" * 50_000 + "x"
    assert not make_parser("tool_call")(text, {}).is_valid
