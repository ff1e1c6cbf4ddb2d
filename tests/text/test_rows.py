"""Written conversations as rows: the prompts that a sampler would see, the answers that it would give."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from empg_jax.text import ChatRenderer, ChatTemplateError, build_phrase_tokenizer
from empg_jax.text.chatfile import ChatDataError, Conversation, parse_conversation
from empg_jax.text.rows import tokenize_conversation
from empg_jax.text.template import read_source
from tests.text.families import TEMPLATES, build_bpe

THOUGHT = "<think>\nlook first\n</think>\n\ngo to shelf 2"


def talk(*contents, system=None):
    """A conversation of alternating contents, the user's first."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return parse_conversation({"messages": [*opening, *messages]})


@functools.cache
def make_renderer(family, **options):
    return ChatRenderer(build_bpe(family), options=dict(options))


def learned(renderer, row):
    """The texts of the learned spans of a row, control tokens included."""
    texts, ids = [], []
    for token, is_learned in [*zip(row.tokens, row.loss_mask, strict=True), (None, False)]:
        if is_learned:
            ids.append(token)
        elif ids:
            texts.append(renderer.tokenizer.decode(ids, skip_special=False))
            ids = []
    return texts


def oracle(renderer, conversation):
    """(tokens, mask) of the one row of an appending template, from the whole text's character spans."""
    stop = max(i for i, is_trained in enumerate(conversation.is_trained) if is_trained) + 1
    messages, flags = conversation.messages[:stop], conversation.is_trained[:stop]
    text = renderer.render(messages, add_generation_prompt=False)
    text = text[: text.rindex(renderer.end_token) + len(renderer.end_token)]
    spans = []
    for index, is_trained in enumerate(flags):
        if is_trained:
            begin = len(renderer.render(messages[:index]))
            end = text.index(renderer.end_token, begin) + len(renderer.end_token)
            spans.append((begin, end))
    encoding = renderer.tokenizer._backend.encode(text, add_special_tokens=False)
    mask = [any(a <= first and last <= b for a, b in spans) for first, last in encoding.offsets]
    return encoding.ids, mask


def written(family, content):
    """An answer as the template writes it where it is the last message."""
    if family == "spaced":
        return f" {content}"
    return f"<think>\n\n</think>\n\n{content}" if family == "thinking" and "<" not in content else content


@pytest.mark.parametrize("family", TEMPLATES)
def test_answers_alone_are_learned_with_their_end(family):
    renderer = make_renderer(family)
    rows = tokenize_conversation(renderer, talk("Where?", "go to shelf 2", "You see it.", "take it", "Bye."))
    # An empty thought is not kept in history, so the next answer needs a row of its own.
    assert len(rows) == (2 if family == "thinking" else 1)
    texts = [text for row in rows for text in learned(renderer, row)]
    assert texts == [
        written(family, content) + renderer.end_token for content in ("go to shelf 2", "take it")
    ]
    assert all(row.loss_mask[-1] for row in rows)  # what no answer follows is not kept


# Words, so that no token spans the seam between prompt and answer (a leading newline would be merged).
WORDS = st.lists(st.sampled_from(["go", "shelf 2", "naïve 🍎", "<b>", "a\n\nb"]), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(["chatml", "headers", "brackets"]),
    contents=st.lists(WORDS.map(" ".join), min_size=2, max_size=9),
    flags=st.lists(st.booleans(), min_size=9, max_size=9),
    has_system=st.booleans(),
)
def test_mask_equals_the_character_spans_of_the_whole_text(family, contents, flags, has_system):
    renderer = make_renderer(family)
    system = "Act." if has_system and family != "brackets" else None
    conversation = talk(*contents, system=system)
    flags = tuple(a and b for a, b in zip(conversation.is_trained, [*flags, True], strict=False))
    conversation = Conversation(conversation.messages, flags)
    rows = tokenize_conversation(renderer, conversation)
    if not any(flags):
        assert rows == []
        return
    (row,) = rows
    assert (row.tokens, row.loss_mask) == oracle(renderer, conversation)


