"""Transcript prompts grow exactly; window prompts know only the last turns."""

import functools

import pytest

from empg_jax.errors import RunError
from empg_jax.rollout.context import CallContext, PromptDelta, make_context
from empg_jax.text import ChatRenderer, build_phrase_tokenizer
from tests.text.families import CHATML, build_bpe


class Prompts:
    """Records nothing, decorates a little, so that every part of a prompt is recognizable."""

    def start(self, observation, info):
        return [
            {"role": "system", "content": "Act."},
            {"role": "user", "content": f"{info['task']}: {observation}"},
        ]

    def follow(self, observation, info):
        return observation

    def window(self, history, observation, info, turn):
        told = " ".join(f"[{seen} -> {done}]" for seen, done in history)
        return [{"role": "user", "content": f"{info['task']} {turn} {told} {observation}"}]


INFO = {"task": "find it"}


def play(context, renderer, turns):
    """Yields (delta, whole prompt before the turn, response ids) as a rollout sees them."""
    encode = renderer.tokenizer.encode
    delta = context.start("obs 0", INFO)
    prompt = list(delta.tokens)
    seen = [(delta, prompt, None)]
    for index, (text, stopped) in enumerate(turns):
        response = [*encode(text), *([renderer.end_id] if stopped else [])]
        delta = context.follow(response, text, stopped, f"act {index}", f"obs {index + 1}", INFO)
        prompt = list(delta.tokens) if delta.is_fresh else [*prompt, *response, *delta.tokens]
        seen.append((delta, prompt, response))
    return seen


@pytest.mark.parametrize("family", ["chatml", "headers", "thinking"])
def test_transcript_is_previous_prompt_response_and_delta(family):
    renderer = ChatRenderer(build_bpe(family))
    context = make_context("transcript", Prompts(), renderer, history=0)()
    seen = play(context, renderer, [("go east", True), ("go west and", False), ("open", True)])
    assert [delta.is_fresh for delta, _, _ in seen] == [True, False, False, False]
    contents = ["find it: obs 0", "go east", "obs 1", "go west and", "obs 2", "open", "obs 3"]
    messages = [{"role": "system", "content": "Act."}]
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    assert seen[-1][1] == renderer.start(messages)


def test_transcript_starts_afresh_where_the_template_rewrites_history():
    renderer = ChatRenderer(build_bpe("thinking"))
    context = make_context("transcript", Prompts(), renderer, history=0)()
    seen = play(context, renderer, [("<think>\nhm\n</think>\n\ngo", True), ("open", True)])
    assert [delta.is_fresh for delta, _, _ in seen] == [True, True, False]
    assert "hm" not in renderer.tokenizer.decode(seen[1][1])


def test_a_response_with_foreign_control_tokens_is_kept_as_sampled():
    renderer = ChatRenderer(build_bpe("headers"))
    tokenizer = renderer.tokenizer
    header, other_stop = map(tokenizer.token_to_id, ("<|start_header_id|>", "<|end_of_text|>"))
    body = tokenizer.encode("go")
    for response, stopped in (([*body, other_stop], True), ([header, *body], False)):
        context = make_context("transcript", Prompts(), renderer, history=0)()
        context.start("obs 0", INFO)
        delta = context.follow(response, "go", stopped, "go", "obs 1", INFO)
        assert not delta.is_fresh
        assert delta.tokens[0] == renderer.end_id
        assert header not in delta.tokens[-1:]
        assert other_stop not in delta.tokens


def test_window_tells_only_the_last_turns():
    renderer = ChatRenderer(
        build_phrase_tokenizer(["find it", "obs", "act", "->", "[", "]", *map(str, range(9))])
    )
    make = make_context("window", Prompts(), renderer, history=2)

    def last_prompt(first_observation):
        context = make()
        context.start(first_observation, INFO)
        for index in range(3):
            delta = context.follow([1], "junk", True, f"act {index}", f"obs {index + 1}", INFO)
            assert delta.is_fresh
        return delta

    assert last_prompt("obs 0") == last_prompt("obs 8")
    text = renderer.tokenizer.decode(last_prompt("obs 0").tokens)
    assert text == "find it 3 [ obs 1 -> act 1 ] [ obs 2 -> act 2 ] obs 3"


def test_window_without_history():
    renderer = ChatRenderer(build_phrase_tokenizer(["find it", "obs", *map(str, range(9))]))
    context = make_context("window", Prompts(), renderer, history=0)()
    context.start("obs 5", INFO)
    delta = context.follow([1], "junk", True, "act 0", "obs 1", INFO)
    assert renderer.tokenizer.decode(delta.tokens) == "find it 1 obs 1"


@pytest.mark.parametrize("kind", ["transcript", "window"])
def test_an_episode_forgets_the_one_before(kind):
    renderer = ChatRenderer(build_bpe("chatml"))
    context = make_context(kind, Prompts(), renderer, history=2)()
    first = context.start("obs 0", INFO)
    context.follow([renderer.end_id], "", True, "act 0", "obs 1", INFO)
    assert context.start("obs 0", INFO) == first == PromptDelta(first.tokens, is_fresh=True)


