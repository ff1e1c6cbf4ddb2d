"""Incremental rendering equals whole-conversation rendering wherever the template allows it."""

import functools
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.config import load_config
from empg_jax.run import sampling
from empg_jax.run.assembly import make_language
from empg_jax.text import ChatRenderer, ChatTemplate, ChatTemplateError, build_phrase_tokenizer
from tests.text.families import ALTERNATING, TEMPLATES, build_bpe

THOUGHT = "<think>\nlook first\n</think>\n\ngo to shelf 2"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def grow(renderer, opening, exchanges, stopped):
    """Plays a conversation as a rollout does; returns the ids, the messages and the number of row splits."""
    messages = list(opening)
    ids = renderer.start(messages)
    splits = 0
    for response, new in exchanges:
        response_ids = renderer.encode_response(response)[: None if stopped else -1]
        delta = renderer.follow(messages, renderer.lead + response, new, stopped=stopped)
        messages += [assistant(response), *new]
        if delta is None:
            splits += 1
            ids = renderer.start(messages)
        else:
            ids = ids + response_ids + delta
    return ids, messages, splits


WITH_SYSTEM = [
    (family, system)
    for family in TEMPLATES
    for system in (False, True)
    if not (system and family in ALTERNATING)
]


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize(("family", "system"), WITH_SYSTEM)
def test_incremental_equals_whole(family, stopped, system):
    tokenizer = build_bpe(family)
    renderer = ChatRenderer(tokenizer)
    opening = [{"role": "system", "content": "Act."}] * system + [user("You see a shelf 2.\nWhat now?")]
    exchanges = [(f"go to shelf {i}", [user(f"You are at shelf {i}. Nothing <happens>.")]) for i in range(4)]
    ids, messages, splits = grow(renderer, opening, exchanges, stopped)
    assert splits == 0
    assert ids == renderer.start(messages)
    assert tokenizer.decode(ids, skip_special=False) == renderer.render(messages)


def test_chatml_tells_the_default_system_message_only_where_none_is_given():
    renderer = ChatRenderer(build_bpe("chatml"))
    default = "<|im_start|>system\nBe helpful.<|im_end|>\n"
    rest = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert renderer.render([user("a")]) == default + rest
    system = {"role": "system", "content": "Act."}
    assert renderer.render([system, user("a")]) == default.replace("Be helpful.", "Act.") + rest


@pytest.mark.parametrize("family", ["chatml", "thinking", "headers"])
def test_answers_of_tools_are_appended_alone_or_together(family):
    renderer = ChatRenderer(build_bpe(family))
    tools = [[{"role": "tool", "content": f"{i}, {j}"} for j in range(i)] for i in range(1, 4)]
    exchanges = [(f"look {i}", new) for i, new in enumerate(tools)]
    ids, messages, splits = grow(renderer, [user("What now?")], exchanges, stopped=True)
    assert splits == 0
    assert ids == renderer.start(messages)


def test_tool_definitions_are_an_option_of_the_renderer():
    tools = [{"name": "look", "parameters": {"at": "<any>"}}]
    renderer = ChatRenderer(build_bpe("chatml"), options={"tools": tools})
    assert '{"name": "look", "parameters": {"at": "<any>"}}<|im_end|>' in renderer.render([user("a")])
    exchanges = [("look", [{"role": "tool", "content": "a shelf"}]), ("take it", [user("Fine.")])]
    ids, messages, splits = grow(renderer, [user("What now?")], exchanges, stopped=True)
    assert splits == 0
    assert ids == renderer.start(messages)


