"""Chat templates: the model's own Jinja program, run in a sandbox that cannot change what it is given."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvrelay.errors import InvalidArgument


class ChatTemplate:
    """One model's template, compiled once.

    Rules and helpers are those of transformers' `apply_chat_template`.
    """

    def __init__(self, source: str, special: Mapping[str, str]) -> None:
        """Raises InvalidArgument where the template itself is broken."""
        extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special = dict(special)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise InvalidArgument(f"the model's chat template is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation of `{"role": ..., "content": ...}` messages.

        Raises:
            InvalidArgument: there are no messages, or the template refuses them (a role that it does not
                know, roles out of order); the message is the template's own.
        """
        if not messages:
            raise InvalidArgument("a chat needs at least one message")
        turns = [dict(message) for message in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
            raise InvalidArgument(f"the model's chat template refused the messages: {error}") from error


class _GenerationTag(Extension):
    """`{% generation %}` marks an assistant's own words for training; here it prints what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares a plain set)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which models have not seen.
    return json.dumps(value, ensure_ascii=False, indent=indent)
