"""The files of customers: which names they have, and reading them while others write."""

import functools
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qrlora_deploy.errors import FileFormatError, InputError, MalformedInputError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID, SUFFIX, Coefficients, read_coefficients_content

SHARED_LABELS = 256
"""Different labels of customers whose digest is kept: most have those of their base."""

OPEN_FILES = Path("/proc/self/fd")

MAX_CUSTOMER_BYTES = 2**30
"""No customer's file is larger; what is longer is not read to its end."""


MAX_SENT_BYTES = 2**24
"""Nor one that somebody sends, or that an object store holds: those are kept in memory, several at a time."""


def check_customer_id(name: str) -> None:
    """Make sure that `name` can be a customer and the name of its file.

    Raises:
        InputError: it has other characters than A-Z, a-z, 0-9, dot, underscore and hyphen, starts
            with a dot, or has not 1 to 128 characters.
    """
    if not CUSTOMER_ID.fullmatch(name):
        raise MalformedInputError(
            f"{name[:140]!a} is no customer id: 1 to 128 of A-Z a-z 0-9 . _ - are allowed, and no dot at the start"
        )


def customer_ids(folder: Path) -> Iterator[str]:
    """Ids of the customers' files in a folder, in no order; files with other names are passed over.

    Raises:
        InputError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                customer = customer_of(entry.name)
                if customer is not None:
                    yield customer
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror or error}") from error


def read_customer(folder: Path, customer: str) -> Coefficients:
    """Read and validate `customer`'s file in `folder`, which may be written to at the same time.

    Raises:
        InputError: the id is none, there is no such file, or it leads out of the folder.
        FileFormatError: it is damaged or not complete.
    """
    check_customer_id(customer)
    # As texts: paths take several times as long, and a million customers come through here.
    shown = f"{folder}{os.sep}{customer}{SUFFIX}"
    if os.path.isfile(shown):  # noqa: PTH113
        return _read_there(shown, folder)
    path = Path(shown)
    try:
        place, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _check_inside(path, f"{place}", inside)
    raise UnknownCustomerError(f"{folder} holds no customer {customer!r}: there is no file {path.name}")


def _check_inside(shown: Path | str, place: str, folder: Path) -> None:
    """Make sure that `place`, without links, is in `folder`."""
    # A folder that such a place begins with has no links itself, and most have none.
    if place.startswith(f"{folder}{os.sep}"):
        return
    if not place.startswith(os.path.realpath(folder).rstrip(os.sep) + os.sep):
        raise InputError(
            f"{shown} leads out of the folder, to {place}; links are followed within it only. Copy the file, or fetch "
            f"a hub's files by snapshot_download(local_dir=...)"
        )


def read_customer_file(path: Path | str, inside: Path | None = None) -> Coefficients:
    """Read and validate a coefficients file, which may be written to at the same time.

    safetensors maps a file into memory, and one that is cut meanwhile would end the process. So all of the file is
    read first, and nothing of it is ever mapped.

    Args:
        path: the file.
        inside: a folder that the file must lie in, whatever links lead to either; None: anywhere.

    Raises:
        InputError: it is no plain file, too large, outside of the folder or cannot be read.
        FileFormatError: it is damaged or not complete, or became shorter or longer while it was read.
    """
    # Before it is opened: opening a device may do something.
    if not os.path.isfile(path):  # noqa: PTH113
        raise InputError(f"{path}: no such file")
    return _read_there(path, inside)


def _read_there(path: Path | str, inside: Path | None) -> Coefficients:
    """As `read_customer_file`, where a file was there just now."""
    try:
        content = _content(path, inside)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return read_customer_content(content, path)


def read_customer_content(content: bytes, shown: Path | str) -> Coefficients:
    """Validate the content of a coefficients file.

    Args:
        content: all of it.
        shown: how messages call it.

    Raises:
        FileFormatError: it is damaged or not complete.
    """
    return read_coefficients_content(content, shown)


def _content(path: Path | str, inside: Path | None) -> bytes:
    # By its number: an object for the file takes longer than reading it.
    descriptor = _open_at_once(f"{path}", os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        size = _size(descriptor, path, inside)
        content = _read(descriptor, size)
    finally:
        os.close(descriptor)
    if len(content) < size:
        raise FileFormatError(f"{path} is cut: it had {size} bytes, and {len(content)} when it was read")
    if len(content) > size:
        raise FileFormatError(f"{path} is not complete: it grew while it was read")
    return content


def _size(descriptor: int, path: Path | str, inside: Path | None) -> int:
    """Bytes of an open file, which must be a plain one within its folder, and no larger than a customer's."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path} is no plain file")
    if inside is not None:
        # Of the file that is open: a link may have taken the place of the one that was looked at.
        _check_inside(path, _place_of(descriptor, path), inside)
    # Before anything is read: a file with holes takes memory for all that it has not.
    if status.st_size > MAX_CUSTOMER_BYTES:
        raise InputError(f"{path} is too large for a customer")
    return status.st_size


def _read(descriptor: int, size: int) -> bytes:
    """An open file of so many bytes, to its end or one byte behind: then it has grown."""
    content = os.read(descriptor, size + 1)
    while len(content) < size and (more := os.read(descriptor, size + 1 - len(content))):
        content += more
    return content


def _place_of(descriptor: int, path: Path | str) -> str:
    """Where an open file lies, without links.

    Args:
        descriptor: of the file.
        path: by which it was opened.

    Raises:
        InputError: the system does not tell, and something else lies there by now.
    """
    try:
        return os.readlink(f"{OPEN_FILES}/{descriptor}")  # noqa: PTH115
    except OSError:
        place = os.path.realpath(path)
    if not os.path.samestat(os.fstat(descriptor), Path(place).stat()):
        raise InputError(f"{path} was replaced while it was read; try again")
    return place


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe that took its place meanwhile would keep the reader waiting for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def version_of(coefficients: Coefficients) -> bytes:
    """What a customer does and for which bundle: two files with the same are not told apart."""
    it = coefficients
    record = (it.digest, _digest_of_labels(it.labels), it.basis_digest, it.base_digest, it.task)
    return hashlib.sha256(repr(record).encode("utf-8", "surrogatepass")).digest()[:16]


@functools.lru_cache(SHARED_LABELS)
def _digest_of_labels(labels: tuple[str, ...]) -> str:
    return hashlib.sha256(repr(labels).encode("utf-8", "surrogatepass")).hexdigest()


def customer_of(file_name: str) -> str | None:
    """The customer whose file has this name; None where it is no customer's."""
    name = file_name.removesuffix(SUFFIX)
    return name if name != file_name and CUSTOMER_ID.fullmatch(name) else None
