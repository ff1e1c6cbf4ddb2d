"""The policy's side of a request: bodies to jobs, updates to answers. It knows no HTTP and no engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from empg_envs.tool_calls import check_tools, normalize_messages, parse_response
from empg_jax.serve.answers import (
    Body,
    Head,
    describe_generated,
    describe_tokens,
    describe_usage,
)
from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Update
from empg_jax.serve.stream import StreamWriter
from empg_jax.serve.text import TextPlaces
from empg_jax.serve.wire import (
    CHAT,
    COMPLETION,
    GENERATE,
    IGNORED,
    MAX_CHOICES,
    SAMPLING,
    STREAM,
    TEXT,
    ApiError,
    Sampling,
    check_keys,
    read_flag,
    read_ids,
    read_key,
    read_sampling,
    refuse,
)
from empg_jax.text.chat import ChatRenderer, ends_in_thought
from empg_jax.text.continuation import Continuation
from empg_jax.text.stops import REPLACEMENT, cut_at_stop
from empg_jax.text.template import ChatTemplateError
from empg_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from empg_jax.serve.policy import Policy

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions
TOKEN_CHARACTERS = 16  # of a prompt that may fit, for each token; four are usual


class Service:
    """A policy's requests and answers.

    Args:
      name: the model's name on the wire.
      tokenizer: its tokenizer.
      renderer: its chat template; None refuses chats.
      vocab_size: number of the model's tokens, which may be more than the tokenizer's: they are sampled, too.
      max_tokens: longest conversation in tokens.
      max_choices: most responses to one request.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        renderer: ChatRenderer | None,
        *,
        vocab_size: int,
        max_tokens: int,
        max_choices: int = MAX_CHOICES,
    ) -> None:
        self.name = name
        self._tokenizer, self._renderer = tokenizer, renderer
        self._continuation = Continuation(tokenizer)
        self._vocab_size, self._max_tokens, self._max_choices = vocab_size, max_tokens, max_choices
        # Clients know a prompt that is too long by OpenAI's words, and then neither repeat nor blame it.
        self._limit = (
            f"this model's maximum context length is {max_tokens} tokens (serve.max_tokens), the response "
            "included"
        )

    def describe_models(self) -> Body:
        """Return the answer of ``GET /v1/models``."""
        return {"object": "list", "data": [self.describe_model(self.name)]}

    def describe_model(self, name: str) -> Body:
        """Return the answer of ``GET /v1/models/NAME``.

        Raises:
          ApiError: the model has another name (status 404).
        """
        self._check_model(name)
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "empg-jax"}
        return model | {"max_model_len": self._max_tokens, "root": self.name}

    # ------------------------------------------------------------------------------------ requests

    def read_chat(self, body: Any) -> Asked:
        """Read a body of ``/v1/chat/completions``.

        Raises:
          ApiError: it is malformed, asks for what there is not, or does not fit the context.
        """
        given = self._check(body, CHAT)
        if self._renderer is None:
            raise refuse(f"{self.name} has no chat template: use /v1/completions")
        if "messages" not in given:
            raise refuse("messages is missing", "messages")
        sampling = self._read_sampling(given, 1)
        try:
            messages = normalize_messages(given["messages"])
            tools = check_tools(given.get("tools"))
        except ValueError as error:
            raise refuse(str(error)) from None
        tools = _choose_tools(tools, given.get("tool_choice", "auto"))
        variables = given.get("chat_template_kwargs", {})
        if not isinstance(variables, dict):
            raise refuse("chat_template_kwargs must be an object", "chat_template_kwargs")
        if taken := sorted({"messages", "self"} & variables.keys()):
            name = "chat_template_kwargs"
            raise refuse(f"{name}.{taken[0]} is no variable of a chat template", name)
        has_one_call = not read_flag(given, "parallel_tool_calls", default=True)
        text = self._render(messages, tools, variables)
        prompt = self._encode(text, self._renderer.encode)
        asked = self._asked(given, [prompt], sampling, Head("chat.completion", self.name), tools=tools)
        is_thought = ends_in_thought(text)
        return dataclasses.replace(asked, has_one_call=has_one_call, has_open_thought=is_thought)

    def read_completion(self, body: Any) -> Asked:
        """Read a body of ``/v1/completions``.

        Raises:
          ApiError: see `read_chat`.
        """
        given = self._check(body, COMPLETION)
        prompt = given.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
            prompt = [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise refuse("prompt must be a text, a list of token ids, or a list of these", "prompt")
        sampling = self._read_sampling(given, len(prompt), default_max_tokens=COMPLETION_TOKENS)
        # A text is the beginning of a document, so it begins as documents do in training.
        add_special = read_flag(given, "add_special_tokens", default=True)
        encode = functools.partial(self._tokenizer.encode, add_special=add_special)
        prompts = [
            self._encode(item, encode)
            if isinstance(item, str)
            else read_ids(item, "prompt", self._vocab_size)
            for item in prompt
        ]
        return self._asked(given, prompts, sampling, Head("text_completion", self.name))

    def read_generate(self, body: Any) -> Asked:
        """Read a body of ``/inference/v1/generate``: token ids in and out.

        Raises:
          ApiError: see `read_chat`.
        """
        given = self._check(body, GENERATE)
        if read_flag(given, "stream"):
            raise refuse("stream=True is not supported here; use /v1/completions", "stream")
        prompt = read_ids(given.get("token_ids"), "token_ids", self._vocab_size)
        options = check_keys(
            given.get("sampling_params", {}), SAMPLING, "sampling_params", ignored=IGNORED | TEXT
        )
        sampling = self._read_sampling(options, 1)
        self._check_length(prompt)
        return Asked([np.asarray(prompt, np.int32)], sampling, None, self._tokenizer.decode)

    def _check(self, body: Any, known: frozenset[str]) -> dict[str, Any]:
        given = check_keys(body, known)
        self._check_model(given.get("model", self.name))
        return given

    def _check_model(self, name: Any) -> None:
        if name != self.name:
            raise ApiError(
                404, f"model {name!r} does not exist; this server has {self.name!r}", param="model",
                code="model_not_found",
            )  # fmt: skip

    def _read_sampling(
        self, given: dict[str, Any], num_prompts: int, default_max_tokens: int | None = None
    ) -> Sampling:
        """Read the options, and count the responses before work is done for any of them."""
        sampling = read_sampling(given, self._vocab_size, default_max_tokens=default_max_tokens)
        if num_prompts * sampling.n > self._max_choices:
            asked = f"{num_prompts} prompts with n={sampling.n}" if num_prompts > 1 else f"n={sampling.n}"
            raise refuse(
                f"{asked} ask for {num_prompts * sampling.n} responses; at most {self._max_choices} fit at "
                "once (serve.max_waiting)",
                "prompt" if num_prompts > 1 else "n",
            )
        return sampling

    def _asked(
        self,
        given: dict[str, Any],
        prompts: list[list[int]],
        sampling: Sampling,
        head: Head,
        *,
        tools: list[dict[str, Any]] | None = None,
    ) -> Asked:
        for prompt in prompts:
            self._check_length(prompt)
        options = check_keys(given.get("stream_options", {}), STREAM, "stream_options")
        key = read_key(given)
        if key is not None and len(prompts) * sampling.n > 1:
            raise refuse("empg.ids are those of one response: ask for one prompt, with n=1", "empg")
        return Asked(
            [np.asarray(prompt, np.int32) for prompt in prompts],
            sampling,
            head,
            self._make_decode(given, sampling, self._tokenizer if head.is_chat else self._continuation),
            tools=tools or [],
            is_streamed=read_flag(given, "stream"),
            has_usage=read_flag(options, "include_usage"),
            has_tokens=read_flag(given, "return_token_ids"),
            key=key,
        )

    def _make_decode(
        self, given: dict[str, Any], sampling: Sampling, decoder: Tokenizer | Continuation
    ) -> Callable[[Sequence[int]], str]:
        """Return the decoder of an answer's text, without control tokens unless the request wants them."""
        skip_special = read_flag(given, "skip_special_tokens", default=True)
        ends = {*self._tokenizer.stop_ids, *sampling.stop_ids}

        def decode(ids: Sequence[int]) -> str:
            """The token that ends a response is no part of its text; no other one is a stop token."""
            said = ids[:-1] if ids and ids[-1] in ends else ids
            return decoder.decode(said, skip_special=skip_special)

        return decode

    def _encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Tokenize a prompt; only the beginning of one that is far too long, as others wait meanwhile."""
        longest = TOKEN_CHARACTERS * self._max_tokens
        # Twice the limit: the end of the beginning may be tokenized otherwise in the whole text.
        if len(text) > longest and len(self._tokenizer.encode(text[:longest])) >= 2 * self._max_tokens:
            raise refuse(
                f"{self._limit}, but the prompt has {len(text)} characters",
                code="context_length_exceeded",
            )
        return encode(text)

    def _check_length(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise refuse("the prompt is empty")
        if len(prompt) >= self._max_tokens:
            raise refuse(
                f"{self._limit}, but the prompt has {len(prompt)} tokens",
                code="context_length_exceeded",
            )

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], variables: dict[str, Any]
    ) -> str:
        assert self._renderer is not None
        known = {**variables, "tools": tools} if tools else variables
        try:
            text = self._renderer.render(messages, **known)
            if tools and text == self._renderer.render(messages, **variables):
                raise refuse(f"the chat template of {self.name} does not tell tools to the model", "tools")
            role = self._renderer.find_untold(messages, known)
            if role is not None:
                raise refuse(
                    f"the chat template of {self.name} prints nothing of messages of the role {role}; send "
                    f"them as {'system' if role == 'developer' else 'user'}",
                    "messages",
                )
        except ChatTemplateError as error:
            raise refuse(str(error), "messages") from None
        return text

    # ------------------------------------------------------------------------------------- answers

    def answer(self, asked: Asked, updates: Sequence[Update]) -> Body:
        """Make the answer from the final update of every choice."""
        responses = [update.response for update in updates if update.response is not None]
        if asked.head is None:
            return describe_generated(responses, asked.request_id)
        head, choices = asked.head, []
        for index, response in enumerate(responses):
            text = cut_at_stop(asked.decode(response.tokens.tolist()), asked.sampling.stops)
            fields, has_calls = self._tell_text(asked, index, text)
            choices.append(
                {
                    "index": index,
                    **fields,
                    "finish_reason": "tool_calls" if has_calls else response.finish_reason,
                    **asked.describe_stop(response),
                    "logprobs": None,
                    **describe_tokens(response, 0, head, asked.detail, self._spell, TextPlaces(asked.decode)),
                }
            )
            if asked.has_tokens and not head.is_chat:
                choices[-1]["prompt_token_ids"] = asked.prompts[index // asked.sampling.n].tolist()
        is_one = asked.has_tokens and len(asked.prompts) == 1
        prompts = {"prompt_token_ids": asked.prompts[0].tolist()} if is_one else {}
        # A prompt counts once, however often it is answered.
        cached = sum(update.cached for update in updates[:: asked.sampling.n])
        usage = describe_usage([len(prompt) for prompt in asked.prompts], responses, cached)
        return head.body(choices, usage=usage, **prompts)

    def open_stream(self, asked: Asked) -> StreamWriter:
        """Return the writer of a streamed answer's chunks."""
        return StreamWriter(asked, self._tell_text, self._spell)

    def _tell_text(self, asked: Asked, index: int, text: str) -> tuple[Body, bool]:
        """Return the fields of a choice with its whole text, and whether it calls tools."""
        head = asked.head
        assert head is not None
        if not head.is_chat:
            return {"text": text}, False
        is_thought = asked.has_open_thought and "</think>" not in text
        tools = [] if is_thought else asked.tools
        message = parse_response(text, tools, lambda i: f"call_{head.id}_{index}_{i}")
        if asked.has_one_call and "tool_calls" in message:
            message["tool_calls"] = message["tool_calls"][:1]
        return {"message": message}, "tool_calls" in message

    def _spell(self, token: int) -> tuple[str, bytes | None]:
        word = self._continuation.decode([token], skip_special=False)
        return word, self._tokenizer.bytes_of(token) if REPLACEMENT in word else word.encode()


def make_service(policy: Policy, *, max_choices: int = MAX_CHOICES) -> Service:
    """Make the service of a policy that is ready to answer; ``max_choices`` as in `Service`."""
    return Service(
        policy.name,
        policy.tokenizer,
        policy.renderer,
        vocab_size=policy.engine.model.vocab_size,
        max_tokens=policy.engine.config.max_tokens,
        max_choices=max_choices,
    )


def _choose_tools(tools: list[dict[str, Any]], choice: Any) -> list[dict[str, Any]]:
    """Apply ``tool_choice``.

    Raises:
      ApiError: it forces a call, which would need constrained sampling.
    """
    if choice == "none":
        return []
    if choice != "auto":
        raise refuse(f"tool_choice={choice!r} is not supported; use auto or none", "tool_choice")
    return tools