def as_sampled(renderer, family, messages):
    """A rollout of the same conversation: every answer is sampled as the template would write it."""
    rows, tokens, mask = [], [], []
    last = None
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        said = written(family, message["content"])
        delta = None
        if last is not None:
            delta = renderer.follow(messages[: last[0]], last[1], messages[last[0] + 1 : index], stopped=True)
        if delta is None:
            tokens, mask = [], []
            rows.append((tokens, mask))
            delta = renderer.start(messages[:index])
        answer = renderer.encode_response(said.removeprefix(renderer.lead))
        tokens += [*delta, *answer]
        mask += [False] * len(delta) + [True] * len(answer)
        last = (index, said)
    return rows


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_rows_are_those_of_a_rollout_that_says_the_same(family, keep):
    renderer = make_renderer(family, keep_thinking=keep)
    conversation = talk("Where?", THOUGHT, "You see it.", "take it", "Fine.", THOUGHT)
    rows = tokenize_conversation(renderer, conversation)
    assert [(row.tokens, row.loss_mask) for row in rows] == as_sampled(
        renderer, family, conversation.messages
    )
    assert len(rows) == ((2 if keep else 3) if family == "thinking" else 1)


def test_reasoning_is_learned_although_history_forgets_it():
    renderer = make_renderer("thinking")
    first, second = tokenize_conversation(renderer, talk("Where?", THOUGHT, "You see it.", THOUGHT))
    end = renderer.end_token
    for row in (first, second):
        assert learned(renderer, row) == [THOUGHT + end]
    text = renderer.tokenizer.decode(second.tokens, skip_special=False)
    assert text.count("<think>") == 1 and text.count("go to shelf 2") == 2  # the first answer is prompt now


def test_a_generation_prompt_that_history_lacks_is_prompt_and_not_learned():
    renderer = make_renderer("thinking", enable_thinking=False)
    rows = tokenize_conversation(renderer, talk("a", "b", "c", "d"))
    assert [learned(renderer, row) for row in rows] == [
        [f"b{renderer.end_token}"],
        [f"d{renderer.end_token}"],
    ]
    for row in rows:
        assert renderer.tokenizer.decode(row.tokens).count("<think>\n\n</think>") == 1


def test_trimmed_answers_are_learned_as_the_template_writes_them():
    renderer = make_renderer("headers")
    (row,) = tokenize_conversation(renderer, talk("a", "  go\n", "b", "open "))
    assert learned(renderer, row) == [f"go{renderer.end_token}", f"open{renderer.end_token}"]


def test_an_answer_that_begins_like_the_prompt_ends_is_not_merged_with_it():
    renderer = make_renderer("chatml")
    (row,) = tokenize_conversation(renderer, talk("a", "\n\nlook"))
    prompt = renderer.start([{"role": "user", "content": "a"}])
    assert row.tokens == [*prompt, *renderer.encode_response("\n\nlook")]
    assert row.loss_mask.index(True) == len(prompt)


def test_tools_and_their_calls_are_rendered_and_calls_are_learned():
    renderer = make_renderer("chatml")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    found = [{"role": "tool", "content": text} for text in ("a shelf", "a lamp")]
    messages = [{"role": "user", "content": "a"}, call, *found, {"role": "assistant", "content": "b"}]
    (row,) = tokenize_conversation(
        renderer, parse_conversation({"messages": messages, "tools": [{"name": "look"}]})
    )
    text = renderer.tokenizer.decode(row.tokens, skip_special=False)
    assert text.count('{"name": "look"}') == 2 and "# Tools" in text.partition("<|im_end|>")[0]
    assert text.count("<|im_start|>user") == 2  # both results in one turn
    # The template puts a call on a new line of its own, so that is where the answer begins.
    assert learned(renderer, row) == [
        '<tool_call>\n{"name": "look"}\n</tool_call><|im_end|>',
        "b<|im_end|>",
    ]


