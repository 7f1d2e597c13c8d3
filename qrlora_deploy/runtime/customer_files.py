"""The files of customers: which names they have, and reading them while others write."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qrlora_deploy.coefficients import CUSTOMER_ID, SUFFIX, Coefficients, read_coefficients
from qrlora_deploy.errors import InputError
from qrlora_deploy.temporary import scratch_folder

OPEN_FILES = Path("/proc/self/fd")

MAX_CUSTOMER_BYTES = 2**30
"""No customer's file is larger; what is longer is not read to its end."""


def check_customer_id(name: str) -> None:
    """Make sure that `name` can be a customer and the name of its file.

    Raises:
        InputError: it has other characters than A-Z, a-z, 0-9, dot, underscore and hyphen, starts
            with a dot, or has not 1 to 128 characters.
    """
    if not CUSTOMER_ID.fullmatch(name):
        raise InputError(
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
        place = path.resolve()
        if not place.is_relative_to(folder.resolve()):
            raise InputError(f"{path} leads out of the folder, to {place}")
        # Before it is opened: a pipe would keep the reader waiting for ever.
        if not place.is_file():
            raise InputError(f"{folder} holds no customer {customer!r}: there is no file {path.name}")
        with place.open("rb") as file:
            # Before anything is read: a file with holes takes memory for all that it has not.
            too_large = os.fstat(file.fileno()).st_size > MAX_CUSTOMER_BYTES
            content = b"" if too_large else file.read(MAX_CUSTOMER_BYTES + 1)
    except (OSError, RuntimeError) as error:  # a circle of links is a RuntimeError
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if too_large or len(content) > MAX_CUSTOMER_BYTES:
        raise InputError(f"{path} is too large for a customer")
    with _private_copy(content) as copy:
        try:
            return read_coefficients(copy)
        except InputError as error:
            raise type(error)(str(error).replace(str(copy), str(path))) from error


@contextmanager
def _private_copy(content: bytes) -> Iterator[Path]:
    """A file with `content` that nobody else writes to.

    safetensors maps a file into memory, and one that is cut meanwhile would end the process.
    """
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
