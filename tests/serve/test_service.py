"""Requests that are refused before work is done for them."""

import asyncio
import json
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from empg_jax.engine.engine import Response
from empg_jax.serve import reload
from empg_jax.serve.app import make_app
from empg_jax.serve.chat import Chat
from empg_jax.serve.driver import Driver, Update
from empg_jax.serve.service import Service
from empg_jax.serve.wire import ApiError
from empg_jax.text import (
    ChatRenderer,
    Tokenizer,
    build_byte_tokenizer,
    build_phrase_tokenizer,
    load_tokenizer,
)
from tests.text.families import build_bpe
from tests.thoughts import THOUGHTS

HELLO = [{"role": "user", "content": "red"}]


@pytest.fixture
def service(monkeypatch):
    """A service of 12 responses at once, which lists the lengths of the texts that it encodes."""
    tokenizer = build_byte_tokenizer()
    sizes = {"vocab_size": tokenizer.vocab_size, "max_tokens": 64, "max_choices": 12}
    service = Service("model", tokenizer, ChatRenderer(tokenizer), **sizes)
    encode, service.encoded = tokenizer.encode, []

    def counted(text, **options):
        service.encoded.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    return service


def test_too_many_responses_are_refused_before_a_prompt_is_encoded(service):
    with pytest.raises(ApiError, match="200000 prompts with n=128 ask for 25600000 responses") as refused:
        service.read_completion({"prompt": ["a"] * 200_000, "n": 128})
    assert refused.value.status == 400
    for read, body in (
        (service.read_chat, {"messages": HELLO, "n": 13}),
        (service.read_generate, {"token_ids": [5], "sampling_params": {"n": 13}}),
    ):
        with pytest.raises(ApiError, match="at most 12 fit at once") as refused:
            read(body)
        assert refused.value.status == 400
    assert service.encoded == []
    assert service.read_completion({"prompt": ["a"] * 6, "n": 2}).num_choices == 12


@pytest.mark.parametrize("has_begin", [False, True])
def test_a_text_to_complete_begins_as_the_tokenizer_says(has_begin, tmp_path):
    build_byte_tokenizer().save(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    if has_begin:
        backend.add_special_tokens(["<|begin|>"])
        begin = backend.token_to_id("<|begin|>")
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
        backend.save(str(tmp_path / "tokenizer.json"))
    service = Service("model", load_tokenizer(tmp_path), None, vocab_size=300, max_tokens=64)
    ids, bare = backend.encode("red").ids, [*b"red"]

    def read(prompt, **options):
        return [found.tolist() for found in service.read_completion({"prompt": prompt, **options}).prompts]

    assert ids == ([begin, *bare] if has_begin else bare)
    assert read("red") == [ids] and read(["red", bare]) == [ids, bare]
    assert read("red", add_special_tokens=False) == read(bare) == [bare]
    asked = []
    chat = Chat(service, None, {}, None, has_template=False)
    chat._sample = lambda one, take: asked.append(one)
    chat.ask("red", print)
    assert asked[0].prompts[0].tolist() == ids


def test_a_prompt_that_is_far_too_long_is_not_tokenized_whole(service):
    long = "a" * 100_000
    for read, body in (
        (service.read_completion, {"prompt": long}),
        (service.read_chat, {"messages": [{"role": "user", "content": long}]}),
    ):
        with pytest.raises(ApiError, match=r"length is 64 tokens .* has 1000\d\d characters") as refused:
            read(body)
        assert refused.value.code == "context_length_exceeded"
    assert service.encoded == [16 * 64, 16 * 64]


def test_only_short_texts_are_kept(service):
    renderer = service._renderer
    for text, times in (("short", 1), ("long " * 1000, 2)):
        service.encoded.clear()
        assert renderer.encode(text) == renderer.encode(text)
        assert service.encoded == [len(text)] * times


class Saying:
    """A driver whose engine says the same text at once: streamed, first two tokens, then all."""

    failure = None

    def __init__(self, service, text):
        self._said = np.asarray(service._tokenizer.encode(text), np.int32)

    def submit(self, jobs, *, wakes):
        for job in jobs:
            for said in (self._said[:2], self._said) if job.is_streamed else (self._said,):
                zeros = np.zeros(len(said), np.float32)
                numbers = {"logprobs": zeros, "entropies": zeros, "versions": said}
                response = Response(0, job.prompt, said, **numbers, finish_reason="stop")
                job.notify(Update(response, is_final=said is self._said))

    def wake(self):
        pass

    def cancel(self, jobs):
        pass


def post(service, driver, route, body):
    app = make_app(service, driver, api_key=None, max_body_bytes=1 << 20)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return await client.post(route, content=json.dumps(body))

    return asyncio.run(ask())


def read_choices(answer):
    """List the choices of an answer, or of all chunks of a stream."""
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    return [choice for body in lines or [answer.text] for choice in json.loads(body)["choices"]]


def call_tools(service, text, is_streamed, *, ending="", **more):
    """Ask in a chat with the tool ``add``, of a policy that says a text; the prompt has an ``ending``."""

    def render(messages, tools=()):
        return ("tools" if tools else "none") + ending

    service._renderer = SimpleNamespace(
        render=render, encode=service._tokenizer.encode, find_untold=lambda messages, variables: None
    )
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    body = {"messages": HELLO, "tools": tools, "stream": is_streamed, **more}
    return post(service, Saying(service, text), "/v1/chat/completions", body)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("text", "content"), THOUGHTS)