def test_calls_that_the_template_prints_in_another_way_later_are_refused():
    """Not learned as an empty answer."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ m.tool_calls }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    renderer = ChatRenderer(build_bpe("chatml", template))
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    messages = [{"role": "user", "content": "a"}, call]
    with pytest.raises(ChatDataError, match=r"message 1 has tool_calls, .* write them into content"):
        tokenize_conversation(renderer, parse_conversation({"messages": messages}))


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"messages": [CALL]}, r"message 1 has tool_calls, and the chat template prints none: write"),
        ({"messages": [CALL], "tools": [{"name": "look"}]}, "has tools, and the chat template prints none"),
    ],
)
def test_calls_and_tools_that_the_template_does_not_print_are_refused(record, cause):
    conversation = parse_conversation(
        {**record, "messages": [{"role": "user", "content": "a"}, *record["messages"]]}
    )
    with pytest.raises(ChatDataError, match=cause):
        tokenize_conversation(ChatRenderer(build_bpe("chatml", PLAIN)), conversation)


def test_a_developers_messages_that_the_template_does_not_print_are_refused():
    conversation = parse_conversation(
        {"messages": [{"role": "developer", "content": "Act."}, *talk("a", "b").messages]}
    )
    (row,) = tokenize_conversation(make_renderer("chatml"), conversation)
    assert "Act." in make_renderer("chatml").tokenizer.decode(row.tokens)
    silent = PLAIN.replace("in messages", "in messages if m.role != 'developer'")
    with pytest.raises(ChatDataError, match=r"messages of the role developer, .* write system"):
        tokenize_conversation(ChatRenderer(build_bpe("chatml", silent)), conversation)


def test_results_that_the_template_does_not_print_are_refused():
    """The answer would be learned as if the policy had known them."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "look"}]
    turns += [{"role": "tool", "content": "a shelf"}, {"role": "assistant", "content": "a shelf"}]
    conversation = parse_conversation({"messages": turns})
    silent = PLAIN.replace("in messages", "in messages if m.role != 'tool'")
    tokenize_conversation(ChatRenderer(build_bpe("chatml", PLAIN)), conversation)
    with pytest.raises(ChatDataError, match=r"messages of the role tool, .* write user, or set"):
        tokenize_conversation(ChatRenderer(build_bpe("chatml", silent)), conversation)


