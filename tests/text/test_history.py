"""Append-only history: conversations only grow, by text that does not depend on what was said before."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer
from empg_jax.text.chatfile import parse_conversation
from empg_jax.text.history import UnstableHistory
from empg_jax.text.probe import describe_rows, find_rewriting
from empg_jax.text.rows import tokenize_conversation
from tests.text.families import ALTERNATING, CHANNELS, CHATML, TEMPLATES, THINKING, build_bpe
from tests.text.test_exact_rows import OBSERVATIONS, SAID, TEXTS, THOUGHT, Said, extends, play, rows_of

QUIET = {"enable_thinking": False}
# A template whose text after an answer depends on what stands before it: it counts questions.
COUNTING = CHATML.replace("'<|im_start|>' + message['role']", "'<|im_start|>' ~ loop.index ~ message['role']")


@functools.cache
def make_renderer(family, history="append", **options):
    return ChatRenderer(build_bpe(family), options=dict(options), history=history)


@pytest.mark.parametrize("options", [{}, QUIET])
def test_a_row_per_turn_becomes_one_with_the_same_sampled_ids(options):
    """The same answers, played with both histories: rows, sampled ids and tokens compared."""
    said = [Said(THOUGHT), Said("go", is_spelled=True), Said(THOUGHT), Said("see 🍎", is_stopped=False)]
    rows = {}
    for history in ("template", "append"):
        renderer = make_renderer("thinking", history, **options)
        rows[history] = rows_of(play(renderer, OBSERVATIONS, said)[0])
    sampled = {name: np.concatenate([ids[mask] for ids, mask in found]) for name, found in rows.items()}
    wanted = np.concatenate([response.tokens(renderer) for response in said])
    assert np.array_equal(sampled["template"], wanted) and np.array_equal(sampled["append"], wanted)
    assert len(rows["append"]) == 1 and len(rows["template"]) == (4 if options else 3)
    tokens = {name: sum(len(ids) for ids, _ in found) for name, found in rows.items()}
    assert tokens["append"] < tokens["template"]


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    options=st.sampled_from([{}, {"keep_thinking": True}, QUIET]),
    turns=st.lists(st.tuples(TEXTS, SAID), min_size=1, max_size=6),
    has_system=st.booleans(),
)
def test_a_conversation_is_its_start_the_responses_and_deltas(family, options, turns, has_system):
    renderer = make_renderer(family, **options)
    has_system = has_system and family not in ALTERNATING
    observations = [text for text, _ in turns]
    said = [response for _, response in turns]
    trajectory, messages = play(renderer, [*observations, "end"], said, has_system)
    ((tokens, mask),) = rows_of(trajectory)
    ids = renderer.start(messages[: 1 + has_system])
    expected = [*ids, *said[0].tokens(renderer)]
    flags = [False] * len(ids) + [True] * (len(expected) - len(ids))
    for observation, before, response in zip(observations[1:], said, said[1:], strict=False):
        suffix = renderer.suffix((), [{"role": "user", "content": observation}])
        delta = renderer.tokenizer.encode(renderer.end_token + suffix)[before.is_stopped :]
        spoken = response.tokens(renderer)
        expected += [*delta, *spoken]
        flags += [False] * len(delta) + [True] * len(spoken)
    assert tokens.tolist() == expected and mask.tolist() == flags


@settings(max_examples=200, deadline=None)
@given(
    family=st.sampled_from(sorted(TEMPLATES)),
    options=st.sampled_from([{}, {"keep_thinking": True}, QUIET]),
    contents=st.lists(TEXTS, min_size=3, max_size=9),
)
def test_where_the_template_does_not_rewrite_both_histories_are_the_same(family, options, contents):
    plain, appending = make_renderer(family, "template", **options), make_renderer(family, **options)
    messages = [{"role": "user", "content": contents[0]}]
    for response, answer in zip(contents[1::2], contents[2::2], strict=False):
        new = [{"role": "user", "content": answer}]
        expected = plain.follow(messages, response, new, stopped=True)
        after = [*messages, {"role": "assistant", "content": response}, *new]
        assert (expected is not None) == extends(plain, messages, response, after)
        found = appending.follow(messages, response, new, stopped=True)
        assert found is not None and (expected is None or found == expected)
        messages = after


def test_a_template_that_prints_differently_behind_different_conversations_is_refused():
    tokenizer = build_bpe("chatml", COUNTING)
    ChatRenderer(tokenizer)
    message = (
        r"after an answer the chat template prints .*3user.* behind a question, but .*4user.* behind a sys"
    )
    with pytest.raises(UnstableHistory, match=message):
        ChatRenderer(tokenizer, history="append")
    shouting = "{%- for m in messages %}{{ '<|im_start|>' + m.content | upper + '<|im_end|>' }}{% endfor %}"
    with pytest.raises(UnstableHistory, match="does not print an answer as it is"):
        ChatRenderer(build_bpe("chatml", shouting), history="append")


def test_an_answer_that_ends_otherwise_in_history_keeps_its_own_end():
    """As gpt-oss does it: channels are sampled, and the last answer ends by a token of its own."""
    renderer = ChatRenderer(build_bpe("channels", CHANNELS), history="append")
    encode = renderer.tokenizer.encode
    assert renderer.end_token == "<|return|>"
    said = [
        Said("<|channel|>analysis<|message|>hm"),
        Said("<|channel|>final<|message|>go"),
        Said("open", False),
    ]
    ((tokens, mask),) = rows_of(play(renderer, OBSERVATIONS[:4], said)[0])
    spans = [response.tokens(renderer).tolist() for response in said]
    between = [
        encode(f"<|start|>user<|message|>{text}<|end|><|start|>assistant") for text in OBSERVATIONS[:3]
    ]
    assert tokens.tolist() == [i for pair in zip(between, spans, strict=True) for part in pair for i in part]
    assert tokens[mask].tolist() == [i for span in spans for i in span]
    cut = renderer.follow(
        [{"role": "user", "content": "a"}], "b", [{"role": "user", "content": "c"}], stopped=False
    )
    assert cut == encode("<|end|><|start|>user<|message|>c<|end|><|start|>assistant")
    assert describe_rows(renderer).startswith(
        "rows per episode: 1 (env.history_mode=append; with template 3 in"
    )


def test_messages_that_a_template_refuses_begin_afresh():
    renderer = make_renderer("brackets")
    question = [{"role": "user", "content": "a"}]
    assert renderer.follow(question, "b", [{"role": "tool", "content": "c"}], stopped=True) is None
    assert renderer.follow(question, "b", question, stopped=True) is not None


def test_a_new_message_that_names_the_fixed_answer_is_printed_whole():
    renderer = make_renderer("thinking")
    said = [{"role": "user", "content": "empganswer0x and empganswer0x"}]
    delta = renderer.follow([{"role": "user", "content": "a"}], THOUGHT, said, stopped=True)
    text = renderer.tokenizer.decode(delta, skip_special=False)
    assert text == "\n<|im_start|>user\nempganswer0x and empganswer0x<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("options", [{}, QUIET])
def test_written_conversations_are_one_row_too(options):
    said = "look first" if options else THOUGHT  # no thought goes on from a prompt with an empty one
    contents = ["Where?", said, "And now?", "go", "Then?", said]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    conversation = parse_conversation({"messages": messages})
    rows = {}
    for history in ("template", "append"):
        renderer = make_renderer("thinking", history, **options)
        rows[history] = tokenize_conversation(renderer, conversation)
    (row,) = rows["append"]
    assert len(rows["template"]) > 1
    decode = functools.partial(renderer.tokenizer.decode, skip_special=False)
    assert decode(row.tokens).count("look first") == 2
    learned = [decode([i for i, m in zip(r.tokens, r.loss_mask, strict=True) if m]) for r in rows["template"]]
    assert decode([i for i, m in zip(row.tokens, row.loss_mask, strict=True) if m]) == "".join(learned)


def test_the_probe_names_turn_line_and_text():
    line = next(n for n, text in enumerate(THINKING.splitlines(), 1) if "{{- content + '<|im_end|>" in text)
    assert describe_rows(make_renderer("thinking", "template", **QUIET)) == (
        f"rows per episode: 3 in 3 turns, because at turn 2 line {line} of the chat template prints "
        r"'answer 1<|im_end|>\n<|im_start|>user\nques' where the policy had "
        r"'<think>\n\n</think>\n\nanswer 1'; "
        "env.history_mode=append keeps answers as sampled: rows per episode: 1"
    )
    assert describe_rows(make_renderer("thinking", **QUIET)) == (
        "rows per episode: 1 (env.history_mode=append; with template 3 in 3 turns)"
    )
    found = find_rewriting(make_renderer("thinking", "template"))
    assert (found.kind, found.turn, found.line, found.rows) == ("with a thought", 2, line, 3)
    for family in ("chatml", "headers", "brackets", "spaced"):
        assert describe_rows(make_renderer(family, "template")) == "rows per episode: 1"
    assert describe_rows(make_renderer("thinking", keep_thinking=True)) == "rows per episode: 1"


# A template that chooses by the system's words whether an answer begins with an empty thought, as SmolLM3's.
BY_SYSTEM = """\
{%- set quiet = messages[0].role == "system" and "/no_think" in messages[0].content -%}
{%- set thought = "<think>\\n</think>\\n" if quiet else "" -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}\n{{ thought if m.role == "assistant" }}{{ m.content }}<|im_end|>\n
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant\n{{ thought }}{%- endif -%}
"""


@pytest.mark.parametrize("history", ["template", "append"])
@pytest.mark.parametrize("words", ["/think", "/no_think"])
def test_a_template_may_choose_by_the_systems_words(history, words):
    """What it prints behind them is what every later prompt has, too."""
    renderer = ChatRenderer(build_bpe("chatml", template=BY_SYSTEM), history=history)
    messages = [{"role": "system", "content": f"Play. {words}"}, {"role": "user", "content": "A door."}]
    new = [{"role": "user", "content": "A wall."}]
    whole = renderer.render([*messages, {"role": "assistant", "content": "go"}, *new])
    for _ in range(2):
        delta = renderer.tokenizer.decode(
            renderer.follow(messages, "go", new, stopped=False), skip_special=False
        )
        assert whole.endswith(delta) and ("<think>" in delta) == (words == "/no_think")