def test_a_response_cut_inside_a_character_keeps_its_bytes():
    tokenizer = build_bpe("chatml")
    renderer = ChatRenderer(tokenizer)
    sampled = tokenizer.encode("see 🍎")[:-1]  # a token per byte, the last one missing
    text = tokenizer.decode(sampled)
    assert text.endswith("\ufffd")
    delta = renderer.follow([user("a")], text, [user("c")], stopped=False)
    assert delta == tokenizer.encode("<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_is_written_as_the_template_writes_it(family):
    renderer = ChatRenderer(build_bpe(family))
    assert renderer.lead == (" " if family == "spaced" else "")
    text = renderer.tokenizer.decode(renderer.encode_response("go"), skip_special=False)
    assert text == renderer.lead + "go" + renderer.end_token


@pytest.mark.parametrize("marks_beginning", [False, True])
@pytest.mark.parametrize("family", ["chatml", "spaced"])
def test_an_answer_behind_its_lead_has_the_ids_that_a_sampler_writes(family, marks_beginning):
    renderer = ChatRenderer(build_bpe(family, marks_beginning=marks_beginning))
    lead, answer = renderer.encode_answer("<go>", "look")
    assert [*lead, *answer] == renderer.encode_response("<go>look")[:-1]
    assert renderer.tokenizer.decode(answer) == "look"


@pytest.mark.parametrize("family", ["chatml", "headers", "brackets"])
def test_a_tokenizer_that_marks_the_beginning_of_a_text_marks_it_once(family):
    tokenizer = build_bpe(family, marks_beginning=True)
    assert tokenizer.encode("go") != tokenizer.encode("<go")[1:]  # it does
    renderer = ChatRenderer(tokenizer)
    exchanges = [("go to shelf", [user("You see it.")]), ("take apple", [user("Fine.")])]
    ids, messages, splits = grow(renderer, [user("What now?")], exchanges, stopped=True)
    assert splits == 0
    assert ids == renderer.start(messages)


def test_a_response_keeps_the_space_that_a_decoder_strips(monkeypatch):
    """A run decodes a response as it stands behind its prompt; else each turn would be a row of its own."""
    tokenizer = build_bpe("spaced", marks_beginning=True)
    renderer = ChatRenderer(tokenizer)
    monkeypatch.setattr(sampling, "Collector", lambda *arguments, **options: arguments)
    language = SimpleNamespace(make_context=None, parser=None, renderer=renderer)
    config = load_config("quickstart", ["rollout.stop=[' stop']"])
    pool = SimpleNamespace(tell=None)
    decode = sampling.make_collector(config, None, pool, language, stream=0)[4]
    ids = renderer.encode_response("go")
    assert decode(ids) == " go" and tokenizer.decode(ids) == "go"
    assert renderer.follow([user("A door.")], decode(ids), [user("A wall.")], stopped=True) is not None
    assert renderer.follow([user("A door.")], "go", [user("A wall.")], stopped=True) is None
    stop = np.asarray(renderer.encode_response("stop")[:-1])
    assert sampling.make_watches(config, renderer)()(stop) == len(stop)


def test_a_response_without_a_lead_has_none():
    """A tokenizer whose words stand between spaces would print one before every response, too."""
    renderer = make_language(load_config("quickstart", [])).renderer
    assert renderer.decode_response(renderer.encode_response("look")) == "look"


def test_the_newline_after_the_end_of_turn_belongs_to_the_delta():
    tokenizer = build_bpe("chatml")
    renderer = ChatRenderer(tokenizer)
    for stopped, expected in ((True, "\n"), (False, "<|im_end|>\n")):
        delta = renderer.follow([user("a")], "b", [user("c")], stopped=stopped)
        text = tokenizer.decode(delta, skip_special=False)
        assert text == expected + "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"


def test_sampled_ids_stay_even_when_the_tokenizer_would_choose_others():
    tokenizer = build_bpe("chatml")
    renderer = ChatRenderer(tokenizer)
    text = "go to shelf 2"
    sampled = [i for c in text for i in tokenizer.encode(c)]  # letter by letter
    assert sampled != tokenizer.encode(text)
    messages = [user("What now?")]
    delta = renderer.follow(messages, tokenizer.decode(sampled), [user("Fine.")], stopped=False)
    ids = renderer.start(messages) + sampled + delta
    assert tokenizer.decode(ids, skip_special=False) == renderer.render(
        [*messages, assistant(text), user("Fine.")]
    )


def test_reasoning_stripped_from_history_starts_a_new_row():
    renderer = ChatRenderer(build_bpe("thinking"))
    messages = [user("Where is it?")]
    assert renderer.follow(messages, THOUGHT, [user("You see it.")], stopped=True) is None
    assert renderer.follow(messages, "go to shelf 2", [user("You see it.")], stopped=True) is not None
    # Earlier reasoning counts too: it was still in the prompt while a tool was answering.
    tool = {"role": "tool", "content": "a shelf"}
    assert renderer.follow(messages, THOUGHT, [tool], stopped=True) is not None
    later = [*messages, assistant(THOUGHT), tool]
    assert renderer.follow(later, "open it", [tool], stopped=True) is not None
    assert renderer.follow(later, "open it", [user("Go on.")], stopped=True) is None


def test_reasoning_kept_in_history_extends_the_row():
    tokenizer = build_bpe("thinking")
    renderer = ChatRenderer(tokenizer, options={"keep_thinking": True})
    exchanges = [(THOUGHT, [user("You see it.")]), ("take it", [user("Done.")])]
    ids, messages, splits = grow(renderer, [user("Where is it?")], exchanges, stopped=True)
    assert splits == 0
    assert ids == renderer.start(messages)


def test_a_generation_prompt_that_is_not_in_history_starts_a_new_row():
    renderer = ChatRenderer(build_bpe("thinking"), options={"enable_thinking": False})
    assert renderer.follow([user("a")], "b", [user("c")], stopped=True) is None


def test_trimmed_answers_start_a_new_row():
    renderer = ChatRenderer(build_bpe("headers"))
    assert renderer.follow([user("a")], "go\n", [user("c")], stopped=True) is None
    assert renderer.follow([user("a")], "go", [user(" c\n")], stopped=True) is not None


@functools.cache
def make_renderer(family):
    return ChatRenderer(build_bpe(family))


CONTENTS = st.sampled_from(
    [
        "go to shelf 2",
        " padded\n",
        "",
        THOUGHT,
        "x</think>y",
        "<tool_response>r</tool_response>",
        "naïve 🍎",
        "\n\nlook",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(CONTENTS, min_size=3, max_size=9),
    use_tools=st.booleans(),
)
def test_quick_and_exact_rendering_agree(family, contents, use_tools):
    renderer = make_renderer(family)
    role = "tool" if use_tools and family not in ALTERNATING else "user"
    messages = [user(contents[0])]
    for response, answer in zip(contents[1::2], contents[2::2], strict=False):
        new = [{"role": role, "content": answer}]
        exact = renderer._exact_delta(messages, response, new)
        quick = renderer._quick_delta(messages, response, new)
        assert quick is None or quick == exact
        messages += [assistant(response), *new]


def test_concatenating_templates_take_the_quick_path():
    plain = ([user("a")], "b", [user("c")])
    awkward = ([user("a")], THOUGHT, [user(" c\n")])
    quick = {name: ChatRenderer(build_bpe(name))._quick_delta for name in ("chatml", "thinking", "headers")}
    assert all(delta(*plain) is not None for delta in quick.values())
    assert quick["chatml"](*awkward) is not None
    assert quick["thinking"](*awkward) is None
    assert quick["headers"](*awkward) is None


def test_a_template_that_drops_what_is_old_is_found_out():
    forgetful = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {{- m.content if loop.revindex < 40 or m.role == 'assistant' else '(omitted)' }}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""
    renderer = ChatRenderer(build_bpe("chatml", forgetful))
    messages = [user("look")]
    extended = []
    for _ in range(25):
        extended.append(renderer.follow(messages, "go", [user("look")], stopped=True) is not None)
        messages += [assistant("go"), user("look")]
    assert extended == [True] * 19 + [False] * 6


def test_a_system_message_that_moves_to_the_last_question_starts_a_new_row():
    moving = """
{%- for m in messages if m.role != 'system' %}
    {%- if m.role == 'user' %}
        {{- '[INST]' + (messages[0].content + '\n' if loop.last and messages[0].role == 'system' else '') }}
        {{- m.content + '[/INST]' }}
    {%- else %}{{- m.content + eos_token }}{% endif %}
{%- endfor %}
"""
    renderer = ChatRenderer(build_bpe("brackets", moving))
    system = {"role": "system", "content": "Act."}
    assert renderer.follow([system, user("a")], "b", [user("c")], stopped=True) is None
    assert renderer.follow([user("a")], "b", [user("c")], stopped=True) is not None


def test_a_hot_follow_is_fast():
    renderer = ChatRenderer(
        build_phrase_tokenizer(["you see", "apple 1", "take", *(f"shelf {i}" for i in range(200))])
    )
    messages = [user("you see apple 1")] + [assistant("take apple 1"), user("you see apple 1")] * 20

    def seconds(index):
        new = [user(f"you see apple 1, shelf {index}, shelf 3, shelf 4. you see shelf {index + 1}.")]
        begin = time.perf_counter()
        renderer.follow(messages, "take apple 1", new, stopped=True)
        return time.perf_counter() - begin

    seconds(0)  # finds the seam
    times = sorted(seconds(index) for index in range(1, 100))
    assert times[10] < 200e-6  # measured 25e-6; the margin is for busy machines


def test_templates_without_an_end_of_turn_are_refused():
    open_ended = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="does not end an assistant's turn"):
        ChatRenderer(build_bpe("chatml", open_ended))


@pytest.mark.parametrize("family", ALTERNATING)
def test_a_conversation_that_the_template_refuses_is_named(family):
    renderer = ChatRenderer(build_bpe(family))
    with pytest.raises(ChatTemplateError, match=r"roles \['user', 'user'\]: roles must alternate"):
        renderer.start([user("a"), user("b")])
    for role in ("system", "tool"):
        message = {"role": role, "content": "Act."}
        with pytest.raises(
            ChatTemplateError, match=f"only user and assistant roles are supported, not {role}"
        ):
            renderer.start([message, user("a")])
    with pytest.raises(ChatTemplateError, match="not tool"):
        renderer.follow([user("a")], "b", [{"role": "tool", "content": "c"}], stopped=True)


@pytest.mark.parametrize("expression", ["message.content.split('')", "message.content.index('?')"])
def test_an_error_of_the_template_itself_is_a_refusal(expression):
    template = ChatTemplate("{% for message in messages %}{{ " + expression + " }}{% endfor %}")
    with pytest.raises(ChatTemplateError, match=r"refused a conversation with roles \['user'\]: "):
        template.render([user("a")], add_generation_prompt=True)


def test_the_phrase_template_refuses_unknown_roles():
    renderer = ChatRenderer(build_phrase_tokenizer(["go"]))
    with pytest.raises(ChatTemplateError, match="unknown role tool"):
        renderer.start([user("go"), assistant("go"), {"role": "tool", "content": "go"}])


def test_follow_needs_a_new_message():
    with pytest.raises(ValueError, match="at least one new message"):
        ChatRenderer(build_bpe("chatml")).follow([user("a")], "b", [], stopped=True)
