"""The pure parts: choice of a slot, pieces of text, stop strings, tool calls in text."""

import numpy as np
import pytest

from empg_envs.tool_calls import ToolCall, normalize_messages, parse_calls
from empg_jax.serve.slots import Place, SlotTable
from empg_jax.serve.text import TextStream


def decode(ids):
    return bytes(ids).decode(errors="replace")


def tokens(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def test_slots_go_on_then_empty_ones_then_the_one_used_longest_ago():
    table = SlotTable(2)
    first, second = table.take([1, 2]), table.take([1, 2])
    assert (first, second) == (Place(0, 0), Place(1, 0)) and table.take([1]) is None
    table.keep(0, np.asarray([1, 2, 7, 8]), 2)
    table.keep(1, np.asarray([1, 2, 9]), 2)
    assert table.take([1, 2, 9, 5]) == Place(1, 3)  # the whole conversation
    assert table.take([1, 2, 7, 5]) == Place(0, 3)  # its response was cut, or written in another way
    table.keep(0, np.asarray([1, 2, 7, 5]), 3)
    table.keep(1, np.asarray([1, 2, 9, 5]), 4)
    assert table.take([1, 2]) == Place(0, 2)  # the same prompt again: an old slot's beginning
    assert (table.busy, table.kept) == (1, 1)


def take_turns(table, names, rounds, held):
    """Let conversations take turns, one at a time; returns the share of turns that went on in their slot."""
    kept = 0
    for _ in range(rounds):
        for name in names:
            prompt = held.setdefault(name, [7, name])
            place = table.take(prompt)
            kept += place.kept == len(prompt) - 1
            table.keep(place.slot, np.asarray([*prompt, 5]), len(prompt))
            held[name] = [*prompt, 5, 6]
    return kept / rounds / len(names)


@pytest.mark.parametrize("live, least", [(4, 0.9), (5, 0.6), (8, 0.3), (16, 0.1)])
def test_conversations_that_take_turns_lose_their_slots_gently(live, least):
    """The one whose turn is next was used longest ago: to give up that one would be to keep none."""
    table, held = SlotTable(4), {}
    take_turns(table, range(live), 2, held)
    assert take_turns(table, range(live), 20, held) >= least


def test_finished_conversations_give_way_to_live_ones():
    table, held = SlotTable(4), {}
    take_turns(table, range(8), 6, held)
    live = range(20, 24)
    take_turns(table, live, 4, held)
    assert take_turns(table, live, 4, held) == 1


def test_a_conversation_without_a_response_is_not_taken_for_another():
    table = SlotTable(2)
    for slot, said in ((0, [1, 2, 3]), (1, [4, 5, 6, 7])):
        assert table.take(said[:3]) == Place(slot, 0)
        table.keep(slot, np.asarray(said), 3)
    assert table.take([8, 9, 8]).slot == 0
    table.keep(0, np.asarray([8, 9, 8, 7]), 3)
    assert table.take([5, 5]) == Place(1, 0)  # a new prompt takes the slot that was used longest ago


def test_pieces_of_text_never_change():
    stream, said = TextStream(decode, ["stop"]), tokens("aé st€ stopper")
    pieces = [stream.feed(said[: n + 1], is_final=n + 1 == len(said)) for n in range(len(said))]
    assert "".join(pieces) == "aé st€ "
    assert "\ufffd" not in "".join(pieces) and pieces[1] == ""


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', "", [("add", '{"a": 1}')]),
        (
            'Let me.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "g"}',
            "Let me.",
            [("f", "{}"), ("g", "{}")],
        ),
        ('{"name": "add", "parameters": {"a": "ä"}}', "", [("add", '{"a": "ä"}')]),
        ('<|python_tag|>{"name": "add", "parameters": {}}', "", [("add", "{}")]),
        ('{"name": "add", "parameters": {}}; {"name": "add", "parameters": {"b": 2}}', "",
         [("add", "{}"), ("add", '{"b": 2}')]),
        ('<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call> and\n'
         '<tool_call>{"name": "g", "arguments": {"a": "<tool_call>"}}\n', "",
         [("f", '{"a": "</tool_call>"}'), ("g", '{"a": "<tool_call>"}')]),
        ('{"name": "add", "parameters": {"a": "{x}; {y}"}};', None, []),
        ('{"name": "add", "parameters": {"a": "{x}; {y}"}}', "", [("add", '{"a": "{x}; {y}"}')]),
        ('{"name": "other", "parameters": {}}', None, []),
        ('<tool_call>{"name": "f", "arguments": {}} so</tool_call>', None, []),
        ("<tool_call>" + "[" * 100_000, None, []),
        ("<tool_call>{broken</tool_call>", None, []),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', None, []),
        ("no call", None, []),
        ("", None, []),
    ],
)  # fmt: skip
def test_calls_in_text(text, content, calls):
    found, parsed = parse_calls(text, ["add"])
    assert found == (text if content is None else content)
    assert parsed == [ToolCall(*call) for call in calls]


def test_messages_become_what_templates_read():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = normalize_messages(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        ]
    )
    assert messages[0] == {"role": "user", "content": "ab"}
    assert messages[1]["content"] == "" and messages[1].keys() == {"role", "content", "tool_calls"}
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    with pytest.raises(ValueError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments is not JSON"):
        normalize_messages(
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]
        )
