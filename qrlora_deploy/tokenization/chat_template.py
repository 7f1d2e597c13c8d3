"""Chat templates: the program that a base brings to write a chat as one text."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from qrlora_deploy.errors import InputError

DEFAULT = "default"


def choose_template(given: Any) -> str | None:
    """The one template of those a tokenizer has: a text, a list of named ones, or texts by name; None: it has none."""
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        given = given.get(DEFAULT)
    return given if isinstance(given, str) and given else None


class ChatTemplate:
    """A template."""

    def __init__(self, source: str, tokens: Mapping[str, Any]) -> None:
        self.source = source
        self.tokens = {name: str(token) for name, token in tokens.items() if isinstance(token, str)}

    @cached_property
    def _compiled(self) -> Any:
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(self.source)

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        """The text."""
        try:
            return self._compiled.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except Exception as error:
            raise InputError(f"the chat template refuses the chat: {error}") from error
