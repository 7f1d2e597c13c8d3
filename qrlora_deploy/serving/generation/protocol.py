"""What writes text for a front, in its own process or in another one."""

from collections.abc import Sequence
from typing import Any, Protocol

from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.serving.engine.protocol import Ticket
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.generation.counting import WriterStats
from qrlora_deploy.serving.generation.writing import Tell


class Prompts(Protocol):
    """Prompts and tokens of a bundle, as `GenerationSession` has them.

    Attributes:
        longest: tokens of a prompt with its answer.
    """

    longest: int

    @property
    def takes_chats(self) -> bool:
        """Whether messages can be a prompt."""

    def read(self, request: GenerationRequest) -> list[int]:
        """The ids of a request's prompt."""

    def text_of(self, token: int) -> str:
        """What is shown of a token."""


class TextWriter(Protocol):
    """Writes answers; as `TextEngine`, whose methods say what is refused."""

    @property
    def prompts(self) -> Prompts:
        """Of its bundle."""

    def check_customer(self, customer: str | None) -> None:
        """Make sure that a customer is there; in a thread, since it may wait for a file."""

    def admit(self, load: Load, customers: Sequence[str | None], deadline_s: float | None = None) -> Ticket:
        """Reserve a place."""

    def release(self, ticket: Ticket) -> None:
        """Give it up, unless it was given to `write`."""

    def write(self, ticket: Ticket, requests: Sequence[GenerationRequest], tell: Tell, every: bool = True) -> Any:
        """Queue requests, whose prompts are ids of tokens; returns what `cancel` takes."""

    def cancel(self, writing: Any) -> None:
        """Nobody wants these answers any more."""

    def written(self) -> WriterStats:
        """Counters."""
