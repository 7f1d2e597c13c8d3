"""Answers on their way through a text engine."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime.generation.requests import GenerationAnswer, GenerationEvent, GenerationRequest
from qrlora_deploy.runtime.generation.streams import AnswerStream
from qrlora_deploy.serving.engine.admission import Place

Tell = Callable[[GenerationEvent], None]
"""Is called in the engine's thread; must not take long."""


@dataclass(eq=False)
class Writing:
    """The answers of one request over the network, which share a place.

    Attributes:
        place: what is reserved for them.
        tell: gets their events.
        every: whether it gets all of them, not the last one of each answer alone.
        left: answers that have not ended.
        cancelled: nobody wants them any more.
        answers: them.
    """

    place: Place
    tell: Tell
    every: bool
    left: int = 0
    cancelled: bool = False
    answers: "list[Asked]" = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Asked:
    """One answer that is wanted.

    Attributes:
        writing: the ones that it belongs to.
        number: among these.
        request: what is asked; its prompt is ids of tokens.
        length: tokens that prompt and answer may come to.
        queued_s: a time of the engine's clock.
        stream: its events, once it has a place in the running batch.
        begun: it has its first token.
        ended: its last event was told.
    """

    writing: Writing
    number: int
    request: GenerationRequest
    length: int
    queued_s: float
    stream: AnswerStream | None = None
    begun: bool = False
    ended: bool = False

    @property
    def customer(self) -> str | None:
        """Whose it is."""
        return self.request.customer

    def tell(self, event: GenerationEvent) -> None:
        """Tell an event. Whoever asked may be gone, with its event loop; the others are told all the same."""
        with suppress(Exception):
            self.writing.tell(event)

    def failed(self, error: QrloraError, base_digest: str) -> GenerationEvent:
        """Its last event, where it was refused."""
        answer = GenerationAnswer("", (), "error", self.customer, base_digest, error=error)
        return GenerationEvent(self.number, answer=answer)
