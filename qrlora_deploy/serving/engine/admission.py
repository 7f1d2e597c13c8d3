"""Which requests are let in: room for them is reserved when they come and given back when they end."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qrlora_deploy.errors import InputError, MalformedInputError
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.pace import SHORTEST_S, Pace
from qrlora_deploy.serving.engine.protocol import Ticket
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.refusals import OverloadedError, TooLargeError

PATIENCE = 2.0
"""A request is let in as long as what is ahead of it takes no more than so many times what one takes by itself."""

FULL = "the queue is full; try again later"


@dataclass(eq=False, slots=True)
class Place:
    """A request's reserved place.

    Attributes:
        load: what is reserved now.
        customers: rows by customer.
        deadline_s: a time of `time.monotonic`, or None.
        parts: rows and tokens of each customer; tokens in proportion to rows, rounded up.
        used: it was given to `submit`.
        released: nothing is reserved any more.
    """

    load: Load
    customers: Mapping[str | None, int]
    deadline_s: float | None = None
    parts: "list[tuple[str | None, int, int]]" = field(default_factory=list)
    used: bool = False
    released: bool = False

    @property
    def pending(self) -> None:
        """As of `Ticket`: the place is reserved."""
        return None

    def __post_init__(self) -> None:
        self.resize(self.load)

    def resize(self, load: Load) -> None:
        """It is of another size now."""
        self.load = load
        if len(self.customers) == 1:
            self.parts = [(customer, load.rows, load.tokens) for customer in self.customers]
            return
        self.parts = [
            (customer, rows, -(-load.tokens * rows // max(1, load.rows))) for customer, rows in self.customers.items()
        ]


@dataclass(slots=True)
class Held:
    """Rows, tokens and bytes that are reserved."""

    rows: int = 0
    tokens: int = 0
    size_bytes: int = 0

    def add(self, rows: int, tokens: int, size_bytes: int = 0) -> None:
        """As many more."""
        self.rows += rows
        self.tokens += tokens
        self.size_bytes += size_bytes


class Admission:
    """What is reserved, of all and by customer. For one thread at a time.

    Args:
        limits: the bounds.
        pace: what the engine measures of itself; it says when those that are refused may come again.

    Attributes:
        held: what all requests have reserved.
        by_customer: what each customer has; those with nothing are not in it.
    """

    def __init__(self, limits: Limits, pace: Pace) -> None:
        self.held = Held()
        self.by_customer: dict[str | None, Held] = {}
        self._pace, self._most_s, self._batch_tokens = pace, limits.max_queue_s, limits.max_batch_tokens
        self._whole = Held(limits.max_queue_rows, limits.max_queue_tokens, limits.max_queue_bytes)
        self._share = Held(
            max(1, int(limits.customer_share * limits.max_queue_rows)),
            max(1, int(limits.customer_share * limits.max_queue_tokens)),
        )

    def check_room(self) -> None:
        """Refuse where there is no room for anything, before it is known what is asked.

        Raises:
            OverloadedError: what is here takes too long, or the queue is full.
        """
        held, whole = self.held, self._whole
        self._check_time()
        if held.rows >= whole.rows or held.tokens >= whole.tokens or held.size_bytes >= whole.size_bytes:
            raise OverloadedError(FULL, self._wait_s(1, 1, held, whole))

    def reserve(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Place:
        """Reserve room for a request.

        Raises:
            MalformedInputError: it has no rows, or another number of customers.
            TooLargeError: it would not fit an empty queue.
            OverloadedError: it does not fit now.
        """
        if not 0 < load.rows == len(customers):
            raise MalformedInputError(f"a request needs rows and a customer for each, not {len(customers)} of {load}")
        place = Place(load, rows_by_customer(customers), deadline_s)
        self._check_size(place)
        self._check_room(place)
        self._add(place, 1)
        return place

    def correct(self, place: Place, load: Load) -> None:
        """A request that was let in has another size than was reserved for it."""
        self._add(place, -1)
        place.resize(load)
        self._add(place, 1)

    def has_tokens(self, place: Place, tokens: int) -> None:
        """A request that was let in has so many tokens, which is known once it was tokenised."""
        self._pace.asked(tokens)
        load = place.load
        corrected = Load(load.rows, tokens, load.size_bytes, load.asker)
        if len(place.parts) > 1:
            self.correct(place, corrected)
            return
        self.held.tokens += tokens - load.tokens
        self.by_customer[place.parts[0][0]].tokens += tokens - load.tokens
        place.resize(corrected)

    def release(self, place: Place) -> None:
        """Give back what is reserved. Twice is no error."""
        if not place.released:
            place.released = True
            self._add(place, -1)

    def _check_size(self, place: Place) -> None:
        whole, share, load = self._whole, self._share, place.load
        if load.size_bytes > whole.size_bytes:
            raise TooLargeError(
                f"the request has {load.size_bytes} bytes of text, the queue room for {whole.size_bytes}"
            )
        if over := _over(load.rows, load.tokens, whole):
            raise TooLargeError(f"the request has {over} a queue takes; send it in parts")
        for _, rows, tokens in place.parts:
            if over := _over(rows, tokens, share):
                raise TooLargeError(f"the request has {over} one customer may have in the queue; send it in parts")

    def _check_room(self, place: Place) -> None:
        load, held = place.load, self.held
        self._check_time()
        room_bytes = self._whole.size_bytes - held.size_bytes
        if load.size_bytes > room_bytes or _over(held.rows + load.rows, held.tokens + load.tokens, self._whole):
            # Bytes are given back with the rows that they belong to.
            part = max(0, load.size_bytes - room_bytes) / max(1, held.size_bytes)
            wait_s = max(
                self._wait_s(load.rows, load.tokens, held, self._whole), self._pace.wait_s(part * held.rows, 0)
            )
            raise OverloadedError(FULL, wait_s)
        for customer, rows, tokens in place.parts:
            held = self.by_customer.get(customer, NOTHING)
            if _over(held.rows + rows, held.tokens + tokens, self._share):
                # The others are answered in turn with this one.
                wait_s = self._wait_s(rows, tokens, held, self._share) * len(self.by_customer)
                raise OverloadedError("the customer's share of the queue is full; try again later", wait_s)

    def _check_time(self) -> None:
        """What is ahead of a request may take so long, and where that is less twice what a request takes."""
        if self._most_s is None or not self.held.rows:
            return
        ahead_s = self._pace.ahead_s(self.held.tokens, self._batch_tokens)
        if ahead_s <= self._most_s:
            return
        over_s = ahead_s - max(self._most_s, PATIENCE * self._pace.request_s())
        if over_s > 0:
            raise OverloadedError("the queue is as long as it may take; try again later", max(SHORTEST_S, over_s))

    def _wait_s(self, rows: int, tokens: int, held: Held, bound: Held) -> float:
        """When as much as is over the bound will have been answered."""
        return self._pace.wait_s(held.rows + rows - bound.rows, held.tokens + tokens - bound.tokens)

    def _add(self, place: Place, sign: int) -> None:
        load = place.load
        self.held.add(sign * load.rows, sign * load.tokens, sign * load.size_bytes)
        for customer, rows, tokens in place.parts:
            held = self.by_customer.get(customer)
            if held is None:
                held = self.by_customer[customer] = Held()
            held.add(sign * rows, sign * tokens)
            if not held.rows:
                del self.by_customer[customer]


NOTHING = Held()


def place_of(ticket: Ticket) -> Place:
    """The place that a ticket is.

    Raises:
        InputError: it is none.
    """
    if not isinstance(ticket, Place):
        raise InputError(f"a ticket comes from admit; {type(ticket).__name__} is none")
    return ticket


def rows_by_customer(customers: Iterable[str | None]) -> dict[str | None, int]:
    """How often each customer occurs. For a few customers it takes a tenth of the time of a `Counter`."""
    rows: dict[str | None, int] = {}
    for customer in customers:
        rows[customer] = rows.get(customer, 0) + 1
    return rows


def _over(rows: int, tokens: int, bound: Held) -> str:
    """What is over its bound, in words; empty where nothing is."""
    if rows > bound.rows:
        return f"{rows} rows, more than the {bound.rows} that"
    if tokens > bound.tokens:
        return f"up to {tokens} tokens, more than the {bound.tokens} that"
    return ""
