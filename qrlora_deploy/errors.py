"""The error hierarchy. The command line prints one line and exits with `exit_code`."""


class QrloraError(Exception):
    """An operation could not be completed."""

    exit_code = 1


class InputError(QrloraError):
    """A file, an option or a value given by the user is wrong."""

    exit_code = 2


class FileFormatError(InputError):
    """A file is damaged, hostile, or written in a format this version does not read."""


class BasisMismatchError(InputError):
    """Coefficients, a base model or a bundle belong to another basis."""


class ProviderError(InputError):
    """A device or execution provider was asked for and is not there."""


class CheckFailed(QrloraError):
    """A check ran and its result is out of bounds (parity, labels)."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, on one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
