"""Whether a request is let in: not at the end, not too late, and not beyond the room of the queue and the quotas."""

from collections import Counter
from collections.abc import Callable, Sequence

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.serving.engine.admission import Admission, Place
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.pace import Pace
from qrlora_deploy.serving.engine.quotas import Quotas
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError


class Gate:
    """What every engine asks before it takes a request. For one thread at a time.

    Args:
        limits: the bounds.
        quotas: rows a second by customer.
        pace: what the engine measures of itself.
        clock: seconds, as `time.monotonic`.

    Attributes:
        admission: what is reserved.
        draining: nobody new is let in.
        rejected: refusals by the error's kind.
    """

    def __init__(self, limits: Limits, quotas: Quotas, pace: Pace, clock: Callable[[], float]) -> None:
        self.admission = Admission(limits, pace)
        self.draining = False
        self.rejected: Counter[str] = Counter()
        self._quotas, self._clock = quotas, clock

    def check_room(self) -> None:
        """As `Engine.check_room`; a refusal is counted."""
        try:
            self.admission.check_room()
        except QrloraError as error:
            self.rejected[error.kind] += 1
            raise

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None) -> Place:
        """As `Engine.admit`; a refusal is counted."""
        try:
            if self.draining:
                raise DrainingError("the server is ending and takes no new request")
            if deadline_s is not None and self._clock() >= deadline_s:
                raise DeadlineError("the deadline passed before the request came")
            return self._reserve(load, customers, deadline_s)
        except QrloraError as error:
            self.rejected[error.kind] += 1
            raise

    def _reserve(self, load: Load, customers: Sequence[str | None], deadline_s: float | None) -> Place:
        place = self.admission.reserve(load, customers, deadline_s)
        try:
            self._quotas.take(place.customers)
        except QrloraError:
            self.admission.release(place)
            raise
        return place
