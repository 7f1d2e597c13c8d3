"""The version of a customer that an answer is written with, from its first token to its last."""

import hashlib
from dataclasses import dataclass

from qrlora_deploy.errors import UnknownCustomerError
from qrlora_deploy.runtime.bundle.row_layout import TABLE
from qrlora_deploy.runtime.sessions.loaded_customers import LoadedCustomers
from qrlora_deploy.runtime.table.memory import TableMemory
from qrlora_deploy.runtime.table.table import BASE_ROW


@dataclass(frozen=True)
class Held:
    """A version that is held.

    Attributes:
        slot: its row of the table.
        digest: of the customer's coefficients; empty for the base.
        numbers: SHA-256 of the row, which says what it answers by, whoever has it.
    """

    slot: int
    digest: str
    numbers: bytes


class Holder:
    """Holds versions of customers for as long as answers are written with them.

    Args:
        rows: the customers; None: of a merged bundle, which has one without a name.
        place: the bundle, for messages.
        digest: of the customer in a merged bundle.
    """

    def __init__(self, rows: LoadedCustomers | None, place: str, digest: str = "") -> None:
        self._rows, self._place = rows, place
        self._nobody = Held(BASE_ROW, digest, b"")

    @property
    def memory(self) -> TableMemory | None:
        """The table as it lies now; rows that are held are the same after it has moved."""
        return None if self._rows is None else self._rows.table.memory

    def check(self, customer: str | None) -> None:
        """Make sure that a customer is there, who is fetched where that is needed.

        Raises:
            UnknownCustomerError: it is not.
            InputError: its file cannot be served.
        """
        if customer is not None:
            self.release(self.hold(customer))

    def hold(self, customer: str | None) -> Held:
        """Hold the version that a customer has now; what is published later is another one.

        Raises:
            UnknownCustomerError: it is not there.
            InputError: its file cannot be served.
            NotReadyError: the table is full of customers in use.
        """
        if self._rows is None:
            if customer is not None:
                raise UnknownCustomerError(
                    f"{self._place} is a merged bundle: it holds one customer, who has no name in it"
                )
            return self._nobody
        self._rows.check_usable()
        held: dict[str | None, int] = {}
        try:
            self._rows.hold([customer], held)
            slot = held[customer]
            digest = self._rows.version_with_digest(slot).digest
            row = self._rows.table.memory.parts[TABLE].read_rows(slot, 1)
        except BaseException:
            self._rows.table.release(held.values())
            raise
        return Held(slot, digest, hashlib.sha256(row.tobytes()).digest())

    def release(self, held: Held) -> None:
        """Let go of a version."""
        if self._rows is not None:
            self._rows.table.release([held.slot])
