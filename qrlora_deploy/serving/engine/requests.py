"""A request on its way through an engine, and its rows in the queue."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.engine.admission import Place
from qrlora_deploy.serving.engine.promise import Promise
from qrlora_deploy.serving.engine.rows import Row, RowAnswer


@dataclass(eq=False, slots=True)
class Request:
    """Rows that are answered together.

    Attributes:
        place: what is reserved for it.
        rows: what is to be answered.
        queued_s: a time of `time.monotonic`.
        future: gets the answers, or the first error.
        answers: of the rows, in their order, as far as they are there.
        left: rows without an answer.
        waiting: the rows as they stand in the queue.
        ended: the future has what it will get, or was cancelled: nothing of it is run any more.
    """

    place: Place
    rows: Sequence[Row]
    queued_s: float
    future: Promise[list[RowAnswer]] = field(default_factory=Promise)
    answers: list[RowAnswer | None] = field(default_factory=list)
    left: int = 0
    ended: bool = False
    waiting: "list[WaitingRow]" = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = len(self.rows)
        self.answers = [None] * self.left

    def wait(self) -> None:
        """Make its rows ready for the queue, once they are known to be rows."""
        self.waiting = [WaitingRow(self, number, row.customer, row.length) for number, row in enumerate(self.rows)]

    def tell(self, error: QrloraError | None) -> None:
        """Give the future its answers, or the error; nothing where it was cancelled. Called once."""
        if not self.future.set_running_or_notify_cancel():
            return
        if error is None:
            self.future.set_result([answer for answer in self.answers if answer is not None])
        else:
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class WaitingRow:
    """A row in the queue.

    Attributes:
        request: the one that it belongs to.
        number: among the rows of that.
        customer: whose it is.
        length: tokens.
    """

    request: Request
    number: int
    customer: str | None
    length: int

    @property
    def row(self) -> Row:
        """What is to be answered."""
        return self.request.rows[self.number]
