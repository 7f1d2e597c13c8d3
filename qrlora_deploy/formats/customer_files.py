"""The files of customers: which names they have, and reading them while others write."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qrlora_deploy.errors import FileFormatError, InputError, MalformedInputError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID, SUFFIX, Coefficients, read_coefficients_content

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
    path = folder / f"{customer}{SUFFIX}"
    if path.is_file():
        return read_customer_file(path, inside=Path(os.path.realpath(folder)))
    try:
        place, inside = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _check_inside(path, place, inside)
    raise UnknownCustomerError(f"{folder} holds no customer {customer!r}: there is no file {path.name}")


def _check_inside(shown: Path, place: Path, folder: Path) -> None:
    # As texts: paths take several times as long, and a million customers come through here.
    if not str(place).startswith(f"{folder}".rstrip(os.sep) + os.sep):
        raise InputError(
            f"{shown} leads out of the folder, to {place}; links are followed within it only. Copy the file, or fetch "
            f"a hub's files by snapshot_download(local_dir=...)"
        )


def read_customer_file(path: Path, inside: Path | None = None) -> Coefficients:
    """Read and validate a coefficients file, which may be written to at the same time.

    safetensors maps a file into memory, and one that is cut meanwhile would end the process. So all of the file is
    read first, and nothing of it is ever mapped.

    Args:
        path: the file.
        inside: a folder, without links in its path, that the file must lie in; None: anywhere.

    Raises:
        InputError: it is no plain file, too large, outside of the folder or cannot be read.
        FileFormatError: it is damaged or not complete, or became shorter or longer while it was read.
    """
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


def _content(path: Path, inside: Path | None) -> bytes:
    # Before it is opened: opening a device may do something.
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path} is no plain file")
        if inside is not None:
            # Of the file that is open: a link may have taken the place of the one that was looked at.
            _check_inside(path, _place_of(file.fileno(), path), inside)
        # Before anything is read: a file with holes takes memory for all that it has not.
        if status.st_size > MAX_CUSTOMER_BYTES:
            raise InputError(f"{path} is too large for a customer")
        content = file.read(status.st_size + 1)
    if len(content) < status.st_size:
        raise FileFormatError(f"{path} is cut: it had {status.st_size} bytes, and {len(content)} when it was read")
    if len(content) > status.st_size:
        raise FileFormatError(f"{path} is not complete: it grew while it was read")
    return content


def _place_of(descriptor: int, path: Path) -> Path:
    """Where an open file lies.

    Args:
        descriptor: of the file.
        path: by which it was opened.

    Raises:
        InputError: the system does not tell, and something else lies there by now.
    """
    try:
        return (OPEN_FILES / str(descriptor)).readlink()
    except OSError:
        place = path.resolve()
    if not os.path.samestat(os.fstat(descriptor), place.stat()):
        raise InputError(f"{path} was replaced while it was read; try again")
    return place


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; a pipe that took its place meanwhile would keep the reader waiting for ever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def version_of(coefficients: Coefficients) -> bytes:
    """What a customer does and for which bundle: two files with the same are not told apart."""
    it = coefficients
    record = (it.digest, it.labels, it.basis_digest, it.base_digest, it.task)
    return hashlib.sha256(repr(record).encode("utf-8", "surrogatepass")).digest()[:16]


def customer_of(file_name: str) -> str | None:
    """The customer whose file has this name; None where it is no customer's."""
    name = file_name.removesuffix(SUFFIX)
    return name if name != file_name and CUSTOMER_ID.fullmatch(name) else None
