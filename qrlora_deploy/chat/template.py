"""Chat templates: the small program that a base brings along to write a chat as one text.

It is rendered here and not by transformers, so that training and a serving host without transformers write the same
text, under the same bounds (`sandbox`).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qrlora_deploy.chat.budget import MAX_TEXT, new_budget
from qrlora_deploy.errors import FileFormatError, InputError, library_errors
from qrlora_deploy.installation.parts import need
from qrlora_deploy.io.reading import is_file, parse_json, read_text

DEFAULT = "default"
FILE = "chat_template.jinja"
TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"

MAX_SOURCE = 256 * 2**10
"""Characters of a template; the longest known has a tenth of them."""

MAX_MESSAGES = 10_000

NOTHING: dict[str, Any] = {"tools": None, "documents": None}
"""What templates ask for, and chats here do not have."""


class ChatTemplate:
    """A template, ready to render; may be used by several threads at once.

    Args:
        source: its text, in jinja2's language.
        tokens: texts that it knows by name, such as `bos_token`.

    Raises:
        MissingPartError: jinja2 is not installed.
        InputError: the text is too long.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any]) -> None:
        need("llm", "a chat template")
        if len(source) > MAX_SOURCE:
            raise InputError(f"the chat template has {len(source):,} characters; {MAX_SOURCE:,} are the most")
        self.source = source
        self.tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}

    @cached_property
    def _template(self) -> Any:
        # Imported here: a host without jinja2 has no chats, and does the rest.
        from qrlora_deploy.chat.sandbox import BoundedEnvironment

        with library_errors("the chat template cannot be used", InputError):
            return BoundedEnvironment().bounded(self.source)

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, **more: Any) -> str:
        """The text of a chat.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: whether what asks for an answer comes behind the last message.
            more: further variables of the template, such as `enable_thinking`; plain JSON values.

        Raises:
            InputError: the template refuses the chat, is broken, or takes too much; one line says which.
        """
        length = sum(len(str(value)) for message in messages for value in message.values())
        if len(messages) > MAX_MESSAGES or length > MAX_TEXT:
            raise InputError(f"a chat may have {MAX_MESSAGES:,} messages and {MAX_TEXT:,} characters at most")
        # Nothing of it is shared with the template, whatever that does to it.
        given = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
        with new_budget(), library_errors("the chat template refuses the chat", InputError):
            try:
                text = "".join(self._template.generate(**NOTHING | self.tokens | more | given))
            except InputError as error:
                raise InputError(f"the chat template was stopped: {error}") from error
        if len(text) > MAX_TEXT:
            raise InputError(f"the chat template was stopped: it makes a text of more than {MAX_TEXT:,} characters")
        return text


def choose_template(given: Any) -> str | None:
    """The one template of those a tokenizer has: a text, a list of named ones, or texts by name; None: it has none."""
    if isinstance(given, list):
        given = {entry.get("name"): entry.get("template") for entry in given if isinstance(entry, dict)}
    if isinstance(given, dict):
        given = given.get(DEFAULT)
    return given if isinstance(given, str) and given else None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The chat template of a checkpoint or bundle, from the files that transformers saves; None where it has none.

    Raises:
        InputError: a file cannot be read, or the template is too long.
        FileFormatError: a file is damaged.
        MissingPartError: jinja2 is not installed.
    """
    config = _object(folder / TOKENIZER_CONFIG)
    source = read_text(folder / FILE) if is_file(folder / FILE) else choose_template(config.get("chat_template"))
    if not source:
        return None
    return ChatTemplate(source, special_tokens(folder))


def special_tokens(folder: Path) -> dict[str, str]:
    """Texts of the special tokens of a checkpoint or bundle by their names, such as `eos_token`.

    Raises:
        InputError: a file cannot be read.
        FileFormatError: a file is damaged.
    """
    known = _object(folder / TOKENS_MAP) | _object(folder / TOKENIZER_CONFIG)
    tokens = {name: _token(value) for name, value in known.items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}


def _token(value: Any) -> str | None:
    """A special token, which older files keep with its properties."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _object(path: Path) -> dict[str, Any]:
    if not is_file(path):
        return {}
    value = parse_json(read_text(path), f"{path} is not JSON")
    if not isinstance(value, dict):
        raise FileFormatError(f"{path} must hold a JSON object")
    return value
