"""The chunks of a streamed answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from empg_jax.serve.answers import Body, Spell, as_delta, describe_tokens, describe_usage
from empg_jax.serve.asked import Asked
from empg_jax.serve.driver import Update
from empg_jax.serve.text import TextPlaces, TextStream


class StreamWriter:
    """The chunks of a streamed answer.

    Without tools text goes out as it comes. With tools a chat's text is held back to its end, because only
    then it is known whether it is a call; its tokens still come as they are sampled.

    Args:
      asked: the request.
      tell_text: makes the fields of a choice with a text, and says whether it calls tools.
      spell: returns a token's text and bytes.
    """

    def __init__(
        self,
        asked: Asked,
        tell_text: Callable[[Asked, int, str], tuple[Body, bool]],
        spell: Spell,
    ) -> None:
        assert asked.head is not None
        self._asked, self._head = asked, asked.head
        self._tell_text, self._spell = tell_text, spell
        self._texts = [TextStream(asked.decode, asked.sampling.stops) for _ in range(asked.num_choices)]
        self._sent = [0] * asked.num_choices  # tokens
        self._places = [TextPlaces(asked.decode) for _ in range(asked.num_choices)]
        self._is_begun = [False] * asked.num_choices
        self._finals: dict[int, Update] = {}

    def write(self, index: int, update: Update) -> Iterator[Body]:
        """Yield the chunks of one update."""
        response, asked, head = update.response, self._asked, self._head
        assert response is not None
        start, self._sent[index] = self._sent[index], len(response.tokens)
        fields: Body
        has_calls = False
        if asked.tools and not update.is_final:
            piece, fields = "", {"delta": as_delta({}, is_first=not self._is_begun[index])}
        else:
            piece = self._texts[index].feed(response.tokens, is_final=update.is_final)
            fields, has_calls = self._tell_text(asked, index, piece)
            if head.is_chat:
                fields = {"delta": as_delta(fields["message"], is_first=not self._is_begun[index])}
        if piece or update.is_final or start < len(response.tokens) or not self._is_begun[index]:
            self._is_begun[index] = True
            finish = ("tool_calls" if has_calls else response.finish_reason) if update.is_final else None
            places = self._places[index]
            tokens = describe_tokens(response, start, head, asked.detail, self._spell, places)
            choice = {"index": index, **fields, "finish_reason": finish, "logprobs": None, **tokens}
            if update.is_final:
                choice |= asked.describe_stop(response)
            is_first = asked.has_tokens and start == 0
            prompts = {"prompt_token_ids": response.prompt_tokens.tolist()} if is_first else {}
            if not head.is_chat:
                choice |= prompts
            yield head.chunk([choice], **prompts)
        if update.is_final:
            self._finals[index] = update

    def close(self) -> Iterator[Body]:
        """Yield the last chunk, the counts of tokens, where they are asked for."""
        if not self._asked.has_usage:
            return
        responses = [update.response for update in self._finals.values() if update.response is not None]
        firsts = range(0, self._asked.num_choices, self._asked.sampling.n)
        cached = sum(self._finals[index].cached for index in firsts)
        prompts = [len(prompt) for prompt in self._asked.prompts]
        yield self._head.chunk([], usage=describe_usage(prompts, responses, cached))
