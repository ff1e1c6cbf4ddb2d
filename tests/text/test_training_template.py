"""The packaged template for Qwen3: it never rewrites; where Qwen3's own does not either, it is the same."""

import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer, load_tokenizer
from empg_jax.text.probe import describe_rows
from empg_jax.text.template import read_source
from tests.text.families import build_bpe
from tests.text.hub import need_tokenizer
from tests.text.test_exact_rows import Said, play, rows_of

QUIET, OPEN = {"enable_thinking": False}, {"opens_thought": True}
CONTENTS = st.sampled_from(
    [
        "go to shelf 2",
        " padded\n",
        "",
        "<think>\nlook first\n</think>\n\ngo",
        "<think>\n\n</think>\n\ngo",
        "<think>look</think>go",
        "x</think>y",
        "<tool_response>\nr\n</tool_response>",
        '<tool_call>\n{"name": "look"}\n</tool_call>',
        "naïve 🍎",
    ]
)
TOOLS = [{"type": "function", "function": {"name": "look", "description": "<any>"}}]
CALLS = [
    {"type": "function", "function": {"name": "look", "arguments": {"at": "é"}}},
    {"name": "take", "arguments": '{"what": "apple"}'},
]


@functools.cache
def training(**options):
    tokenizer = build_bpe("thinking", read_source("qwen3_training"))
    return ChatRenderer(tokenizer, options=dict(options))


@pytest.mark.parametrize("options", [{}, QUIET, OPEN])
def test_an_episode_is_one_row(options):
    renderer = training(**options)
    assert describe_rows(renderer) == "rows per episode: 1" and renderer.tells_tools


@settings(max_examples=100, deadline=None)
@given(
    options=st.sampled_from([{}, QUIET, OPEN]),
    contents=st.lists(CONTENTS, min_size=3, max_size=9),
    role=st.sampled_from(["user", "tool"]),
)
def test_what_was_sampled_stays(options, contents, role):
    renderer = training(**options)
    messages = [{"role": "user", "content": contents[0]}]
    for response, answer in zip(contents[1::2], contents[2::2], strict=False):
        new = [{"role": role, "content": answer}]
        goes_on = renderer.follow(messages, response, new, stopped=True) is not None
        # A policy that opens a thought where the prompt has done so already begins a new row.
        assert goes_on or (options and response.startswith("<think>"))
        messages += [{"role": "assistant", "content": response}, *new]
        if not goes_on:
            break


@functools.cache
def real(is_original):
    folder = need_tokenizer("qwen3")
    return load_tokenizer(folder, chat_template=None if is_original else read_source("qwen3_training"))


ANSWERS = st.builds(
    lambda content, calls, thought: {
        "role": "assistant",
        "content": content,
        **({"tool_calls": calls} if calls else {}),
        **({} if thought is None else {"reasoning_content": thought}),
    },
    CONTENTS,
    st.sampled_from([[], CALLS[:1], CALLS]),
    st.sampled_from([None, None, "hm", "\nhm\n"]),
)
OTHERS = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "tool", "system"]),
    CONTENTS,
)


def spoken(message):
    """What a policy says for a message: the text of its thought, its content and its calls."""
    content, thought = message["content"], message.get("reasoning_content")
    if thought is not None:
        content = "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    for number, call in enumerate(message.get("tool_calls", ())):
        function = call.get("function", call)
        arguments = function["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        content += "\n" if number or content.rpartition("</think>")[2].lstrip("\n") else ""
        content += f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return content


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    messages=st.lists(st.one_of(OTHERS, ANSWERS), min_size=1, max_size=7),
    has_tools=st.booleans(),
    is_quiet=st.booleans(),
)
def test_where_the_models_own_template_does_not_rewrite_it_is_the_same(messages, has_tools, is_quiet):
    messages = [{"role": "user", "content": "Where?"}, *messages]
    options = {**({"tools": TOOLS} if has_tools else {}), **(QUIET if is_quiet else {})}
    own, ours = (
        functools.partial(real(flag).render, add_generation_prompt=True, **options) for flag in (True, False)
    )
    text = own(messages)
    rewrites = any(
        not text.startswith(own(messages[:index]) + spoken(message) + "<|im_end|>")
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    )
    assert rewrites or ours(messages) == text


@pytest.mark.slow
def test_both_histories_of_the_real_models_template():
    own, ours = real(True), real(False)
    for options in ({}, QUIET):
        assert describe_rows(ChatRenderer(own, options=options)).startswith("rows per episode: 3 in 3 turns")
        appending = ChatRenderer(own, options=options, history="append")
        assert describe_rows(appending).startswith("rows per episode: 1 (env.history_mode=append")
        trained = ChatRenderer(ours, options=options)
        question, new = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b\n"}]
        deltas = [each.follow(question, "go", new, stopped=True) for each in (appending, trained)]
        assert deltas[0] == deltas[1] and appending.start(question) == trained.start(question)


@pytest.mark.slow
def test_thirty_turns_of_the_real_model_are_a_tenth_of_the_tokens():
    said = [Said("go to shelf 2")] * 30
    seen = [
        f"You arrive at shelf {i}. On it you see an apple 1, a bowl 2 and a cup 1. " * 2 for i in range(31)
    ]
    counts = {}
    for history in ("template", "append"):
        rows = rows_of(play(ChatRenderer(real(True), options=QUIET, history=history), seen, said)[0])
        counts[history] = len(rows), sum(len(tokens) for tokens, _ in rows)
    (rows, tokens), (kept_rows, kept_tokens) = counts["template"], counts["append"]
    assert (rows, kept_rows) == (30, 1) and tokens > 10 * kept_tokens


@pytest.mark.slow
def test_the_real_llama_does_not_rewrite():
    tokenizer = load_tokenizer(need_tokenizer("llama3_1"))
    for history in ("template", "append"):
        assert describe_rows(ChatRenderer(tokenizer, history=history)) == "rows per episode: 1"