def test_a_call_that_a_thought_mentions_is_not_made(text, content, is_streamed, service):
    answer = call_tools(service, text, is_streamed)
    choice = read_choices(answer)[-1]
    message = choice["delta" if is_streamed else "message"]
    calls = [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", ())]
    assert message["content"] == content
    assert calls == ([{"a": 1}] if "</think>" in text else [])
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_within_the_thought_that_the_prompt_opens_makes_no_call(is_streamed, service):
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    for said, is_made in ((f"Maybe {call}", False), (f"So.</think>{call}", True)):
        choice = read_choices(call_tools(service, said, is_streamed, ending="<think>\n"))[-1]
        message = choice["delta" if is_streamed else "message"]
        assert ("tool_calls" in message) == is_made
        assert message["content"] == ("So.</think>" if is_made else said)
        assert choice["finish_reason"] == ("tool_calls" if is_made else "stop")


@pytest.mark.parametrize("has_tokens", [False, True])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_thought_that_the_prompt_opens_is_told(is_streamed, has_tokens, service):
    for ending, told in (("<think>\n", True), ("", None)):
        answer = call_tools(service, "So", is_streamed, ending=ending, return_token_ids=has_tokens)
        fields = {}
        for choice in read_choices(answer):
            fields = choice.get("empg", {}) | fields
        assert fields.get("opens_thought") is told and ("entropies" in fields) == has_tokens


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("is_parallel", "count"), [(True, 2), (None, 2), (False, 1)])
def test_a_request_without_parallel_calls_gets_the_first(is_parallel, count, is_streamed, service):
    text = "".join(
        f'<tool_call>{{"name": "add", "arguments": {{"a": {number}}}}}</tool_call>' for number in range(2)
    )
    answer = call_tools(service, text, is_streamed, parallel_tool_calls=is_parallel, return_token_ids=True)
    choices = read_choices(answer)
    message = choices[-1]["delta" if is_streamed else "message"]
    calls = [json.loads(call["function"]["arguments"])["a"] for call in message["tool_calls"]]
    assert calls == list(range(count)) and choices[-1]["finish_reason"] == "tool_calls"
    # The tokens are those that were sampled, whatever the answer tells of them.
    assert service._tokenizer.decode([token for choice in choices for token in choice["token_ids"]]) == text
    wrong = call_tools(service, text, is_streamed, parallel_tool_calls="no")
    assert wrong.status_code == 400 and "parallel_tool_calls must be true or false" in wrong.text


