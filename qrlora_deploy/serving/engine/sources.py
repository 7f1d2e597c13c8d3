"""Where an engine's customers come from."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.customers.events import Report
from qrlora_deploy.runtime.customers.objects.bucket import Bucket
from qrlora_deploy.runtime.customers.objects.store import POLL_S, ObjectStore, ObjectStoreStats
from qrlora_deploy.runtime.customers.packed import Progress, load_packed
from qrlora_deploy.runtime.customers.store import CustomerStore
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers

Place = str | os.PathLike[str]


class CustomerSource(Protocol):
    """Customers from somewhere, with the same checks wherever they come from. For one thread at a time."""

    def open(self, session: LoadedCustomers) -> None:
        """Make the customers answer in a session; when it returns, all that is to be there at the start is.

        Raises:
            InputError: there is no such place, or what is there cannot be served.
            NotReadyError: the place does not answer.
        """

    def reload(self) -> None:
        """See what has changed, now. On an error everything stays as it was.

        Raises:
            InputError: what is there cannot be served, or the source is not open.
            NotReadyError: the place does not answer.
        """

    def close(self) -> None:
        """Look no more; the customers in the session's table stay there."""


class NoSource:
    """No customers but those that somebody loads into the session."""

    def open(self, session: LoadedCustomers) -> None:
        """Nothing to do."""

    def reload(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""


class FolderSource:
    """A folder of customers' files, followed as it changes (`CustomerStore`).

    Args:
        folder: files `<customer>.safetensors`.
        report: called with every event; without it events are logged.
        poll: compare files instead of asking the system for changes.
        preload: read every customer at the start, as far as the table has room; otherwise each is read when it is
            asked for first. A file that cannot be served is reported and passed over.
    """

    def __init__(self, folder: Place, report: Report | None = None, poll: bool = False, preload: bool = False) -> None:
        self._folder, self._report, self._poll, self._preload = Path(folder), report, poll, preload
        self._store: CustomerStore | None = None

    def open(self, session: LoadedCustomers) -> None:
        """As `CustomerSource.open`."""
        self._store = CustomerStore(session, self._folder, self._report, self._poll)
        self._store.start()
        if self._preload:
            self._read_all(session, self._store)

    def reload(self) -> None:
        """As `CustomerSource.reload`; the files are read in a thread of the store, which reports them."""
        if self._store is None:
            raise InputError(f"{self._folder} is not open; open the source first")
        self._store.reread()

    def close(self) -> None:
        """As `CustomerSource.close`."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _read_all(self, session: LoadedCustomers, store: CustomerStore) -> None:
        room = session.table.max_rows
        for customer in store.customers():
            if room is not None and len(session.table) + 1 >= room and customer not in session.table:
                continue
            try:
                store.fetch(customer, again=True)
            except InputError:
                continue  # The store has told it.


class PackedSource:
    """A packed file, which fills the table when it is opened (`load_packed`).

    Args:
        path: the file.
        progress: as for `load_packed`.
    """

    def __init__(self, path: Place, progress: Progress | None = None) -> None:
        self._path, self._progress = Path(path), progress
        self._session: LoadedCustomers | None = None

    def open(self, session: LoadedCustomers) -> None:
        """As `CustomerSource.open`."""
        load_packed(session, self._path, self._progress)
        self._session = session

    def reload(self) -> None:
        """As `CustomerSource.reload`; customers who are not in the file any more stay."""
        if self._session is None:
            raise InputError(f"{self._path} is not open; open the source first")
        load_packed(self._session, self._path, self._progress)

    def close(self) -> None:
        """As `CustomerSource.close`."""
        self._session = None


class ObjectSource:
    """Objects under a URL of a store, listed again and again (`ObjectStore`).

    Args:
        url: as `check_url` allows.
        report: called with every event; without it events are logged.
        poll_s: seconds from one listing to the next.

    Raises:
        InputError: the URL cannot be opened.
    """

    def __init__(self, url: str, report: Report | None = None, poll_s: float = POLL_S) -> None:
        self.bucket = Bucket(url)
        self._report, self._poll_s = report, poll_s
        self._store: ObjectStore | None = None

    def open(self, session: LoadedCustomers) -> None:
        """As `CustomerSource.open`: when it returns, every customer that is there is known."""
        self._store = ObjectStore(session, self.bucket, self._report, self._poll_s)
        try:
            self._store.start()
        except BaseException:
            self.close()
            raise

    def reload(self) -> None:
        """As `CustomerSource.reload`."""
        self._opened().look()

    def close(self) -> None:
        """As `CustomerSource.close`."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def stats(self) -> ObjectStoreStats:
        """How the store is doing.

        Raises:
            InputError: the source is not open.
        """
        return self._opened().stats()

    def _opened(self) -> ObjectStore:
        if self._store is None:
            raise InputError(f"{self.bucket.url} is not open; open the source first")
        return self._store


class ManySources:
    """Several sources, opened in turn: a customer that two of them have is the later one's.

    Args:
        sources: packed files first, then a folder or an object store at most.
    """

    def __init__(self, sources: Sequence[CustomerSource]) -> None:
        self._sources = tuple(sources)

    def open(self, session: LoadedCustomers) -> None:
        """As `CustomerSource.open`; where one fails, those before it are closed."""
        for number, source in enumerate(self._sources):
            try:
                source.open(session)
            except BaseException:
                _each(lambda opened: opened.close(), self._sources[:number])
                raise

    def reload(self) -> None:
        """As `CustomerSource.reload`; where two have a customer, the earlier one's may answer for a moment."""
        _each(lambda source: source.reload(), self._sources)

    def close(self) -> None:
        """As `CustomerSource.close`."""
        _each(lambda source: source.close(), self._sources[::-1])


def source_of(
    folder: Place | None = None, packed: Place | None = None, objects: CustomerSource | None = None
) -> CustomerSource:
    """The source of a folder, a packed file, objects, or none of them; packed customers give way to the others."""
    sources: list[CustomerSource] = []
    if packed is not None:
        sources.append(PackedSource(packed))
    if folder is not None:
        sources.append(FolderSource(folder))
    if objects is not None:
        sources.append(objects)
    return sources[0] if len(sources) == 1 else ManySources(sources) if sources else NoSource()


def _each(do: Callable[[CustomerSource], None], sources: Sequence[CustomerSource]) -> None:
    for source in sources:
        do(source)
