"""Customers in a folder: read when they are asked for, and live soon after their file changes."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qrlora_deploy.errors import InputError, NotReadyError, QrloraError
from qrlora_deploy.formats.customer_files import (
    SUFFIX,
    check_customer_id,
    customer_ids,
    customer_of,
    read_customer,
    version_of,
)
from qrlora_deploy.runtime.customers.backlog import Backlog
from qrlora_deploy.runtime.customers.events import Report, StoreEvent, event_of, is_refusal, tell
from qrlora_deploy.runtime.customers.polling import Again, Signature, changed_s, newest_first, signature_of, status_of
from qrlora_deploy.runtime.customers.watching import FolderWatcher
from qrlora_deploy.runtime.host.forking import survive_forks
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers

__all__ = ["CustomerStore", "StoreEvent", "check_customer_id"]

LOCKS = 64
"""Customers share this many locks: enough that two that are read at once rarely wait for each other."""

SETTLE_S = 3.0
"""Where files are compared, one that was read when it was younger is read once more. Some file systems keep
whole seconds only, so a second change within one would not be seen."""

BUSY_S = 1.0
"""What is only compared with the table waits so long at most for a comparison of the folder's files."""


class CustomerStore:
    """Files `folder/<id>.safetensors` behind a session. Safe for many threads.

    The session's `fetch` becomes this store's: a customer that is not in the table, or was pushed
    out of it, is read when it is asked for. Between `start` and `close` a thread watches the
    folder: a changed file of a customer in the table goes live, a deleted one is unloaded. A file
    that cannot be served is reported and what was loaded before goes on being served.

    A file may be a link within the folder; that its target was replaced is seen when something
    changes in the folder itself, or when files are compared.

    A changed file is read before anything else, however many there are to read. What is in the table
    already is not published again, whoever published it. A store that was started goes on in a child
    that is forked.

    Args:
        session: where the customers go.
        folder: their files.
        report: called with every event, from any thread; without it events are logged.
        poll: compare the files again and again instead of asking the system for changes, which
            network folders do not tell.

    Raises:
        InputError: there is no such folder, or the session has a store or a `fetch` already.
    """

    def __init__(
        self,
        session: LoadedCustomers,
        folder: str | os.PathLike[str],
        report: Report | None = None,
        poll: bool = False,
    ) -> None:
        if not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder")
        self.session = session
        self.folder = Path(folder).absolute()
        self._report = report
        # A customer is read and published under its lock: what was read before a change can then
        # never be published after it.
        self._locks = _new_locks()
        self._read: dict[str, tuple[bytes, Signature | None]] = {}
        self._again: dict[str, Again] = {}
        self._links: set[str] = set()
        self._backlog = Backlog(self._refresh, self._catch_up, self._due, self._complain)
        self._watcher = FolderWatcher(self.folder, self._compare, self._follow, self._complain, poll)
        self._take_over()
        survive_forks(self)

    def __enter__(self) -> "CustomerStore":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def before_fork(self) -> None:
        """Nothing to do: who reads a file may take long, and the child reads it itself."""

    def after_fork(self, in_child: bool) -> None:
        """Begin anew in a forked child, to which no thread came along."""
        if in_child:
            was_running = self._watcher.running
            self._locks = _new_locks()
            self._backlog.reset()
            self._watcher.reset()
            if was_running:
                self.start()

    def customers(self) -> list[str]:
        """Ids of all files in the folder, sorted; they are not read.

        Raises:
            InputError: the folder cannot be read.
        """
        return sorted(customer_ids(self.folder))

    def start(self) -> None:
        """Begin to watch. What changed since the customers in the table were read goes live too.

        Raises:
            InputError: the session has another store by now.
        """
        self._take_over()
        self._backlog.start()
        self._watcher.start()

    def reread(self) -> None:
        """Read all files again that were read before, and compare the others, while requests go on."""
        self._backlog.add(list(self._read), first=False)
        self._compare(again=True)

    def close(self) -> None:
        """Stop to watch and let go of the session; what is in its table stays there."""
        self._watcher.close()
        self._backlog.close()
        if self.session.fetch == self.fetch:
            self.session.fetch = None

    def _take_over(self) -> None:
        if self.session.fetch not in (None, self.fetch):
            raise InputError(f"{self.folder}: the session has a store or a `fetch` already; close that one first")
        self.session.fetch = self.fetch

    def fetch(self, customer: str, again: bool = False) -> None:
        """Bring a customer into the table, unless another request has just done so.

        Args:
            again: read its file also where the customer is in the table, such as from a packed file.

        Raises:
            InputError: the id is none, there is no file, or it is refused.
            NotReadyError: the whole folder is not there.
            QrloraError: the table cannot grow.
        """
        check_customer_id(customer)
        try:
            with self._lock_of(customer):
                event = None if customer in self.session.table and not again else self._bring(customer)
        except QrloraError as error:
            if os.path.lexists(self._path(customer)):
                self._tell(event_of(customer, error))
            elif not self.folder.is_dir():
                # Nobody knows whom it has. The watcher has told it.
                raise NotReadyError("the folder of this customer is not there; try again soon") from error
            raise
        self._tell(event)

    def _bring(self, customer: str) -> StoreEvent | None:
        """Read a customer and publish it where it does something new. Called under its lock."""
        path = self._path(customer)
        status = status_of(path)
        signature = signature_of(status)
        try:
            coefficients = read_customer(self.folder, customer)
            version = version_of(coefficients)
            known = self._read.get(customer)
            # What somebody else published, such as a packed file, is known by its content alone.
            there = (known is None or known[0] == version) and self.session.holds(customer, coefficients)
            if not there:
                self.session.load(customer, coefficients)
        except Exception as error:
            self._look_again(
                customer, Again(signature if is_refusal(error) else None, event_of(customer, error).message)
            )
            raise
        linked = os.path.islink(path)  # noqa: PTH114
        (self._links.add if linked else self._links.discard)(customer)
        if linked or known is not None or not there:
            # Of millions that came from a packed file nothing is kept here.
            self._read[customer] = (version, signature)
        fresh = self._watcher.polls and status is not None and changed_s(status) > time.time() - SETTLE_S
        self._look_again(customer, Again(signature, after_s=time.monotonic() + SETTLE_S) if fresh else None)
        return None if there else StoreEvent("loaded", customer, f"{path} is live", coefficients.digest)

    def _look_again(self, customer: str, again: Again | None) -> None:
        # Without a watcher nobody would look; `start` looks at everything.
        if again is not None and self._watcher.running:
            self._again[customer] = again
        else:
            self._again.pop(customer, None)

    def _update(self, customer: str) -> StoreEvent | None:
        """Do what the customer's file asks for now. Called under its lock."""
        if not os.path.lexists(self._path(customer)):
            if not self.folder.is_dir():
                return None  # The whole folder went away: that is no reason to stop serving.
            self._forget(customer)
            removed = self.session.unload(customer)
            return StoreEvent("removed", customer, f"{self._path(customer)} was deleted") if removed else None
        again = self._again.get(customer)
        if customer in self.session.table or (again is not None and again.message):
            return self._bring(customer)
        self._forget(customer)
        return None

    def _forget(self, customer: str) -> None:
        self._read.pop(customer, None)
        self._again.pop(customer, None)
        self._links.discard(customer)

    def _refresh(self, customer: str) -> None:
        """`_update`, whatever happens; the same complaint is made once."""
        before = self._again.get(customer)
        try:
            with self._lock_of(customer):
                event = self._update(customer)
        except Exception as error:
            event = event_of(customer, error)
            if before is not None and before.message == event.message:
                return
        self._tell(event)

    def _follow(self, names: set[str]) -> None:
        customers = {name: customer_of(name) for name in names}
        self._backlog.add(filter(None, customers.values()))
        if None in customers.values():
            # A folder of versions may have been swapped, to which customers' files are links.
            self._backlog.add([customer for customer in list(self._links) if self._differs(customer)])

    def _complain(self, message: str) -> None:
        self._tell(StoreEvent("failed", "", f"{message}; what is loaded goes on being served"))

    def _due(self) -> list[str]:
        """Customers to look at again by now."""
        due = []
        for customer, again in list(self._again.items()):
            if again.after_s is not None:
                now = time.monotonic() >= again.after_s
            else:
                signature = self._signature(customer)
                # A deletion is told; a file that is missing here may be missing with its whole folder.
                now = signature is not None and (again.signature is None or again.signature != signature)
            if now:
                due.append(customer)
        return due

    def _compare(self, again: bool) -> None:
        """Catch up with what changed while nobody watched, when there is nothing else to do."""
        if again and self._read and not any(True for _ in customer_ids(self.folder)):
            # More likely a folder that is not mounted than one whose customers have all gone.
            self._complain(f"{self.folder} is empty")
            return
        self._backlog.compare_later(self._all_customers())

    def _all_customers(self) -> Iterator[str]:
        """Those with a file, and then those that had one; an empty name is none."""
        try:
            yield from (customer_of(name) or "" for name in newest_first(self.folder))
        except OSError as error:
            # A folder that went away is the watcher's affair; it compares again when there is one.
            if self.folder.is_dir():
                raise InputError(f"{self.folder} cannot be read: {error.strerror or error}") from error
            return
        yield from list(self._read)

    def _catch_up(self, customer: str) -> None:
        self._watcher.rests.wait(BUSY_S)
        if self._differs(customer) if customer in self._read else customer in self.session.table:
            self._refresh(customer)

    def _differs(self, customer: str) -> bool:
        """Whether a customer's file is another one than was read."""
        known = self._read.get(customer)
        return known is not None and (known[1] is None or known[1] != self._signature(customer))

    def _tell(self, event: StoreEvent | None) -> None:
        tell(self._report, event)

    def _signature(self, customer: str) -> Signature | None:
        return signature_of(status_of(self._path(customer)))

    def _path(self, customer: str) -> str:
        # A Path takes several times as long, and a million customers come through here.
        return f"{self.folder}{os.sep}{customer}{SUFFIX}"

    def _lock_of(self, customer: str) -> threading.Lock:
        return self._locks[hash(customer) % LOCKS]


def _new_locks() -> tuple[threading.Lock, ...]:
    return tuple(threading.Lock() for _ in range(LOCKS))