def test_messages_that_the_template_does_not_print_are_refused(service):
    source = service._tokenizer.chat_template.source
    silent = source.replace("in messages", "in messages if message.role in ('user', 'assistant')")
    assert silent != source
    tokenizer = build_byte_tokenizer(silent)
    service = Service("model", tokenizer, ChatRenderer(tokenizer), vocab_size=300, max_tokens=99)
    for role, right in (("developer", "system"), ("tool", "user")):
        body = {"messages": [*HELLO, {"role": role, "content": "x"}]}
        answer = post(service, None, "/v1/chat/completions", body)
        assert answer.status_code == 400
        assert f"prints nothing of messages of the role {role}; send them as {right}" in answer.text
    service.read_chat({"messages": HELLO})


@pytest.mark.parametrize("name", ["add_generation_prompt", "index", "changed", "variables"])
def test_variables_of_a_request_may_have_any_name(name, service):
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    service.read_chat({"messages": messages, "chat_template_kwargs": {name: False}})


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_tool_call_with_half_a_character_is_answered(is_streamed, service):
    text = '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>'
    answer = call_tools(service, text, is_streamed)
    assert answer.status_code == 200 and "\\ud800" in answer.text
    if is_streamed:
        assert answer.text.endswith("data: [DONE]\n\n") and "tool_calls" in answer.text
    else:
        call = answer.json()["choices"][0]["message"]["tool_calls"][0]
        assert json.loads(call["function"]["arguments"]) == {"a": "\ud800"}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_tool_call_with_a_number_that_json_lacks_is_text(number, service):
    text = f'<tool_call>{{"name": "add", "arguments": {{"a": {number}}}}}</tool_call>'
    choice = call_tools(service, text, is_streamed=False).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text} and choice["finish_reason"] == "stop"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_control_tokens_are_in_the_text_where_they_are_asked_for(is_streamed, service):
    end, other = "<|end|>", "<|user|>"
    driver = Saying(service, f"red{other}blue{end}")

    def read(**options):
        body = {"prompt": "a", "stream": is_streamed, **options}
        choices = read_choices(post(service, driver, "/v1/completions", body))
        return "".join(choice["text"] for choice in choices)

    assert read() == read(skip_special_tokens=True) == "redblue"
    assert read(skip_special_tokens=False) == f"red{other}blue"


def build_pieces():
    """Build a tokenizer of characters and bytes like Llama 2's, whose decoder strips the first space."""
    characters = [*"▁Theaisoknw.", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *characters])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (build_pieces, "is né ok.</s>"),
        (build_byte_tokenizer, "né is ok.<|end|>"),
        (lambda: build_phrase_tokenizer(["The sea", "is", "ok"]), "is ok.<|end|>"),
    ],
)
def test_a_completion_goes_on_with_its_prompt_and_tells_where_its_tokens_are(build, said, is_streamed):
    tokenizer = build()
    service = Service("model", tokenizer, None, vocab_size=tokenizer.vocab_size, max_tokens=64)
    prompt, ids = tokenizer.encode("The sea"), tokenizer.encode(said)
    body = {"prompt": prompt, "logprobs": 1, "stream": is_streamed}
    answer = post(service, Saying(service, said), "/v1/completions", body)
    choices = read_choices(answer)
    text = "".join(choice["text"] for choice in choices)
    assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *ids])
    words, places = (
        [item for choice in choices for item in choice["logprobs"][name]]
        for name in ("tokens", "text_offset")
    )
    whole = [(word, place) for word, place in zip(words, places, strict=True) if "\ufffd" not in word]
    assert all(text.startswith(word, place) for word, place in whole[:-1])
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(text) and len(places) == len(ids)
    halves = [place for word, place in zip(words, places, strict=True) if "\ufffd" in word]
    assert halves == [text.index("é")] * 2 if "é" in said else not halves


