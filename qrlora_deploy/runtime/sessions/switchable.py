"""One session for every customer of a base: any customer in any row of a batch."""

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
from qrlora_deploy.runtime.bundle.bundle import Bundle, check_graph
from qrlora_deploy.runtime.bundle.compatibility import check_customer_fits
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, TABLE, HeadLayout, TableLayout, head_arrays
from qrlora_deploy.runtime.bundle.sealed_facts import read_base_head
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.host.forking import survive_forks
from qrlora_deploy.runtime.sessions.bucket_runner import make_runner
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.input_checks import check_inputs
from qrlora_deploy.runtime.sessions.running import text_inputs
from qrlora_deploy.runtime.sessions.session import open_session
from qrlora_deploy.runtime.sessions.versions import Version, Versions
from qrlora_deploy.runtime.table.memory import make_memory
from qrlora_deploy.runtime.table.table import BASE_ROW, CoefficientTable, rows_of
from qrlora_deploy.tasks.answering import Answering

START_ROWS = 64

FETCH_ATTEMPTS = 8
"""Rounds of fetching customers for one batch, while others push them out of a full table again."""


class SwitchableSession:
    """A switchable bundle, open, and the customers that it serves. Safe for many threads.

    Args:
        bundle: an open bundle of the kind "switchable".
        provider: "cpu", "cuda", "cuda:1" or "tensorrt", or a `Device` with options of its own; the table
            lies on that device.
        rows: rows of the table at the start, which doubles when it is full. None: 64, or `max_rows` where that is less.
        max_rows: rows at most, with the base's; then the customer that was not used for longest
            gives way. None: no bound.
        threads: threads within an operator.
        buckets: run in these shapes only, all of them made ready here; on CUDA as captured graphs.
            After the table has grown, the first run in each bucket captures it anew. None: every
            batch runs as it comes.

    Attributes:
        buckets: as given.
        base_head: the base's row of the head table, where customers may have heads of their own.
        fetch: finds a customer that is not in the table and returns it, or loads it itself and
            returns None, or raises `InputError`; None: such a customer is refused. A
            `CustomerStore` puts its own here.

    Raises:
        InputError: the bundle is of another kind.
        ProviderError: the provider does not load.
        QrloraError: the table does not fit the device.
    """

    _lost = False

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        rows: int | None = None,
        max_rows: int | None = None,
        threads: int | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        manifest = bundle.manifest
        if manifest.kind != "switchable":
            raise InputError(f"{bundle.folder} is a {manifest.kind} bundle; export a switchable one")
        self.bundle = bundle
        self.manifest = manifest
        self.buckets = buckets
        self.layout = TableLayout([target.rank for target in manifest.targets], manifest.table_dtype)
        self.fetch: Callable[[str], Coefficients | None] | None = None
        self.versions = Versions(manifest.answering)
        self._on_gpu = Device.of(provider).on_gpu
        self.session = open_session(bundle.model, provider, threads, cuda_graph=buckets is not None)
        check_graph(self.session, bundle)
        self._text_inputs = text_inputs(manifest)
        self.head = HeadLayout(manifest.head_labels, manifest.head_features) if manifest.head_labels else None
        widths = {TABLE: self.layout.width} | ({HEAD_TABLE: self.head.width} if self.head else {})
        self.base_head = read_base_head(bundle.folder, self.head, len(manifest.labels)) if self.head else None
        dtypes = {TABLE: self.layout.dtype}
        rows = min(START_ROWS, max_rows or START_ROWS) if rows is None else rows
        self.table = CoefficientTable(lambda count: make_memory(widths, count, provider, dtypes), rows, max_rows)
        nobody = {TABLE: np.zeros(self.layout.width, dtype=self.layout.dtype)}
        self.table.memory.write(BASE_ROW, nobody | ({} if self.base_head is None else {HEAD_TABLE: self.base_head}))
        self._runner = make_runner(self.session, manifest, provider, buckets, lambda: self.table.memory)
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
        self._check_usable()
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
        self._check_usable()
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

    def predict(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[tuple[str, ...]]]:
        """The logits of a batch, each row for its customer, and the labels of each row; `run` also says more of it."""
        logits, answering = self.run(inputs, customers)
        return logits, [it.labels for it in answering]

    def run(self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]) -> tuple[np.ndarray, list[Answering]]:
        """Answer a batch, each row for its customer.

        Args:
            inputs: the text inputs, int64 `[batch, length]` each.
            customers: one per row; None is the base.

        Returns:
            Logits `[batch, outputs]` or `[batch, length, outputs]` fp32, and how those of each row become an answer: a
            customer with fewer labels than outputs has -inf behind them.

        Raises:
            MalformedInputError: inputs are missing, no int64 arrays `[rows, length]`, or negative.
            UnknownCustomerError: a customer is not there.
            QrloraError: the model fails, or this is a forked child of the session's process, on a GPU.
        """
        logits, versions = self._answer(inputs, customers, self._version_of)
        return logits, [version.answering for version in versions]

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        """As `run`, with the version of its customer that answered each row, and its digest."""
        return self._answer(inputs, customers, self._version_with_digest)

    def _answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None], version_of: Callable[[int], Version]
    ) -> tuple[np.ndarray, list[Version]]:
        """Logits, and the version in each row's row of the table, which is held meanwhile."""
        self._check_usable()
        if isinstance(customers, (str, bytes)) or not isinstance(customers, Sequence):
            raise MalformedInputError(f"customers must be a list with one for each row, not {type(customers).__name__}")
        check_inputs(inputs, self._text_inputs, len(customers))
        held: dict[str | None, int] = {}
        try:
            self._hold(customers, held)
            slot = rows_of(customers, held)
            logits = self._runner.run(inputs, slot)
            versions = [version_of(row) for row in slot.tolist()]
        finally:
            self.table.release(held.values())
        return logits, versions

    def _version_of(self, row: int) -> Version:
        """What the table notes of a row that is held."""
        return self.table.note_of(row) or self.versions.base

    def _version_with_digest(self, row: int) -> Version:
        version = self._version_of(row)
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
        self._check_usable()
        held: dict[str | None, int] = {}
        try:
            self._hold(customers, held)
        finally:
            self.table.release(held.values())

    def _hold(self, customers: Sequence[str | None], held: dict[str | None, int]) -> None:
        """Hold the row of every customer, fetching those that are not in the table."""
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

    def _check_usable(self) -> None:
        if self._lost:
            raise NotReadyError("a session on a GPU cannot be used in a forked process; open it after the fork")

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
