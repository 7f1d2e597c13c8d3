"""What happens to the customers of a store, and telling it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qrlora_deploy.errors import InputError, QrloraError, shortened
from qrlora_deploy.runtime.table.table import TableFullError

_log = logging.getLogger("qrlora_deploy.runtime.customers.store")


@dataclass(frozen=True)
class StoreEvent:
    """What happened to a customer.

    Attributes:
        kind: "loaded": a version went live; "refused": its file is no customer of this bundle, and
            what was loaded before goes on; "removed": its file was deleted; "failed": something
            else went wrong and is tried again.
        customer: the id; empty where it is about the folder.
        message: one line.
        digest: `Coefficients.digest` of what was loaded; else empty.
    """

    kind: Literal["loaded", "refused", "removed", "failed"]
    customer: str
    message: str
    digest: str = ""


Report = Callable[[StoreEvent], None]


def is_refusal(error: Exception) -> bool:
    """Whether the file is at fault, so that there is no use in trying again before it changes."""
    return isinstance(error, InputError) and not isinstance(error, TableFullError)


def event_of(customer: str, error: Exception) -> StoreEvent:
    """The event that an error is."""
    kind = type(error).__name__
    message = str(error) if isinstance(error, QrloraError) else shortened(f"{kind}: {error}")
    return StoreEvent("refused" if is_refusal(error) else "failed", customer, message or kind)


def tell(report: Report | None, event: StoreEvent | None) -> None:
    """Call `report`, or log the event where there is none; nothing where there is no event."""
    if event is None:
        return
    try:
        if report is not None:
            report(event)
        else:
            level = logging.INFO if event.kind in ("loaded", "removed") else logging.WARNING
            _log.log(level, "%s %s: %s", event.kind, event.customer, event.message)
    except Exception:
        # Neither a request nor the watcher may end because somebody cannot be told.
        _log.exception("the report of %r failed", event)
