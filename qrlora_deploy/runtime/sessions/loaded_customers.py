"""The customers of a bundle in a table: they come, change and go while batches hold their rows."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qrlora_deploy.errors import (
    InputError,
    MalformedInputError,
    MismatchError,
    NotReadyError,
    UnknownCustomerError,
    argument,
)
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.customer_files import read_customer_file
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.compatibility import check_customer_fits
from qrlora_deploy.runtime.bundle.row_layout import (
    HEAD_TABLE,
    TABLE,
    HeadLayout,
    TableLayout,
    head_arrays,
)
from qrlora_deploy.runtime.bundle.sealed_facts import read_base_head
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.host.forking import LOST_ON_GPU, survive_forks
from qrlora_deploy.runtime.sessions.versions import Version, Versions
from qrlora_deploy.runtime.table.memory import make_memory
from qrlora_deploy.runtime.table.table import BASE_ROW, CoefficientTable, rows_of

START_ROWS = 64

FETCH_ATTEMPTS = 8
"""Rounds of fetching customers for one batch, while others push them out of a full table again."""


class LoadedCustomers:
    """The customers of a bundle, in a table. Safe for many threads.

    Args:
        bundle: an open bundle for many customers.
        provider: on whose device the table lies, as for `SwitchableSession`; so are the others.

    Attributes:
        base_head: the base's row of the head table, where customers may have heads of their own.
        fetch: finds a customer that is not in the table and returns it, or loads it itself and
            returns None, or raises `InputError`; None: such a customer is refused. A
            `CustomerStore` puts its own here.

    Raises:
        InputError: the bundle holds one customer.
        QrloraError: the table does not fit the device.
    """

    _lost = False

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        rows: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        manifest = bundle.manifest
        if manifest.kind == "merged":
            raise InputError(f"{bundle.folder} is a merged bundle and takes no customers; export a switchable one")
        self.bundle = bundle
        self.manifest = manifest
        self.layout = TableLayout([target.rank for target in manifest.targets], manifest.table_dtype)
        self.fetch: Callable[[str], Coefficients | None] | None = None
        self.versions = Versions(manifest.answering)
        self._on_gpu = Device.of(provider).on_gpu
        self.head = HeadLayout(manifest.head_labels, manifest.head_features) if manifest.head_labels else None
        widths = {TABLE: self.layout.width} | ({HEAD_TABLE: self.head.width} if self.head else {})
        self.base_head = read_base_head(bundle.folder, self.head, len(manifest.labels)) if self.head else None
        dtypes = {TABLE: self.layout.dtype}
        rows = min(START_ROWS, max_rows or START_ROWS) if rows is None else rows
        self.table = CoefficientTable(lambda count: make_memory(widths, count, provider, dtypes), rows, max_rows)
        nobody = {TABLE: np.zeros(self.layout.width, dtype=self.layout.dtype)}
        self.table.memory.write(BASE_ROW, nobody | ({} if self.base_head is None else {HEAD_TABLE: self.base_head}))
        survive_forks(self)

    def before_fork(self) -> None:
        """Nothing to do: the table looks after itself."""

    def after_fork(self, in_child: bool) -> None:
        """CUDA does not live in a forked child; what touched it there might crash or wait for ever."""
        self._lost = self._lost or (in_child and self._on_gpu)

    def load(self, customer: str, source: str | os.PathLike[str] | Coefficients) -> None:
        """Make a coefficients file, or what was read from one, what `customer` is from now on.

        Runs that are under way keep the version they began with. A file may be written to or cut at
        the same time: it is copied before it is read.

        Raises:
            InputError: the file cannot be read, is damaged or of another basis, base or task, or holds a number that
                the table cannot, or the customer has no name; the old version stays.
        """
        self.check_usable()
        if not isinstance(customer, str) or not customer:
            raise MalformedInputError(f"a customer is called by a text that is not empty, not {customer!r:.40}")
        coefficients = source if isinstance(source, Coefficients) else read_customer_file(Path(source))
        place = f"{customer}" if isinstance(source, Coefficients) else f"{source}"
        self.table.publish(customer, self._fitting_row(coefficients, place), self.versions.of(coefficients))

    def check(self, coefficients: Coefficients, place: str) -> None:
        """Make sure that `load` would take a customer; nothing is changed.

        Args:
            coefficients: the customer.
            place: its name or file, for the message.

        Raises:
            InputError: as `load`.
        """
        self._fitting_row(coefficients, place)

    def holds(self, customer: str, coefficients: Coefficients) -> bool:
        """Whether `customer` is in the table with exactly these coefficients, head, labels and thresholds.

        Raises:
            InputError: they fit another bundle, as for `load`.
        """
        if customer not in self.table:
            return False
        self.check_usable()
        row, version = self._fitting_row(coefficients, customer), self.versions.of(coefficients)
        # Of what came from a packed file no digest is known.
        notes = (version, self.versions.without_digest(version.answering))
        return any(self.table.holds(customer, row, note) for note in notes)

    def unload(self, customer: str) -> bool:
        """Forget a customer; runs that hold it end undisturbed. False where there is none."""
        return self.table.remove(customer)

    def customers(self) -> list[str]:
        """The customers that are in the table."""
        return self.table.customers()

    def rows(self, customers: Sequence[str | None]) -> tuple[dict[str, np.ndarray], list[Version]]:
        """A copy of the row of each customer, None being the base: `[n, width]` by table; and their versions.

        Raises:
            UnknownCustomerError: a customer is not there.
            InputError: its file cannot be served.
        """
        self.check_usable()
        held: dict[str | None, int] = {}
        try:
            self.hold(customers, held)
            slot = rows_of(customers, held)
            found = {
                name: np.concatenate([part.read_rows(row, 1) for row in slot.tolist()])
                for name, part in self.table.memory.parts.items()
            }
            return found, [self.version_with_digest(row) for row in slot.tolist()]
        finally:
            self.table.release(held.values())

    def version_of(self, row: int) -> Version:
        """What the table notes of a row that is held."""
        return self.table.note_of(row) or self.versions.base

    def version_with_digest(self, row: int) -> Version:
        """As `version_of`; a customer of a packed file gets its digest now, which the table keeps."""
        version = self.version_of(row)
        if version.digest or row == BASE_ROW:
            return version
        # Of a packed file, so without a head of its own.
        values = self.layout.values(self.table.memory.parts[TABLE].read_rows(row, 1)[0])
        version = version.with_digest(values)
        self.table.note(row, version)
        return version

    def lacks(self, customers: Sequence[str | None]) -> list[str]:
        """Those of `customers` that are not in the table now."""
        return [name for name in dict.fromkeys(customers) if name is not None and name not in self.table]

    def bring(self, customers: Sequence[str | None]) -> None:
        """Make sure that customers are in the table; those that are not are fetched.

        In a full table one may be pushed out again before it is asked for; `predict` fetches it then.

        Raises:
            UnknownCustomerError: a customer is not there.
            InputError: its file cannot be served.
        """
        self.check_usable()
        held: dict[str | None, int] = {}
        try:
            self.hold(customers, held)
        finally:
            self.table.release(held.values())

    def hold(self, customers: Sequence[str | None], held: dict[str | None, int]) -> None:
        """Hold the row of every customer, fetching those that are not in the table.

        Args:
            customers: None is the base.
            held: gets their rows, also those that were held before another customer was not found; `table.release`
                gives them back.

        Raises:
            UnknownCustomerError: a customer is not there.
            NotReadyError: the table is too small for what runs at the same time.
            InputError: a customer's file cannot be served.
        """
        found, missing = self.table.hold(customers)
        held.update(found)
        for _ in range(FETCH_ATTEMPTS):
            for name in missing:
                if self.fetch is None:
                    raise UnknownCustomerError(f"no customer is called {name!r}; load it first")
                fetched = self.fetch(name)
                if fetched is not None:
                    self.load(name, fetched)
                # At once: the next one that is fetched may push this one out of a full table.
                held.update(self.table.hold([name])[0])
            missing = [name for name in missing if name not in held]
            if not missing:
                return
        raise NotReadyError(f"the table of {self.table.max_rows} rows is too small for what runs at the same time")

    def check_usable(self) -> None:
        """Make sure that this is no forked child of a process that holds the table on a GPU.

        Raises:
            NotReadyError: it is one.
        """
        if self._lost:
            raise NotReadyError(LOST_ON_GPU)

    def _fitting_row(self, coefficients: Coefficients, place: str) -> dict[str, np.ndarray]:
        """The row of a customer, which may not fit at all."""
        check_customer_fits(coefficients, self.manifest, place)
        return self._row(coefficients, place)

    def _row(self, coefficients: Coefficients, place: str) -> dict[str, np.ndarray]:
        """The row of a customer that fits, by input; refuses a head or labels that do not."""
        try:
            row = {TABLE: self.layout.row(coefficients.values)}
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if coefficients.head:
            row[HEAD_TABLE] = self._head_row(coefficients, place)
        elif coefficients.labels != self.manifest.labels:
            raise MismatchError(f"{place} uses the base's head but has other labels than the bundle")
        elif self.base_head is not None:
            row[HEAD_TABLE] = self.base_head
        return row

    def _head_row(self, coefficients: Coefficients, place: str) -> np.ndarray:
        if self.head is None:
            raise MismatchError(f"{place} has a head of its own; export the bundle with {argument('head_labels')}")
        labels = len(coefficients.labels)
        if labels > self.head.labels:
            raise MismatchError(f"{place} has {labels} labels, the bundle room for {self.head.labels}")
        try:
            weight, bias = head_arrays(coefficients.head)
            row = self.head.row(weight, bias)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        if len(weight) != labels:
            raise InputError(f"{place} has {labels} labels but a head for {len(weight)}")
        return row
