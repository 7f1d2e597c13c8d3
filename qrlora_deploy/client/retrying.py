"""When to try again: not before the server asks for it, not in step with others, and not beyond the deadline."""

import random
import time
from dataclasses import dataclass

from qrlora_deploy.client.errors import DeadlineError, ServerError


@dataclass(frozen=True)
class Retries:
    """How often, and how far apart, a request is tried again that the server refused for load, or that broke off.

    Asking changes nothing at the server, so each request may be tried again.

    Attributes:
        times: tries after the first one; 0: none.
        first_s: the wait before the first of them is a random time up to this, doubled with each try.
        most_s: bound of that random time. What the server asks for in Retry-After comes on top.
    """

    times: int = 4
    first_s: float = 0.1
    most_s: float = 5.0

    def wait_s(self, tried: int, error: ServerError) -> float | None:
        """Seconds until the next try.

        Args:
            tried: tries so far.
            error: of the last one.

        Returns:
            None where there is no use in another try.
        """
        if tried > self.times or not error.again:
            return None
        bound = min(self.most_s, self.first_s * 2.0 ** min(tried - 1, 60))
        return (error.retry_after_s or 0.0) + random.uniform(0.0, bound)


class Tries:
    """The tries of one request.

    Args:
        retries: how often.
        deadline_s: seconds from now that all tries and waits may take together; None: no bound.
    """

    def __init__(self, retries: Retries, deadline_s: float | None) -> None:
        self._retries, self._tried = retries, 0
        self._end = None if deadline_s is None else time.monotonic() + deadline_s
        self._deadline_s = deadline_s

    def left_s(self) -> float | None:
        """Seconds that are left; None: no bound.

        Raises:
            DeadlineError: none are.
        """
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.too_late()
        return left

    def too_late(self) -> DeadlineError:
        """The error of a request whose time has passed."""
        return DeadlineError(f"no answer within {self._deadline_s:g} s; give more by deadline_s")

    def wait_s(self, error: ServerError) -> float:
        """Seconds to wait after an error.

        Raises:
            ServerError: `error` itself, where there is no other try, or it would come too late.
        """
        self._tried += 1
        wait = self._retries.wait_s(self._tried, error)
        if wait is None or (self._end is not None and time.monotonic() + wait >= self._end):
            raise error
        return wait
