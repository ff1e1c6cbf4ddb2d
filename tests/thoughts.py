"""Responses with a thought that speaks of tool calls, and the contents that clients get of them."""

_CALL = '{"name": "add", "arguments": {"a": 1}}'
_DRAFT = '<think>A draft: <tool_call>{"name": "add", "arguments": {"a": 0}}</tool_call> no</think>'
_MENTION = "<think>I should use <tool_call> to ask.</think>"
# Each with a thought that has an end calls add(a=1).
THOUGHTS = [
    (f"{_DRAFT}<tool_call>{_CALL}</tool_call>", _DRAFT),
    (f"{_MENTION} So.\n<tool_call>{_CALL}</tool_call>", f"{_MENTION} So."),
    (f"<think>\nI add.\n</think>\n\n{_CALL}", "<think>\nI add.\n</think>"),
    (f"<think>Or: <tool_call>{_CALL}</tool_call>", f"<think>Or: <tool_call>{_CALL}</tool_call>"),
]
