"""Who is next: customers in turn, each with as many tokens a turn; the rows of one in the order in which they came."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

QUANTUM = 128
"""Tokens a turn."""


class Waiting(Protocol):
    """What waits: a row, or an answer that is to be written."""

    @property
    def customer(self) -> str | None:
        """Whose it is."""

    @property
    def length(self) -> int:
        """Tokens."""


W = TypeVar("W", bound=Waiting)


class FairQueue(Generic[W]):
    """Waiting rows by customer, given out by deficit round robin. For one thread at a time.

    In every turn a customer may take `quantum` tokens more; what it does not use is kept while it has rows waiting.
    So over time customers with rows waiting get as many tokens each, however many rows they have queued.

    Args:
        quantum: tokens. A row that is longer waits for as many turns as it takes.

    Attributes:
        rows: that wait.
        tokens: of those rows.
    """

    def __init__(self, quantum: int = QUANTUM) -> None:
        self.rows = 0
        self.tokens = 0
        self._quantum = quantum
        self._waiting: dict[str | None, OrderedDict[int, W]] = {}
        # In the order of their turns, with the tokens that each may still take.
        self._turns: OrderedDict[str | None, int] = OrderedDict()

    def push(self, rows: Iterable[W]) -> None:
        """Queue rows, each behind those of its customer."""
        for row in rows:
            self._waiting.setdefault(row.customer, OrderedDict())[id(row)] = row
            self._turns.setdefault(row.customer, self._quantum)
            self.rows += 1
            self.tokens += row.length

    def discard(self, rows: Iterable[W]) -> None:
        """Take out those of the rows that still wait."""
        for row in rows:
            if id(row) in self._waiting.get(row.customer, ()):
                self._take(row.customer, id(row))

    def draw(self, tokens: int) -> list[W]:
        """Take rows out in fair order until they have so many tokens: one at least, if any waits."""
        drawn: list[W] = []
        total = 0
        while self._turns and (total < tokens or not drawn):
            customer, credit = next(iter(self._turns.items()))
            row = next(iter(self._waiting[customer].values()))
            if row.length > credit:
                # Its turn ends, and it goes behind the others with what it has for the next one.
                self._turns[customer] = credit + self._quantum
                self._turns.move_to_end(customer)
                continue
            if drawn and total + row.length > tokens:
                break
            self._turns[customer] = credit - row.length
            self._take(customer, id(row))
            drawn.append(row)
            total += row.length
        return drawn

    def _take(self, customer: str | None, key: int) -> None:
        queue = self._waiting[customer]
        row = queue.pop(key)
        self.rows -= 1
        self.tokens -= row.length
        if not queue:
            del self._waiting[customer], self._turns[customer]
