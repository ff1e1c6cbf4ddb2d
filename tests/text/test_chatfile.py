"""Chat files: the spellings that are read, and what is said of a line that is none of them."""

import json

import pytest

from empg_jax.text.chatfile import ChatDataError, parse_conversation, read_chat_file

USER = {"role": "user", "content": "Where?"}
ANSWER = {"role": "assistant", "content": "Here."}


def roles(conversation):
    return [message["role"] for message in conversation.messages]


def contents(conversation):
    return [message["content"] for message in conversation.messages]


def test_the_three_spellings_are_the_same_conversation():
    spellings = [
        {"messages": [USER, ANSWER]},
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}]},
        {"prompt": "Where?", "completion": "Here."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Where?"}]}, ANSWER]},
        {"id": 7, "messages": [USER, ANSWER], "source": "elsewhere"},
    ]
    first, *others = map(parse_conversation, spellings)
    assert (roles(first), contents(first)) == (["user", "assistant"], ["Where?", "Here."])
    assert first.is_trained == (False, True) and first.tools is None
    assert all(other == first for other in others)


def test_every_sender_of_sharegpt_has_a_role():
    names = ("system", "human", "gpt", "observation", "model", "function", "assistant", "tool", "user")
    found = parse_conversation({"conversations": [{"from": name, "value": name} for name in names]})
    assert roles(found) == ["system", "user", *["assistant", "tool"] * 3, "user"]


def test_only_the_completion_of_a_prompt_is_learned():
    found = parse_conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert found.is_trained == (False, False, False, True)
    assert parse_conversation({"messages": [USER, ANSWER, USER, ANSWER]}).is_trained == (
        (False, True, False, True)
    )


def test_an_answer_of_weight_zero_is_not_learned():
    found = parse_conversation({"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]})
    assert found.is_trained == (False, False, False, True)
    assert all(set(message) == {"role", "content"} for message in found.messages)


def test_tool_calls_need_no_content_and_tools_stand_beside():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    record = {"messages": [USER, call, {"role": "tool", "content": "a shelf"}, ANSWER], "tools": [{"n": 1}]}
    found = parse_conversation(record)
    assert found.messages[1] == {**call, "content": ""}
    assert found.tools == [{"n": 1}] and found.is_trained == (False, True, False, True)


@pytest.mark.parametrize("filled", [{"tool_calls": None, "name": None}, {"tool_calls": []}])
def test_keys_that_a_table_fills_with_nothing_are_not_there(filled):
    found = parse_conversation({"messages": [USER | filled, ANSWER | filled]})
    assert found.messages == parse_conversation({"messages": [USER, ANSWER]}).messages


@pytest.mark.parametrize("wrap", [lambda call: {"type": "function", "function": call}, lambda call: call])
def test_arguments_that_are_json_text_become_objects(wrap):
    def read(arguments):
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [wrap({"name": "look", "arguments": arguments})],
        }
        return parse_conversation({"messages": [USER, call]}).messages[1]["tool_calls"]

    for given in ('{"city": "Rome"}', {"city": "Rome"}):
        assert read(given) == [wrap({"name": "look", "arguments": {"city": "Rome"}})]
    assert read("") == read(None) == [wrap({"name": "look", "arguments": {}})]
    for given, cause in (
        ("{city", "is not JSON: Expecting property name"),
        ("[1]", "is a list, not an object"),
    ):
        with pytest.raises(ChatDataError, match=rf"messages\[1\]\.tool_calls\[0\]\.(.*\.)?arguments {cause}"):
            read(given)


def test_sharegpt_turns_keep_their_other_keys():
    call = {"name": "look", "arguments": {}}
    turns = [
        {"from": "human", "value": "Where?"},
        {"from": "gpt", "value": "BAD", "weight": 0},
        {"from": "gpt", "value": None, "reasoning_content": "hm", "tool_calls": [call]},
    ]
    found = parse_conversation({"conversations": turns})
    assert found.is_trained == (False, False, True)
    assert found.messages[2] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [call],
    }


