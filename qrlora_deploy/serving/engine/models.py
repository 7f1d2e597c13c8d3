"""What an engine runs: a session of many customers, or a merged bundle as if it were one."""

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qrlora_deploy.errors import InputError, UnknownCustomerError
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.manifest import Manifest
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.runtime.sessions.runners import make_runner, open_graph
from qrlora_deploy.runtime.sessions.versions import Version


class Table(Sized, Protocol):
    """Customers in memory; `CoefficientTable` is one.

    Attributes:
        loads: versions of customers that were brought into it.
        evictions: customers that made room for others.
    """

    loads: int
    evictions: int


class Model(Protocol):
    """What an engine runs; `SwitchableSession` is one.

    Attributes:
        bundle: that it runs.
        manifest: of the bundle.
        buckets: shapes that it runs in; None: whatever comes.
        table: of the customers in memory.
    """

    bundle: Bundle
    manifest: Manifest
    buckets: Buckets | None

    @property
    def table(self) -> "Table":
        """See above."""

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        """As `SwitchableSession.answer`."""

    def bring(self, customers: Sequence[str | None]) -> None:
        """As `SwitchableSession.bring`."""

    def lacks(self, customers: Sequence[str | None]) -> list[str]:
        """As `SwitchableSession.lacks`."""


@dataclass
class NoTable:
    """Of a merged bundle, which has no customers."""

    loads: int = 0
    evictions: int = 0

    def __len__(self) -> int:
        return 0


class MergedModel:
    """A merged bundle, open: its one customer has no name, and answers the rows of nobody.

    Args:
        bundle: an open bundle of the kind "merged".
        provider: as for `SwitchableSession`, and so are the others.

    Raises:
        InputError: the bundle is of another kind.
        ProviderError: the provider does not load.
    """

    table = NoTable()

    def __init__(
        self,
        bundle: Bundle,
        provider: str | Device = "cpu",
        threads: int | None = None,
        buckets: Buckets | None = None,
    ) -> None:
        if bundle.manifest.kind != "merged":
            raise InputError(f"{bundle.folder} is a {bundle.manifest.kind} bundle, not a merged one")
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.buckets = buckets
        session = open_graph(bundle, provider, threads, cuda_graph=buckets is not None)
        self._runner = make_runner(session, bundle, provider, buckets, threads=threads)
        self._version = Version(self.manifest.answering, self.manifest.coefficients_digest or "")

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        """Logits `[batch, outputs]` fp32, and the version of the bundle's customer for each row."""
        self.bring(customers)
        return self._runner.run(inputs), [self._version] * len(customers)

    def bring(self, customers: Sequence[str | None]) -> None:
        """Refuse every customer that has a name.

        Raises:
            UnknownCustomerError: one has.
        """
        for name in self.lacks(customers):
            raise UnknownCustomerError(f"no customer is called {name!r}: a merged bundle holds one, without a name")

    def lacks(self, customers: Sequence[str | None]) -> list[str]:
        """The customers that have a name."""
        return [customer for customer in customers if customer is not None]
