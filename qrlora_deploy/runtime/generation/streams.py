"""The events of one request, for whoever reads them."""

from collections.abc import Callable, Iterator

from qrlora_deploy.runtime.generation.engine import Running
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent


class AnswerStream:
    """The events of one request. Reading it does the work, for all requests of its session."""

    def __init__(self, running: Running, advance: Callable[[Running], None]) -> None:
        self._running, self._advance = running, advance
        self._answer: GenerationAnswer | None = None

    @property
    def ended(self) -> bool:
        """Whether the last event was taken."""
        return self._answer is not None

    def __iter__(self) -> Iterator[GenerationEvent]:
        return self

    def __next__(self) -> GenerationEvent:
        if self.ended:
            raise StopIteration
        while not self._running.events:
            self._advance(self._running)
        event = self._running.events.popleft()
        self._answer = event.answer
        return event

    def wait(self) -> None:
        """Go on until there is an event, or one step."""
        if not self._running.events:
            self._advance(self._running)

    def ready(self) -> Iterator[GenerationEvent]:
        """The events that have happened; does no work."""
        while self._running.events and not self.ended:
            yield next(self)

    def cancel(self) -> None:
        """End the answer as it is, by the next step."""
        self._running.cancelled = True

    def result(self) -> GenerationAnswer:
        """The whole answer, once its events are all taken; those that are left are passed over.

        Raises:
            QrloraError: it failed.
        """
        for _ in self:
            pass
        assert self._answer is not None
        if self._answer.error is not None:
            raise self._answer.error
        return self._answer
