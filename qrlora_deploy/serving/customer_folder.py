"""A folder of customers that is written to from outside: what comes is checked, what goes is kept for a while.

Versions lie in a hidden folder beside the customers' files, which a store that follows the folder does not see:
`.versions/CUSTOMER/TIME-HASH.safetensors`. Names come from this module alone; one that a client gives is looked for
among those that are there, and never becomes a path.
"""

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from heapq import nsmallest
from pathlib import Path

from qrlora_deploy.errors import QrloraError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import SUFFIX, Coefficients
from qrlora_deploy.formats.customer_files import (
    MAX_SENT_BYTES,
    check_customer_id,
    customer_ids,
    customer_of,
    read_customer_content,
)
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.io.temporary import remove_dead, remove_dead_where
from qrlora_deploy.serving.refusals import TooLargeError
from qrlora_deploy.serving.version_names import VERSION_NAME, hash_in, hash_of, next_name

VERSIONS = ".versions"
Check = Callable[[Coefficients, str], None]
"""Raises InputError where a bundle could not serve a customer: `SwitchableSession.check`."""


class UnknownVersionError(QrloraError):
    """A customer has no such version, or none before the one that is served."""

    kind = "not_found"


@dataclass(frozen=True)
class StoredVersion:
    """A version of a customer that is kept.

    Attributes:
        name: by which `roll_back` knows it; names rise with time.
        size_bytes: of the file.
        is_current: it is what the customer's file holds now.
    """

    name: str
    size_bytes: int
    is_current: bool


@dataclass(frozen=True)
class Changed:
    """What a customer is after a change.

    Attributes:
        version: the name of its version.
        digest: `Coefficients.digest`, as answers tell it.
    """

    version: str
    digest: str


