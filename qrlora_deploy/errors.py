"""The error hierarchy, how text from outside becomes one safe line of a message, and how one names an argument."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import ClassVar

MAX_MESSAGE = 480
"""Characters of a message: a name in a hostile file may be megabytes long."""


def one_line(text: str) -> str:
    """`text` on one line, control characters written out: names and labels come from files."""
    flat = " ".join(text.split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in flat)


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """`text` on one line of at most `limit` characters.

    What is cut is the middle: a message begins with the file and ends with the remedy.
    """
    # Writing out a character takes ten at most, so this much is enough of each end.
    flat = one_line(text if len(text) <= 2 * limit else f"{text[:limit]} ... {text[-limit:]}")
    if len(flat) <= limit:
        return flat
    half = (limit - 5) // 2
    return f"{flat[:half]} ... {flat[-half:]}"


_option_of: Callable[[str], str] | None = None
"""The command line's word for an argument, while a command runs."""


def argument(name: str, value: object = None) -> str:
    """An argument in a message: `rank` or `head='output'` to a caller; in a command `--rank` or `--head output`.

    Args:
        name: of the argument, as Python's functions call it.
        value: what is passed, or should be; True is a flag of the command line. None names the argument alone.
    """
    if _option_of is None:
        return name if value is None else f"{name}={value!r}"
    shown = ", ".join(map(str, value)) if isinstance(value, tuple | list) else value
    return _option_of(name) if value is None or value is True else f"{_option_of(name)} {shown}"


@contextmanager
def options_for_arguments(option_of: Callable[[str], str]) -> Iterator[None]:
    """Let messages of this process name options for arguments; `option_of` gives the option of an argument."""
    global _option_of
    before, _option_of = _option_of, option_of
    try:
        yield
    finally:
        _option_of = before


@contextmanager
def fields_for_arguments(names: Collection[str]) -> Iterator[None]:
    """Let messages of this process name fields of JSON, such as `"top_p" 2`, for these arguments; others as before."""
    before = _option_of

    def named(name: str) -> str:
        return f'"{name}"' if name in names or before is None else before(name)

    with options_for_arguments(named):
        yield


class QrloraError(Exception):
    """An operation could not be completed.

    Its message is one line of bounded length, whatever the names in it: callers log it as it is.

    Attributes:
        exit_code: of the command line.
        kind: one word for programs, such as the status of an answer over a network; subclasses have their own.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "failed"

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


class InputError(QrloraError):
    """A file, an argument or a value given by the user is wrong."""

    exit_code = 2
    kind = "invalid"


class FileFormatError(InputError):
    """A file is damaged, hostile, or written in a format this version does not read."""

    kind = "bad_file"


class MalformedInputError(InputError):
    """What a model is to answer is no text, no array of the right shape or no name of a customer."""

    kind = "malformed_input"


class UnknownCustomerError(InputError):
    """There is no customer of that name."""

    kind = "unknown_customer"


class MismatchError(InputError):
    """Things do not belong together: a customer and a bundle, a basis and a base."""

    kind = "mismatch"


class BasisMismatchError(MismatchError):
    """Coefficients, a base model or a bundle belong to another basis."""


class ProviderError(InputError):
    """A device or execution provider was asked for and is not there."""

    kind = "provider"


class MissingPartError(InputError, ModuleNotFoundError):
    """A part of the project is asked for and is not installed; the message says what installs it.

    Attributes:
        name: the module that is missing.
    """

    kind = "missing_part"

    def __init__(self, message: str, name: str) -> None:
        super().__init__(message)
        self.name = name


class NotReadyError(QrloraError):
    """Nothing is wrong with a request, but it cannot be answered here or now."""

    kind = "not_ready"


class CheckFailed(QrloraError):
    """A check ran and its result is out of bounds (parity, labels)."""

    kind = "check_failed"


def first_line(error: BaseException) -> str:
    """What another library's exception says, on one line; its kind where it says nothing."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    # Some name the field on the first line, and what is wrong with it on the second.
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


@contextmanager
def library_errors(what: str, kind: type[QrloraError] = FileFormatError) -> Iterator[None]:
    """Turn whatever another library raises while it reads something from outside into one line.

    Put it around the call of the library and nothing else. Libraries have no closed list of what they
    raise at a damaged file, and an exception of this project's own code is no damaged file.

    Args:
        what: file and field, and what is wrong with them, such as "config.json cannot be used".
        kind: the error to raise.
    """
    try:
        yield
    except (QrloraError, MemoryError):
        raise
    except BaseException as error:
        # What a library written in Rust raises where it gives up is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise kind(f"{what}: {reason}") from error