@pytest.mark.parametrize("build", [build_pieces, lambda: build_bpe("chatml"), build_byte_tokenizer])
def test_parts_of_a_character_tell_their_bytes(build):
    tokenizer, said = build(), "is né ok."
    service = Service("model", tokenizer, None, vocab_size=tokenizer.vocab_size, max_tokens=64)
    service._renderer = SimpleNamespace(
        render=lambda messages, tools=(): "The sea",
        encode=tokenizer.encode,
        find_untold=lambda messages, variables: None,
    )
    answer = post(
        service, Saying(service, said), "/v1/chat/completions", {"messages": HELLO, "logprobs": True}
    )
    tokens = read_choices(answer)[0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode().strip() == said
    assert any("\ufffd" in token["token"] for token in tokens)


@pytest.mark.parametrize("options", [{}, {"skip_special_tokens": False}])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_text_ends_before_the_stop_token_of_the_request(is_streamed, options, service):
    body = {"prompt": "a", "stream": is_streamed, "stop_token_ids": [ord("\n")], **options}
    choices = read_choices(post(service, Saying(service, "red\n"), "/v1/completions", body))
    assert "".join(choice["text"] for choice in choices) == "red"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_what_ended_a_response_is_told(is_streamed, service):
    for said, options, found in (
        ("red, b", {"stop": ["b", ","]}, ","),
        ("red\n", {"stop_token_ids": [ord("\n")]}, ord("\n")),
        ("red<|end|>", {"stop": [","]}, None),
    ):
        body = {"prompt": "a", "stream": is_streamed, **options}
        choices = read_choices(post(service, Saying(service, said), "/v1/completions", body))
        assert choices[-1]["stop_reason"] == found
        assert not any("stop_reason" in choice for choice in choices[:-1])


def test_each_prompt_has_its_tokens(service):
    driver, route = Saying(service, "said"), "/v1/completions"
    body = {"prompt": ["red", "blue"], "n": 2, "return_token_ids": True}
    answer = post(service, driver, route, body).json()
    texts = ["".join(map(chr, choice["prompt_token_ids"])) for choice in answer["choices"]]
    assert texts == ["red", "red", "blue", "blue"] and "prompt_token_ids" not in answer
    answer = post(service, driver, route, body | {"prompt": "red"}).json()
    assert answer["prompt_token_ids"] == [*b"red"]
    assert [choice["prompt_token_ids"] for choice in answer["choices"]] == [[*b"red"]] * 2
    chunks = read_choices(post(service, driver, route, body | {"prompt": "red", "stream": True}))
    begun = [choice for choice in chunks if "prompt_token_ids" in choice]
    assert sorted(choice["index"] for choice in begun) == [0, 1]
    assert all(choice["prompt_token_ids"] == [*b"red"] for choice in begun)


def test_weights_that_are_published_one_after_the_other_have_numbers_of_their_own(monkeypatch, tmp_path):
    engine = SimpleNamespace(config=SimpleNamespace(slots=1), version=3, base=None)
    driver = Driver(engine, max_waiting=1)  # nobody asks, so it loads none of them
    monkeypatch.setattr(reload, "_load", lambda engine, path: {})
    route = reload.make_reload(engine, driver, has_key=True)

    async def publish(**more):
        answer = await route.handler(None, {"model_path": str(tmp_path), **more})
        assert f"from weights of version {driver.version}" in json.loads(answer.body)["message"]
        return driver.version

    async def play():
        assert [await publish(), await publish(), await publish(weight_version=9), await publish()] == [
            4,
            5,
            9,
            10,
        ]

    asyncio.run(play())


HUGE = int("9" * 400)
UNREADABLE = {
    "half a pair in a prompt": ("/v1/completions", {"prompt": "\ud800"}, "cannot be read"),
    "half a pair in a message": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "\ud800"}]},
        "cannot be read",
    ),
    "half a pair in a key": ("/v1/completions", {"prompt": "red", "\ud800": 1}, "is not supported"),
    "temperature": ("/v1/completions", {"prompt": "red", "temperature": HUGE}, "temperature=999"),
    "top_p": ("/v1/completions", {"prompt": "red", "top_p": HUGE}, "top_p=999"),
    "messages as a variable": (
        "/v1/chat/completions",
        {"messages": HELLO, "chat_template_kwargs": {"messages": []}},
        "chat_template_kwargs.messages",
    ),
    "self as a variable": (
        "/v1/chat/completions",
        {"messages": HELLO, "chat_template_kwargs": {"self": 1}},
        "chat_template_kwargs.self",
    ),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_refused(name, service):
    route, body, message = UNREADABLE[name]
    answer = post(service, SimpleNamespace(), route, body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
