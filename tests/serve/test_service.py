"""Requests that are refused before work is done for them."""

import pytest

from empg_jax.serve.service import Service
from empg_jax.serve.wire import ApiError
from empg_jax.text import ChatRenderer, build_byte_tokenizer

HELLO = [{"role": "user", "content": "red"}]


@pytest.fixture
def service(monkeypatch):
    """A service of 12 responses at once, which lists the lengths of the texts that it encodes."""
    tokenizer = build_byte_tokenizer()
    service = Service("model", tokenizer, ChatRenderer(tokenizer), max_tokens=64, max_choices=12)
    encode, service.encoded = tokenizer.encode, []

    def counted(text):
        service.encoded.append(len(text))
        return encode(text)

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
