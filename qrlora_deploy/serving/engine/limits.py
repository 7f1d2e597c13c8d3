"""Bounds of an engine: what may wait, and how large a run may be."""

from dataclasses import dataclass, fields

from qrlora_deploy.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine.

    Attributes:
        max_queue_rows: rows of all requests from their arrival to their answer.
        max_queue_tokens: their tokens; before a text is tokenised the most that it can have.
        max_queue_bytes: their texts, in bytes.
        max_queue_s: what is ahead of a request may take so long, at the speed that is measured; if it takes longer,
            and longer than two requests of the usual size, the request is refused. 0: two requests are the bound.
            None: there is none. Texts that are written are bounded by rows and tokens alone.
        customer_share: of the queue's rows and tokens, the most that one customer may have, above 0 to 1. The base
            counts as a customer. 1: one customer may fill the queue.
        max_batch_tokens: rows x padded length of a run at most. A row that is longer runs alone.
        max_padding_tokens: rows whose padding adds up to more run in another batch. None: the tokens that take as long
            as what a run costs beside its tokens, as measured: a few on a CPU, many hundreds on a GPU.
        max_wait_s: a batch that is not full waits so long for more rows. 0: an engine that is free starts at once.
        window_s: what is sorted by length together takes about so long to run; a row that comes meanwhile waits
            for the end of it.

    Raises:
        InputError: a bound is not positive, or the share is above 1.
    """

    max_queue_rows: int = 4096
    max_queue_tokens: int = 2**20
    max_queue_bytes: int = 2**26
    max_queue_s: float | None = 2.0
    customer_share: float = 0.5
    max_batch_tokens: int = 16384
    max_padding_tokens: int | None = None
    max_wait_s: float = 0.0
    window_s: float = 0.1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least_is_zero = field.name in ("max_wait_s", "max_padding_tokens", "max_queue_s")
            if value is not None and not (value >= 0 if least_is_zero else value > 0):
                bound = "at least 0" if least_is_zero else "positive"
                raise InputError(f"the limit {field.name} must be {bound}, not {value}")
        if self.customer_share > 1:
            raise InputError(f"the limit customer_share must be at most 1, not {self.customer_share}")