def test_bad_settings_are_named():
    renderer = ChatRenderer(build_bpe("chatml"))
    with pytest.raises(ValueError, match=r"env\.context='scroll' is unknown: use 'transcript' or 'window'"):
        make_context("scroll", Prompts(), renderer, history=2)
    with pytest.raises(ValueError, match=r"env\.history=-1"):
        make_context("window", Prompts(), renderer, history=-1)


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]


class TellingPrompts(Prompts):
    """Says how many tools are left to tell."""

    def start(self, observation, info):
        return [{"role": "user", "content": f"{len(info['tools'])} tools; {observation}"}]

    def window(self, history, observation, info, turn):
        return [{"role": "user", "content": f"{len(info['tools'])} tools; {turn}"}]


@pytest.mark.parametrize(("family", "is_told"), [("chatml", True), ("thinking", False)])
@pytest.mark.parametrize("kind", ["transcript", "window"])
def test_tools_are_told_by_the_template_where_it_can_and_in_words_elsewhere(kind, family, is_told):
    renderer = ChatRenderer(build_bpe(family))
    assert renderer.tells_tools == is_told
    context = make_context(kind, TellingPrompts(), renderer, history=1)()
    decode = functools.partial(renderer.tokenizer.decode, skip_special=False)
    info = {"task": "find it", "tools": TOOLS}
    first = decode(context.start("obs 0", info).tokens)
    assert first.count('"name": "look"') == 1 and "0 tools" in first
    assert ("You have these tools" in first) != is_told
    delta = context.follow([renderer.end_id], "", True, "act", "obs 1", info)
    after = decode(delta.tokens)
    assert delta.is_fresh == (kind == "window")
    if kind == "transcript":
        assert ("<tool_response>\nobs 1" in after) == is_told and "look" not in after
    else:
        assert after.count('"name": "look"') == 1


def test_results_are_words_of_the_user_where_the_template_knows_no_tool():
    known = "{%- if message['role'] == 'tool' %}"
    refusing = CHATML.replace(known, known + "{{ raise_exception('no calls') }}")
    silent = CHATML.replace("+ message['content'] + '\n</tool", "+ '\n</tool")
    for template, role in ((CHATML, "tool"), (refusing, "user"), (silent, "user")):
        renderer = ChatRenderer(build_bpe("chatml", template))
        assert renderer.tells_tools and renderer.role_of_results(TOOLS) == role


@pytest.mark.parametrize(("history", "is_fresh"), [("template", True), ("append", False)])
def test_a_program_that_goes_on_with_its_conversation_stays_in_its_row(history, is_fresh):
    renderer = ChatRenderer(build_bpe("thinking"), history=history)
    context, said = CallContext(renderer), "<think>\nhm\n</think>\n\ngo"
    messages = [{"role": "user", "content": "a"}]
    context.start("a", {"messages": messages, "tools": []})
    messages = [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": "b"}]
    ids = [*renderer.tokenizer.encode(said), renderer.end_id]
    delta = context.follow(ids, said, True, said, "b", {"messages": messages, "tools": []})
    assert delta.is_fresh == is_fresh
    forgotten = {"messages": messages[-1:], "tools": []}  # a history of its own is a row of its own
    assert context.follow(ids, said, True, said, "b", forgotten).is_fresh


def test_tools_of_a_program_that_the_template_does_not_tell_end_the_run():
    context = CallContext(ChatRenderer(build_bpe("thinking")))
    with pytest.raises(RunError, match=r"does not tell them to the model: .*scripts/examples/tools\.jinja"):
        context.start("a", {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS})


@pytest.mark.parametrize("kind", ["transcript", "window"])
def test_instructions_of_an_environment_that_the_template_does_not_tell_end_the_run(kind):
    class Instructed(Prompts):
        def window(self, history, observation, info, turn):
            return self.start(observation, info)

    silent = "{%- set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    told, hidden = (
        make_context(kind, Instructed(), ChatRenderer(build_bpe("chatml", template)), history=1)()
        for template in (CHATML, silent)
    )
    told.start("obs 0", INFO)
    with pytest.raises(RunError, match="environment's conversations have messages of the role system, but"):
        hidden.start("obs 0", INFO)


def test_messages_of_a_program_that_the_template_does_not_tell_end_the_run():
    silent = CHATML.replace(
        "message['role'] != 'system' or not", "message['role'] in 'user assistant' and not"
    )
    context = CallContext(ChatRenderer(build_bpe("chatml", silent)))
    messages = [{"role": "user", "content": "a"}]
    context.start("a", {"messages": messages, "tools": []})
    messages = [*messages, {"role": "assistant", "content": "b"}, {"role": "function", "content": "found"}]
    ids = [*context._renderer.tokenizer.encode("b"), context._renderer.end_id]
    with pytest.raises(RunError, match="messages of the role function, but the chat template does not tell"):
        context.follow(ids, "b", True, "b", "found", {"messages": messages, "tools": []})
    context = CallContext(ChatRenderer(build_bpe("chatml")))
    context.start("a", {"messages": messages, "tools": []})
