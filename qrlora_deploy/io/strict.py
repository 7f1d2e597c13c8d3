"""Records from files, read strictly: a value has the type that is written down for it, or the file is refused.

Nothing is converted: no number from a text, no truth value from a number, no list from a text.
"""

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from qrlora_deploy.errors import FileFormatError, shortened

MAX_SHOWN = 80
"""Characters of a place or of a reason: both may repeat what the file says."""

Model = TypeVar("Model", bound=BaseModel)
Value = TypeVar("Value")


class Record(BaseModel):
    """A record with these fields and no others, none of which changes; no number is NaN or Inf."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def from_value(kind: type[Model], value: Any, what: str) -> Model:
    """`value`, plain objects and lists, as a record; its fields have no tuples.

    Raises:
        FileFormatError: it is none; every field that is wrong is named behind `what`.
    """
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        raise FileFormatError(f"{what}: {'; '.join(problems(error))}") from error


def from_json(kind: type[Value], text: str | bytes, what: str) -> Value:
    """The JSON `text` as a record or a dataclass of this `kind`; a list may stand for a tuple.

    Raises:
        FileFormatError: it is none, or is no JSON; every field that is wrong is named behind `what`.
    """
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise FileFormatError(f"{what}: {'; '.join(problems(error))}") from error


def problems(error: ValidationError) -> list[str]:
    """Everything that is wrong with a record, each with its place where it has one."""
    found = [
        (".".join(map(_name, item["loc"])), item["msg"].removeprefix("Value error, "))
        for item in error.errors(include_url=False, include_input=False)
    ]
    return [": ".join(shortened(part, MAX_SHOWN) for part in item if part) for item in found]


def _name(key: str | int) -> str:
    """A step of the way to a field: what was put in by the file must be seen for what it is."""
    name = str(key)
    return name if name.isprintable() else ascii(name)
