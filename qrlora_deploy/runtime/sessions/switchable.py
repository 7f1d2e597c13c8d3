"""One session for every customer of a base: any customer in any row of a batch."""

from collections.abc import Callable, Sequence

import numpy as np

from qrlora_deploy.errors import (
    InputError,
    MalformedInputError,
)
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.input_checks import check_inputs
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.sessions.merged_cache import MergedCache
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph
from qrlora_deploy.runtime.sessions.running import text_inputs
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.runtime.sessions.worker import Worker
from qrlora_deploy.runtime.table.memory import TableMemory
from qrlora_deploy.runtime.table.table import rows_of
from qrlora_deploy.tasks.answering import Answering


class SwitchableSession(LoadedCustomers):
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
        merged_cache_bytes: keep merged weights of customers who have batches for themselves, up to so many bytes on
            the device; such a batch then runs as in a merged bundle. 0: none. The bundle must have been
            exported for it.

    Attributes:
        buckets: as given. Others are those of `LoadedCustomers`.
        merged: the cache; None where there is none.

    Raises:
        InputError: the bundle is of another kind, or has no graphs for one customer, or the cache would hold none.
        ProviderError: the provider does not load.
        QrloraError: the table does not fit the device.
    """

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        rows: int | None = None,
        max_rows: int | None = None,
        threads: int | None = None,
        buckets: Buckets | None = None,
        merged_cache_bytes: int = 0,
    ) -> None:
        manifest = bundle.manifest
        if manifest.kind != "switchable":
            raise InputError(f"{bundle.folder} is a {manifest.kind} bundle; export a switchable one")
        self.buckets = buckets
        self.session = open_graph(bundle, provider, threads, cuda_graph=buckets is not None)
        self._text_inputs = text_inputs(manifest)
        super().__init__(bundle, provider, rows, max_rows)
        worker = None if buckets is None else Worker()
        self._runner = make_runner(self.session, bundle, provider, buckets, self._tables, threads, worker)
        self.merged: MergedCache | None = None
        if merged_cache_bytes:
            self.merged = MergedCache(bundle, provider, merged_cache_bytes, self._tables, threads, buckets, worker)

    def _tables(self) -> TableMemory:
        return self.table.memory

    def unload(self, customer: str) -> bool:
        """As `LoadedCustomers.unload`."""
        if self.merged is not None:
            self.merged.discard(customer)
        return super().unload(customer)

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
        logits, versions = self._answer(inputs, customers, self.version_of)
        return logits, [version.answering for version in versions]

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        """As `run`, with the version of its customer that answered each row, and its digest."""
        return self._answer(inputs, customers, self.version_with_digest)

    def _answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None], version_of: Callable[[int], Version]
    ) -> tuple[np.ndarray, list[Version]]:
        """Logits, and the version in each row's row of the table, which is held meanwhile."""
        self.check_usable()
        if isinstance(customers, (str, bytes)) or not isinstance(customers, Sequence):
            raise MalformedInputError(f"customers must be a list with one for each row, not {type(customers).__name__}")
        check_inputs(inputs, self._text_inputs, len(customers))
        held: dict[str | None, int] = {}
        try:
            self.hold(customers, held)
            slot = rows_of(customers, held)
            logits = self._run(inputs, slot, customers)
            versions = [version_of(row) for row in slot.tolist()]
        finally:
            self.table.release(held.values())
        return logits, versions

    def _run(self, inputs: dict[str, np.ndarray], slot: np.ndarray, customers: Sequence[str | None]) -> np.ndarray:
        """Logits of a batch whose rows are held; with merged weights where it is one customer's and they are kept."""
        if self.merged is not None and len(set(customers)) == 1:
            row = int(slot[0])
            logits = self.merged.run(inputs, customers[0], self.version_with_digest(row).digest, row)
            if logits is not None:
                return logits
        return self._runner.run(inputs, slot)
