"""The files of customers: which names they have, and reading them while others write."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qrlora_deploy.errors import FileFormatError, InputError, MalformedInputError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import CUSTOMER_ID, SUFFIX, Coefficients, read_coefficients
from qrlora_deploy.io.temporary import scratch_folder

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
    try:
        place, inside = path.resolve(), folder.resolve()
        there = place.is_file()
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _check_inside(path, place, inside)
    if not there:
        raise UnknownCustomerError(f"{folder} holds no customer {customer!r}: there is no file {path.name}")
    return read_customer_file(place, path, inside)


def _check_inside(shown: Path, place: Path, folder: Path) -> None:
    if not place.is_relative_to(folder):
        raise InputError(
            f"{shown} leads out of the folder, to {place}; links are followed within it only. Copy the file, or fetch "
            f"a hub's files by snapshot_download(local_dir=...)"
        )


def read_customer_file(path: Path, shown: Path | None = None, inside: Path | None = None) -> Coefficients:
    """Read and validate a coefficients file, which may be written to at the same time.

    safetensors maps a file into memory, and one that is cut meanwhile would end the process. So the
    file is copied first, with as much memory as it is long, and nothing of it is ever mapped.

    Args:
        path: the file.
        shown: how messages call it, where that is something else.
        inside: a folder, without links in its path, that the file must lie in; None: anywhere.

    Raises:
        InputError: it is no plain file, too large, outside of the folder or cannot be read.
        FileFormatError: it is damaged or not complete, or became shorter or longer while it was read.
    """
    name = shown or path
    try:
        content = _content(path, name, inside)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error
    return read_customer_content(content, str(name))


def read_customer_content(content: bytes, shown: str) -> Coefficients:
    """Validate the content of a coefficients file.

    Args:
        content: all of it.
        shown: how messages call it.

    Raises:
        FileFormatError: it is damaged or not complete.
    """
    with _private_copy(content) as copy:
        try:
            return read_coefficients(copy)
        except InputError as error:
            raise type(error)(str(error).replace(str(copy), shown)) from error


def _content(path: Path, shown: Path, inside: Path | None) -> bytes:
    # Before it is opened: opening a device may do something.
    if not path.is_file():
        raise InputError(f"{shown}: no such file")
    with open(path, "rb", opener=_open_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{shown} is no plain file")
        if inside is not None:
            # Of the file that is open: a link may have taken the place of the one that was looked at.
            _check_inside(shown, _place_of(file.fileno(), path), inside)
        # Before anything is read: a file with holes takes memory for all that it has not.
        if status.st_size > MAX_CUSTOMER_BYTES:
            raise InputError(f"{shown} is too large for a customer")
        content = file.read(status.st_size + 1)
    if len(content) < status.st_size:
        raise FileFormatError(f"{shown} is cut: it had {status.st_size} bytes, and {len(content)} when it was read")
    if len(content) > status.st_size:
        raise FileFormatError(f"{shown} is not complete: it grew while it was read")
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
    record = [it.digest, it.labels, it.basis_digest, it.base_digest, it.task]
    return hashlib.sha256(json.dumps(record).encode()).digest()[:16]


@contextmanager
def _private_copy(content: bytes) -> Iterator[Path]:
    """A file with `content` that nobody else writes to."""
    if hasattr(os, "memfd_create") and OPEN_FILES.is_dir():
        # In memory: a file in a temporary folder takes ten times as long.
        with os.fdopen(os.memfd_create("customer"), "wb") as file:
            file.write(content)
            file.flush()
            yield OPEN_FILES / str(file.fileno())
        return
    with scratch_folder() as folder:
        copy = folder / "customer"
        copy.write_bytes(content)
        yield copy


def customer_of(file_name: str) -> str | None:
    """The customer whose file has this name; None where it is no customer's."""
    name = file_name.removesuffix(SUFFIX)
    return name if name != file_name and CUSTOMER_ID.fullmatch(name) else None