class CustomerFolder:
    """Changes the files of a folder. Safe for many threads of one process.

    Args:
        folder: of the customers.
        check: what every file is held against before it goes live, beside being whole.
        keep: versions of a customer, with the one that is served.
        max_file_bytes: of a customer's file.
        elsewhere: takes a customer who is erased from wherever else it is, and says whether it was there.
    """

    def __init__(
        self,
        folder: Path,
        check: Check,
        keep: int = 10,
        max_file_bytes: int = MAX_SENT_BYTES,
        elsewhere: Callable[[str], bool] = lambda customer: False,
    ) -> None:
        self.folder, self.max_file_bytes = folder, max_file_bytes
        self._check, self._keep, self._elsewhere = check, keep, elsewhere
        self._lock = threading.Lock()
        # What a process left that was killed while it wrote; what a live one writes is locked, and stays.
        remove_dead_where(folder, lambda name: customer_of(name) is not None)

    def customers(self, after: str = "", limit: int = 1000) -> list[str]:
        """The first `limit` ids that come after one, sorted.

        Raises:
            InputError: the folder cannot be read.
        """
        return nsmallest(limit, (name for name in customer_ids(self.folder) if name > after))

    def put(self, customer: str, content: bytes) -> Changed:
        """Make `content`, a coefficients file, what the customer is; what it was before is kept as a version.

        Raises:
            MalformedInputError: the id is none.
            TooLargeError: the content is over its bound.
            FileFormatError: it is damaged or no coefficients file.
            InputError: the bundle cannot serve it.
        """
        check_customer_id(customer)
        digest = self._digest_of(content, customer)
        with self._changing(customer):
            self._keep_current(customer)
            name = self._store(customer, content)
            self._replace(customer, content)
            self._prune(customer, name)
            return Changed(name, digest)

    def delete(self, customer: str) -> None:
        """Take the customer's file away; its versions stay, and `roll_back` brings it back.

        Raises:
            UnknownCustomerError: there is none.
        """
        with self._changing(customer):
            self._find(customer)
            self._keep_current(customer)
            # Somebody else may have taken it away meanwhile, which is what is asked for.
            self._place(customer).unlink(missing_ok=True)

    def erase(self, customer: str) -> None:
        """Take the customer's file and all versions away, for good, and the customer from wherever else it is.

        Raises:
            UnknownCustomerError: it is nowhere.
            InputError: it cannot be taken from elsewhere; its files are gone.
        """
        check_customer_id(customer)
        with self._changing(customer):
            had_files = erase_files(self.folder, customer)
            # After its file: a request that came between would read it again.
            if not (self._elsewhere(customer) or had_files):
                raise _unknown(customer)

    def versions(self, customer: str) -> list[StoredVersion]:
        """The versions that are kept, the newest first.

        Raises:
            UnknownCustomerError: there is neither a file nor a version.
        """
        check_customer_id(customer)
        with self._changing(customer):
            content = self._current(customer)
            if content is not None:
                self._keep_current(customer)
            names = self._names(customer)
            if not names:
                raise _unknown(customer)
            current = None if content is None else hash_of(content)
            return [
                StoredVersion(name, self._version_file(customer, name).stat().st_size, hash_in(name) == current)
                for name in names
            ]

    def roll_back(self, customer: str, version: str | None = None) -> Changed:
        """Make a version that is kept what the customer is.

        Args:
            customer: its id.
            version: its name; None: the newest that is older than what is served; of one that was deleted the newest.

        Raises:
            UnknownCustomerError: there is neither a file nor a version.
            UnknownVersionError: there is no such version.
            InputError: the bundle cannot serve it any more.
        """
        kept = self.versions(customer)
        with self._changing(customer):
            name = _chosen(kept, customer, version)
            content = self._version_file(customer, name).read_bytes()
            digest = self._digest_of(content, customer)
            # It keeps its place among the versions: rolling back twice goes back by two.
            self._replace(customer, content)
            return Changed(name, digest)

    @contextmanager
    def _changing(self, customer: str) -> Iterator[None]:
        """One at a time; what the system says of a file becomes one line, as where somebody else moves it."""
        with self._lock:
            try:
                yield
            except OSError as error:
                raise QrloraError(f"the files of {customer} cannot be changed: {error.strerror or error}") from error

    def _digest_of(self, content: bytes, customer: str) -> str:
        """The digest of a file, after every check."""
        if len(content) > self.max_file_bytes:
            raise TooLargeError(f"the file is longer than the {self.max_file_bytes} bytes that a customer may have")
        shown = f"{customer}{SUFFIX}"
        coefficients = read_customer_content(content, shown)
        self._check(coefficients, shown)
        return coefficients.digest

    def _replace(self, customer: str, content: bytes) -> None:
        with atomic_file(self._place(customer)) as temporary:
            temporary.write_bytes(content)

    def _keep_current(self, customer: str) -> None:
        """Keep what the customer is now, also where nobody put it through here."""
        content = self._current(customer)
        if content is not None and hash_of(content) not in map(hash_in, self._names(customer)):
            self._store(customer, content)

    def _store(self, customer: str, content: bytes) -> str:
        # Of one that is kept already, the newest name: a version that is put again is the newest.
        names = self._names(customer)
        name = next_name(content, names)
        self._versions(customer).mkdir(parents=True, exist_ok=True)
        remove_dead_where(self._versions(customer), lambda name: VERSION_NAME.fullmatch(Path(name).stem) is not None)
        with atomic_file(self._version_file(customer, name)) as temporary:
            temporary.write_bytes(content)
        for older in names:
            if hash_in(older) == hash_in(name):
                self._version_file(customer, older).unlink()
        return name

    def _prune(self, customer: str, current: str) -> None:
        for name in [name for name in self._names(customer) if name != current][self._keep - 1 :]:
            with suppress(OSError):
                self._version_file(customer, name).unlink()

    def _names(self, customer: str) -> list[str]:
        """Of the versions that are kept, the newest first."""
        folder = self._versions(customer)
        found = [path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}") if path.is_file()]
        return sorted(filter(VERSION_NAME.fullmatch, found), reverse=True)

    def _find(self, customer: str) -> None:
        check_customer_id(customer)
        if not self._place(customer).is_file():
            raise _unknown(customer)

    def _current(self, customer: str) -> bytes | None:
        """What the customer's file holds; None where there is none that could have been served."""
        path = self._place(customer)
        inside = path.is_file() and path.resolve().is_relative_to(self.folder.resolve())
        try:
            return path.read_bytes() if inside and path.stat().st_size <= self.max_file_bytes else None
        except FileNotFoundError:
            return None  # Somebody else has taken it away since.

    def _place(self, customer: str) -> Path:
        return self.folder / f"{customer}{SUFFIX}"

    def _versions(self, customer: str) -> Path:
        return self.folder / VERSIONS / customer

    def _version_file(self, customer: str, name: str) -> Path:
        return self._versions(customer) / f"{name}{SUFFIX}"


def erase_files(folder: Path, customer: str) -> bool:
    """Take a customer's file in a folder, and the versions that are kept there, away for good; whether there were any.

    Raises:
        QrloraError: a file cannot be removed.
    """
    file, versions = folder / f"{customer}{SUFFIX}", folder / VERSIONS / customer
    there = file.is_file() or file.is_symlink() or versions.is_dir()
    # A process that was killed while it wrote the customer has left a copy.
    remove_dead(folder, [file.name])
    try:
        file.unlink(missing_ok=True)
        if versions.is_dir():
            shutil.rmtree(versions)
    except OSError as error:
        raise QrloraError(f"{customer} cannot be erased from {folder}: {error.strerror or error}") from error
    return there


def _chosen(kept: list[StoredVersion], customer: str, version: str | None) -> str:
    names = [item.name for item in kept]
    if version is not None:
        if version not in names:
            raise UnknownVersionError(f"{customer} has no version {version!r:.80}; ask for its versions")
        return version
    current = next((number for number, item in enumerate(kept) if item.is_current), -1)
    if current + 1 >= len(names):
        raise UnknownVersionError(f"no version of {customer} is kept that is older than what is served")
    return names[current + 1]


def _unknown(customer: str) -> UnknownCustomerError:
    return UnknownCustomerError(f"there is no customer {customer!r}")
