"""Chat templates: Jinja sources that turn messages into the text that a model was trained on.

Rendering follows Hugging Face's documented rules for chat templates (trimmed blocks, sandboxed environment,
``tojson``, ``raise_exception``, ``strftime_now``, loop controls, ``{% generation %}``). A template therefore
gives the same text as in ``transformers``. This module does not import ``transformers``, because the import
alone takes about a second.
"""

from __future__ import annotations

import datetime
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from empg_jax.config.places import expand
from empg_jax.errors import UserError

Message = Mapping[str, Any]  # {"role": ..., "content": ...} and other keys that a template may read
PACKAGED = Path(__file__).with_name("templates")
ENDING = ".jinja"


class ChatTemplateError(UserError, ValueError):
    """A missing or invalid chat template, or a conversation that the template refuses."""


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: the Jinja source.
      special_tokens: names that the template may print, for example ``{"eos_token": "<|im_end|>"}``.

    Raises:
      ChatTemplateError: the source is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(
                f"the chat template does not parse: line {error.lineno}: {error}"
            ) from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **options: Any) -> str:
        """Return the text of a conversation.

        Args:
          messages: the conversation, oldest first.
          add_generation_prompt: whether to append the header of the assistant's next turn.
          **options: further variables that the template reads, for example ``enable_thinking=False``.

        Raises:
          ChatTemplateError: the template refuses the conversation (its own message is kept).
        """
        try:
            return self._template.render(self._variables(messages, add_generation_prompt, options))
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            roles = [message.get("role") for message in messages]
            raise ChatTemplateError(
                f"the chat template refused a conversation with roles {roles}: {error}"
            ) from error

    def trace(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, **options: Any
    ) -> Iterator[tuple[str, int]]:
        """Yield the pieces of a conversation's text, each with the line of the template that prints it.

        The conversation must be one that `render` accepts.
        """
        variables = self._variables(messages, add_generation_prompt, options)
        # The compiled template is a generator: where it stands after a piece is where the piece was printed.
        context = self._template.new_context(variables)
        pieces = cast("types.GeneratorType[str, None, None]", self._template.root_render_func(context))
        for piece in pieces:
            assert pieces.gi_frame is not None  # it has not ended
            yield str(piece), self._template.get_corresponding_lineno(pieces.gi_frame.f_lineno)

    def _variables(
        self, messages: Sequence[Message], add_generation_prompt: bool, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return {"tools": None, "documents": None, **self.special_tokens, **options, **given}


def read_source(name: str) -> str:
    """Read a chat template: a file, or one that is packaged here, by its name (``qwen3_training``).

    Raises:
      OSError: there is no such file and no such name, or the file cannot be read.
    """
    path, packaged = expand(name, "model.chat_template"), PACKAGED / f"{name}{ENDING}"
    if not path.exists() and packaged.parent == PACKAGED and packaged.exists():
        path = packaged
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in PACKAGED.glob(f"*{ENDING}")))
        raise FileNotFoundError(f"there is no chat template {name}: name a file, or one of {names}")
    return path.read_text("utf-8")


def stop_clock(day: str) -> Callable[[str], str]:
    """Return a ``strftime_now`` of midnight on a day (``2026-11-27``), in place of one that goes on."""
    return datetime.datetime.combine(datetime.date.fromisoformat(day), datetime.time()).strftime


class _GenerationBlock(jinja2.ext.Extension):
    """The block ``{% generation %}…{% endgeneration %}``, which marks assistant text; it prints its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it as a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter would escape HTML characters in the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