def test_a_system_text_beside_the_messages_is_the_first_message():
    for record in ({"messages": [USER, ANSWER]}, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}):
        found, bare = (parse_conversation({**record, "system": text}) for text in ("Be brief.", ""))
        assert bare == parse_conversation(record)
        assert found.messages == ({"role": "system", "content": "Be brief."}, *bare.messages)
        assert found.is_trained == (False, *bare.is_trained)
    for role in ("system", "developer"):
        with pytest.raises(ChatDataError, match=f"text under system and a first message of the role {role}"):
            parse_conversation({"messages": [{"role": role, "content": "x"}, USER, ANSWER], "system": "y"})


BAD = [
    ([1], "is a JSON list, not an object with messages"),
    ({}, "has neither messages nor conversations nor prompt and completion; its keys are none"),
    ({"text": "hi", "prompt": "a"}, "its keys are text, prompt"),
    ({"messages": []}, "messages is no list of messages, or an empty one"),
    ({"messages": "hi"}, "messages is no list"),
    ({"conversations": None}, "conversations is no list"),
    ({"prompt": 3, "completion": "a"}, "prompt is no list"),
    ({"messages": [USER, "hi"]}, r"messages\[1\] is a str, not an object"),
    (
        {"messages": [{"role": "narrator", "content": "x"}]},
        r"messages\[0\] has the role 'narrator'; roles are",
    ),
    ({"messages": [{"content": "x"}]}, r"messages\[0\] has the role None"),
    ({"conversations": [{"from": "bing", "value": "x"}]}, r"conversations\[0\] has the role 'bing'"),
    (
        {"messages": [USER, {"role": "assistant"}]},
        r"messages\[1\] has a content that is no text but NoneType",
    ),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "no text but int"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image'; only text"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "part of type 'str'"),
    ({"messages": [USER, {"role": "assistant", "content": "\ud83c"}]}, "half of a surrogate pair"),
    (
        {"messages": [USER, {**ANSWER, "reasoning_content": ["x"]}]},
        "reasoning_content that is no text but list",
    ),
    ({"messages": [USER, {**ANSWER, "reasoning_content": "\ud83c"}]}, "half of a surrogate pair"),
    ({"messages": [USER, {**ANSWER, "tool_calls": {"n": 1}}]}, "tool_calls is a dict, not a list of calls"),
    ({"messages": [USER, {**ANSWER, "tool_calls": ["x"]}]}, r"tool_calls\[0\] is a str, not an object"),
    ({"messages": [ANSWER, USER]}, "begins with the assistant"),
    ({"messages": [USER, USER]}, "has no message of the assistant to learn from"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, "has no message of the assistant to learn from"),
    ({"prompt": [USER, ANSWER], "completion": [USER]}, "has no message of the assistant to learn from"),
    ({"messages": [USER, ANSWER], "tools": {}}, "tools is a dict, not a list"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_what_is_no_conversation_is_named(record, message):
    with pytest.raises(ChatDataError, match=message):
        parse_conversation(record)


def test_a_file_is_read_line_by_line_and_goes_on_after_a_bad_one(tmp_path):
    good = json.dumps({"messages": [USER, ANSWER]}).encode()
    path = tmp_path / "chat.jsonl"
    deep, long = b'{"messages":' + b"[" * 100_000, b"1" * 5000
    bad = [b"", b"{'messages'", b"\xff\xfe", b"  ", b"[", deep, long]
    path.write_bytes(b"\n".join([good, *bad, good + b"\r"]))
    found = list(read_chat_file(path))
    assert [number for number, _ in found] == [1, 3, 4, 6, 7, 8, 9]
    assert found[0][1] == found[6][1]
    problems = [str(item) for _, item in found[1:6]]
    assert problems[0].startswith("is not JSON: Expecting property name") and "column 2" in problems[0]
    assert problems[1] == "is not UTF-8 text (byte 0)"
    assert "opens a JSON array that goes on over lines" in problems[2]
    assert problems[3].startswith("is not JSON that can be read: maximum recursion depth")
    assert problems[4].startswith("is not JSON that can be read: Exceeds the limit")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ChatDataError, match=r"cannot read .*nothing\.jsonl: No such file"):
        list(read_chat_file(tmp_path / "nothing.jsonl"))
