"""Which requests are let in: room for them is reserved when they come and given back when they end."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qrlora_deploy.errors import MalformedInputError
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.refusals import OverloadedError, TooLargeError

NOTHING = Load(0, 0, 0)


@dataclass(eq=False)
class Place:
    """A request's reserved place.

    Attributes:
        load: what is reserved now.
        customers: rows by customer.
        deadline_s: a time of `time.monotonic`, or None.
        used: it was given to `submit`.
        released: nothing is reserved any more.
    """

    load: Load
    customers: Mapping[str | None, int]
    deadline_s: float | None = None
    used: bool = False
    released: bool = False

    def parts(self) -> dict[str | None, Load]:
        """What each customer has of it; tokens in proportion to rows, rounded up."""
        return {
            customer: Load(rows, -(-self.load.tokens * rows // self.load.rows), 0)
            for customer, rows in self.customers.items()
        }


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
        self.held = NOTHING
        self.by_customer: dict[str | None, Load] = {}
        self._pace = pace
        self._whole = Load(limits.max_queue_rows, limits.max_queue_tokens, limits.max_queue_bytes)
        self._share = Load(
            max(1, int(limits.customer_share * limits.max_queue_rows)),
            max(1, int(limits.customer_share * limits.max_queue_tokens)),
            limits.max_queue_bytes,
        )

    def reserve(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Place:
        """Reserve room for a request.

        Raises:
            MalformedInputError: it has no rows, or another number of customers.
            TooLargeError: it would not fit an empty queue.
            OverloadedError: it does not fit now.
        """
        if not 0 < load.rows == len(customers):
            raise MalformedInputError(f"a request needs rows and a customer for each, not {len(customers)} of {load}")
        place = Place(load, Counter(customers), deadline_s)
        self._check_size(place)
        self._check_room(place)
        self._add(place, 1)
        return place

    def correct(self, place: Place, load: Load) -> None:
        """A request that was let in has another size than was reserved for it."""
        self._add(place, -1)
        place.load = load
        self._add(place, 1)

    def release(self, place: Place) -> None:
        """Give back what is reserved. Twice is no error."""
        if not place.released:
            place.released = True
            self._add(place, -1)

    def _check_size(self, place: Place) -> None:
        if over := _over(place.load, self._whole):
            raise TooLargeError(f"the request has {over} a queue takes; send it in parts")
        for part in place.parts().values():
            if over := _over(part, self._share):
                raise TooLargeError(f"the request has {over} one customer may have in the queue; send it in parts")

    def _check_room(self, place: Place) -> None:
        if _over(_sum(self.held, place.load), self._whole):
            wait_s = self._wait_s(place.load, self.held, self._whole)
            raise OverloadedError("the queue is full; try again later", wait_s)
        for customer, part in place.parts().items():
            held = self.by_customer.get(customer, NOTHING)
            if _over(_sum(held, part), self._share):
                # The others are answered in turn with this one.
                wait_s = self._wait_s(part, held, self._share) * len(self.by_customer)
                raise OverloadedError("the customer's share of the queue is full; try again later", wait_s)

    def _wait_s(self, load: Load, held: Load, bound: Load) -> float:
        """When as much as is over the bound will have been answered."""
        total = _sum(held, load)
        # Bytes are given back with the rows that they belong to.
        by_bytes = max(0, total.size_bytes - bound.size_bytes) / max(1, held.size_bytes)
        rows = max(total.rows - bound.rows, by_bytes * held.rows)
        tokens = max(total.tokens - bound.tokens, by_bytes * held.tokens)
        return self._pace.wait_s(rows, tokens)

    def _add(self, place: Place, sign: int) -> None:
        self.held = _sum(self.held, place.load, sign)
        for customer, part in place.parts().items():
            left = _sum(self.by_customer.get(customer, NOTHING), part, sign)
            if left.rows:
                self.by_customer[customer] = left
            else:
                self.by_customer.pop(customer, None)


def _sum(one: Load, other: Load, sign: int = 1) -> Load:
    return Load(
        one.rows + sign * other.rows, one.tokens + sign * other.tokens, one.size_bytes + sign * other.size_bytes
    )


def _over(load: Load, bound: Load) -> str:
    """What is over its bound, in words; empty where nothing is."""
    if load.rows > bound.rows:
        return f"{load.rows} rows, more than the {bound.rows} that"
    if load.tokens > bound.tokens:
        return f"up to {load.tokens} tokens, more than the {bound.tokens} that"
    if load.size_bytes > bound.size_bytes:
        return f"{load.size_bytes} bytes of text, more than the {bound.size_bytes} that"
    return ""
