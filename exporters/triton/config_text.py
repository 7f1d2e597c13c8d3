"""A model's configuration as the text that Triton reads: protobuf's text format of its `ModelConfig`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any


class Word(str):
    """A value of an enumeration, which stands without quotes."""


Message = Mapping[str, Any]
"""Fields by name: a text, number, truth value, `Word`, another message, or a list of these for a repeated field; a
list of plain values is written on one line."""


def config_text(message: Message, indent: str = "") -> str:
    """The text of a message, a field a line."""
    return "".join(_field(name, value, indent) for name, value in message.items())


def entries(values: Mapping[str, Message]) -> list[Message]:
    """A map as protobuf's text has it: messages of a key and a value."""
    return [{"key": key, "value": value} for key, value in values.items()]


def _field(name: str, value: Any, indent: str) -> str:
    if isinstance(value, Mapping):
        inner = config_text(value, f"{indent}  ")
        return f"{indent}{name} {{\n{inner}{indent}}}\n" if inner else f"{indent}{name} {{ }}\n"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(item, Mapping) for item in value):
            return "".join(_field(name, item, indent) for item in value)
        return f"{indent}{name}: [ {', '.join(map(_scalar, value))} ]\n"
    return f"{indent}{name}: {_scalar(value)}\n"


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    # JSON's escapes of quotes, backslashes and line ends are also those of protobuf's text.
    return json.dumps(value, ensure_ascii=False)
