"""The real client of OpenAI against a server in another process."""

import json

import pytest
from openai import NotFoundError

from tests.serve.servers import TOOLS

HELLO = [{"role": "user", "content": "red one"}]


def chat(client, **options):
    return client.chat.completions.create(model="talker", messages=HELLO, **options)


def test_models_tell_the_longest_conversation(client, http):
    assert [model.id for model in client.models.list()] == ["talker"]
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 1024
    assert client.models.retrieve("talker").model_extra["max_model_len"] == 1024
    for other in ("gpt", "owner/gpt"):
        with pytest.raises(NotFoundError, match=f"model '{other}' does not exist") as missing:
            client.models.retrieve(other)
        assert missing.value.code == "model_not_found"
    with pytest.raises(NotFoundError, match="model 'gpt' does not exist; this server has 'talker'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


def test_a_chat_tells_tokens_with_their_statistics(client):
    answer = chat(client, seed=5, max_tokens=6, logprobs=True, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    tokens, statistics = choice.model_extra["token_ids"], choice.model_extra["empg"]
    assert answer.usage.completion_tokens == len(tokens) <= 6
    assert answer.usage.prompt_tokens == len(answer.model_extra["prompt_token_ids"]) == 5
    assert statistics["version"] == 3 and statistics["versions"] == [0] * len(tokens)
    assert len(statistics["process"]) == 16
    assert len(statistics["entropies"]) == len(tokens) and min(statistics["entropies"]) > 0.1
    assert [item.logprob for item in choice.logprobs.content] == statistics["logprobs"]
    assert max(statistics["logprobs"]) < 0
    assert choice.finish_reason in ("stop", "length")
    assert choice.model_extra.keys() >= {"token_ids", "empg"}
    assert not chat(client, seed=5, max_tokens=6).choices[0].model_extra  # only where it is asked for


def test_tools_are_told_by_the_template_and_calls_are_parsed(client):
    plain = chat(client, temperature=0)
    answer = chat(client, temperature=0, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("add", {"a": 2, "b": 3})
    assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.content is None
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens  # the template told them
    # Without tools in the request the same text is an answer.
    assert "<tool_call>" in plain.choices[0].message.content
    assert chat(client, temperature=0, tools=TOOLS, tool_choice="none").choices[0].message.tool_calls is None
    messages = [
        *HELLO,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "five"},
    ]
    again = client.chat.completions.create(model="talker", messages=messages, tools=TOOLS, temperature=0)
    assert again.choices[0].message.tool_calls[0].id != call.id


def test_a_streamed_chat_is_the_same_text(client):
    whole = chat(client, seed=9, max_tokens=40, temperature=2.0)
    chunks = list(
        chat(
            client,
            seed=9,
            max_tokens=40,
            temperature=2.0,
            stream=True,
            logprobs=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
    )
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    tokens = [token for chunk in chunks[:-1] for token in chunk.choices[0].model_extra["token_ids"]]
    assert len(tokens) == whole.usage.completion_tokens
    assert len(tokens) <= 8 or sum(map(bool, texts)) > 1  # it came in pieces


def test_a_streamed_tool_call(client):
    chunks = list(chat(client, temperature=0, tools=TOOLS, stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "add")]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_several_choices_differ_and_equal_seeds_repeat(client):
    first = chat(client, n=3, seed=1, max_tokens=12, temperature=3.0)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2] and len(set(texts)) == 3
    again = chat(client, n=3, seed=1, max_tokens=12, temperature=3.0)
    assert [choice.message.content for choice in again.choices] == texts
    others = {
        chat(client, seed=seed, max_tokens=12, temperature=3.0).choices[0].message.content
        for seed in (2, -3, 2**40 + 1)
    }
    assert len(others | set(texts)) == 6


def test_completions_of_text_and_of_tokens(client):
    of_text = client.completions.create(
        model="talker", prompt="red one", seed=4, max_tokens=5, logprobs=1, temperature=2.0
    )
    tokens = client.completions.create(
        model="talker",
        prompt="red one",
        seed=4,
        max_tokens=1,
        extra_body={"return_token_ids": True},
    ).model_extra["prompt_token_ids"]
    of_tokens = client.completions.create(
        model="talker", prompt=tokens, seed=4, max_tokens=5, logprobs=1, temperature=2.0
    )
    assert of_text.choices[0].text == of_tokens.choices[0].text
    found = of_text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == of_text.usage.completion_tokens
    assert of_text.choices[0].logprobs == of_tokens.choices[0].logprobs
    several = client.completions.create(
        model="talker", prompt=["red", "blue"], n=2, seed=1, max_tokens=5, temperature=3.0
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in several.choices}) == 4


def test_stop_strings_end_the_text_before_them(client):
    free = client.completions.create(
        model="talker", prompt="red", seed=3, max_tokens=24, temperature=3.0
    )  # fmt: skip
    words = free.choices[0].text.split()
    stop = words[3]
    expected = free.choices[0].text.partition(stop)[0]
    for stream in (False, True):
        answer = client.completions.create(
            model="talker",
            prompt="red",
            seed=3,
            max_tokens=24,
            temperature=3.0,
            stop=[stop, "never said"],
            stream=stream,
        )
        chunks = list(answer) if stream else [answer]
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert answer is not None
