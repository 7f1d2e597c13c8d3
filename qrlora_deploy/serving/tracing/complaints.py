"""What OpenTelemetry's SDK complains of, in a line of our log a minute: without a collector it does so all the time."""

import logging
import threading
import time
from collections.abc import Callable

from qrlora_deploy.errors import shortened

PAUSE_S = 60.0
"""Between two lines."""

NAME = "opentelemetry"
"""The SDK's and its exporters' loggers are below this one."""

logger = logging.getLogger(__name__)


class Complaints(logging.Handler):
    """Tells the first complaint at once, and then one every `PAUSE_S` at most, with how many were left out.

    Args:
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.WARNING)
        self._clock, self._guard = clock, threading.Lock()
        self._told_s, self._left_out = -PAUSE_S, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a line, or count it."""
        with self._guard:
            now = self._clock()
            if now - self._told_s < PAUSE_S:
                self._left_out += 1
                return
            left_out, self._told_s, self._left_out = self._left_out, now, 0
        more = f" ({left_out} more such lines were left out)" if left_out else ""
        logger.warning("spans may be lost: %s%s", shortened(record.getMessage()), more)


def tell_complaints() -> None:
    """Have what the SDK logs told by `Complaints`, and by nobody else."""
    sdk = logging.getLogger(NAME)
    sdk.propagate = False
    if not any(isinstance(handler, Complaints) for handler in sdk.handlers):
        sdk.addHandler(Complaints())