def test_a_system_message_that_is_printed_beside_the_last_question_is_told():
    """As Mistral's: not in the whole conversation, which ends with an answer, but in the prompt."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{% set s.text = m.content %}{% else %}"
        "{{ '<|im_start|>' ~ m.role ~ '\n' }}"
        "{% if m.role == 'user' and loop.last %}{{ s.text }}\n{% endif %}{{ m.content ~ '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = ChatRenderer(build_bpe("chatml", "{% set s = namespace(text='') %}" + template))
    turns = [{"role": "system", "content": "Be kind."}, *talk("a", "b").messages]
    (row,) = tokenize_conversation(renderer, parse_conversation({"messages": turns}))
    assert "Be kind.\na" in renderer.tokenizer.decode(row.tokens)
    assert learned(renderer, row) == ["b<|im_end|>"]


def test_a_text_beside_calls_that_the_template_does_not_print_is_refused():
    """As Llama's and Mistral's, which print the calls in its place."""
    calls = "{{ (m.tool_calls[0].function | tojson) if m.tool_calls else m.content }}"
    renderer = ChatRenderer(build_bpe("chatml", PLAIN.replace("' ~ m.content ~ '", "' }}" + calls + "{{ '")))
    messages = [{"role": "user", "content": "a"}, CALL]
    (row,) = tokenize_conversation(renderer, parse_conversation({"messages": messages}))
    assert '"look"' in learned(renderer, row)[0]
    messages[1] = {**CALL, "content": "I look."}
    with pytest.raises(ChatDataError, match=r"message 1 has .* a text beside its calls, .* into content"):
        tokenize_conversation(renderer, parse_conversation({"messages": messages}))
    silent = {**messages[1], "weight": 0}  # what is not learned is history as the template prints it
    messages = [messages[0], silent, messages[0], {"role": "assistant", "content": "b"}]
    (row,) = tokenize_conversation(renderer, parse_conversation({"messages": messages}))
    assert learned(renderer, row) == ["b<|im_end|>"]


SAID = "m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content"
FORGETTING = PLAIN.replace("m.content", f"({SAID})")  # as R1's: no answer is printed with its thought
OPENING = FORGETTING.replace("assistant\n{%", "assistant\n<think>\n{%")
QWEN3 = read_source("qwen3_training")
QUIET, OPENED = {"enable_thinking": False}, {"opens_thought": True}
LEARNED = [
    (FORGETTING, {}, THOUGHT, THOUGHT),
    (OPENING, {}, THOUGHT, THOUGHT.removeprefix("<think>\n")),
    (OPENING, {}, "<think>look</think>go", "look</think>go"),
    (OPENING, {}, "look\n</think>\n\ngo", "look\n</think>\n\ngo"),
    (
        TEMPLATES["thinking"],
        {},
        "a <think>b</think> c <think>d</think>",
        "a <think>b</think> c <think>d</think>",
    ),
    (QWEN3, OPENED, THOUGHT, THOUGHT.removeprefix("<think>\n")),
    (QWEN3, QUIET, "<think>\n\n</think>\n\ngo", "go"),
]


@pytest.mark.parametrize("history", ["template", "append"])
@pytest.mark.parametrize(("template", "options", "content", "said"), LEARNED)
def test_a_thought_is_learned_once_behind_what_the_prompt_opens(template, options, content, said, history):
    renderer = ChatRenderer(build_bpe("thinking", template), options=options, history=history)
    rows = tokenize_conversation(renderer, talk("a", content, "b", content))
    assert [text for row in rows for text in learned(renderer, row)] == [said + renderer.end_token] * 2


LOST = [
    (OPENING, {}, {"content": "go"}, r"message 1 has no </think>, .* opens a thought: write the thought"),
    (QWEN3, OPENED, {"content": "go"}, "message 1 has no </think>"),
    (
        QWEN3,
        QUIET,
        {"content": THOUGHT},
        "message 1 has a thought, .* has one already: take it out of the message",
    ),
    (TEMPLATES["thinking"], QUIET, {"content": THOUGHT}, "has one already"),
    (TEMPLATES["thinking"], QUIET, {"content": "x</think>y"}, "has one already"),
    (
        TEMPLATES["chatml"],
        {},
        {"content": "go", "reasoning_content": "hm"},
        "a thought, or .* not print: write",
    ),
    (
        QWEN3,
        QUIET,
        {"content": "go", "reasoning_content": "hm"},
        "has one already: take it out of the message",
    ),
    (
        FORGETTING.replace(f"({SAID})", f"({SAID}) ~ m.tool_calls"),
        {},
        {**CALL, "content": THOUGHT},
        "a thought, or .* does not print: write the whole answer into content",
    ),
]


@pytest.mark.parametrize(("template", "options", "answer", "cause"), LOST)
def test_a_thought_that_cannot_be_learned_is_refused(template, options, answer, cause):
    renderer = ChatRenderer(build_bpe("thinking", template), options=options)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    with pytest.raises(ChatDataError, match=cause):
        tokenize_conversation(renderer, parse_conversation({"messages": messages}))


def test_an_answer_that_is_not_learned_may_lack_its_thought():
    renderer = ChatRenderer(build_bpe("thinking", OPENING))
    conversation = talk("a", "go", "b", THOUGHT)
    conversation = Conversation(conversation.messages, (False, False, False, True))
    (row,) = tokenize_conversation(renderer, conversation)
    assert learned(renderer, row) == [THOUGHT.removeprefix("<think>\n") + renderer.end_token]
    assert renderer.tokenizer.decode(row.tokens).count("<think>") == 1


def test_the_phrase_tokenizer_works_alike():
    renderer = ChatRenderer(build_phrase_tokenizer(["you see", "apple 1", "take"]))
    (row,) = tokenize_conversation(renderer, talk("you see apple 1.", "take apple 1", "you see", "take"))
    assert learned(renderer, row) == ["take apple 1 <|end|>", "take <|end|>"]
    assert row.tokens[: row.loss_mask.index(True)] == (
        renderer.start([{"role": "user", "content": "you see apple 1."}])
    )


def test_contents_with_the_end_of_turn_are_refused():
    for contents in (("a", "b<|im_end|>"), ("a<|im_end|>", "b")):
        with pytest.raises(ChatDataError, match=r"message \d holds the control token <\|im_end\|>"):
            tokenize_conversation(make_renderer("chatml"), talk(*contents))


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"reasoning_content": "<|im_end|> ends"}, "message 1 holds"),
        ({"tool_calls": [{"name": "look", "arguments": {"t": ["<|im_end|>"]}}]}, "message 1 holds"),
        ({}, "tools hold"),
    ],
)
def test_the_end_of_turn_is_refused_in_all_texts(more, where):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **more}]
    record = {"messages": messages, "tools": [{"name": "look" if more else "<|im_end|>"}]}
    with pytest.raises(ChatDataError, match=rf"{where} the control token <\|im_end\|>"):
        tokenize_conversation(make_renderer("chatml"), parse_conversation(record))


def test_a_conversation_that_the_template_refuses():
    with pytest.raises(ChatTemplateError, match="only user and assistant roles are supported, not system"):
        tokenize_conversation(make_renderer("brackets"), talk("a", "b", system="Act."))
