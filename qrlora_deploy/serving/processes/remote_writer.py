"""The front's side of a text engine in another process."""

import asyncio
from collections.abc import Sequence

from qrlora_deploy.errors import InputError
from qrlora_deploy.io.reading import parse_json, read_text
from qrlora_deploy.runtime.bundle.bundle import CONFIG_FILE, Bundle
from qrlora_deploy.runtime.generation.prompts import MAX_CONFIG_BYTES, PromptReader
from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.serving.engine.protocol import Ticket
from qrlora_deploy.serving.generation.counting import WriterStats
from qrlora_deploy.serving.generation.writing import Tell
from qrlora_deploy.serving.processes.engine_link import FAILED, SILENT, EngineLink, RemoteWriting
from qrlora_deploy.serving.processes.messages import Kind
from qrlora_deploy.serving.processes.remote_engine import RemoteEngine, asked_of
from qrlora_deploy.serving.refusals import DrainingError

CHECK_S = 30.0
"""For an engine to say whether a customer is there, who may have to be read first."""


class BundlePrompts:
    """Prompts of a bundle whose graph is open elsewhere.

    Raises:
        FileFormatError: a file of the bundle cannot be read.
    """

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.folder / CONFIG_FILE
        config = parse_json(read_text(path, MAX_CONFIG_BYTES), f"{path} is not JSON")
        self.longest = bundle.manifest.max_length
        self._reader = PromptReader(bundle.folder, self.longest, int(config["vocab_size"]))

    @property
    def takes_chats(self) -> bool:
        """As `GenerationSession.takes_chats`."""
        return self._reader.template is not None

    def read(self, request: GenerationRequest) -> list[int]:
        """As `GenerationSession.read`."""
        return self._reader.read(request)

    def text_of(self, token: int) -> str:
        """As `GenerationSession.text_of`."""
        return self._reader.text_of(token)


class RemoteWriter(RemoteEngine):
    """A `TextWriter` in other processes, one for each device, as `RemoteEngine`.

    Args:
        links: to the processes.
        model: name of the model there.
        bundle: its bundle.
    """

    def __init__(self, links: Sequence[EngineLink], model: str, bundle: Bundle) -> None:
        super().__init__(links, model, bundle.manifest)
        self.prompts = BundlePrompts(bundle)

    def check_customer(self, customer: str | None) -> None:
        """As `TextWriter.check_customer`.

        Raises:
            UnknownCustomerError: there is none.
            DrainingError: the engine does not answer.
        """
        if customer is None:
            return
        link = self._link(customer)
        asked = asyncio.run_coroutine_threadsafe(link.check(self._model, customer), link.loop)
        try:
            asked.result(CHECK_S)
        except TimeoutError as error:
            asked.cancel()
            raise DrainingError(SILENT) from error

    def release(self, ticket: Ticket) -> None:
        """As `TextWriter.release`."""
        if asked_of(ticket).writing is None:
            super().release(ticket)

    def write(
        self, ticket: Ticket, requests: Sequence[GenerationRequest], tell: Tell, every: bool = True
    ) -> RemoteWriting:
        """As `TextWriter.write`; in the links' event loop.

        Raises:
            InputError: the ticket was used before.
            DrainingError: the engine has ended meanwhile.
        """
        asked = asked_of(ticket)
        if asked.writing is not None:
            raise InputError("a ticket is given to write once, and not after release")
        if asked.number not in asked.link.open:
            raise DrainingError(FAILED)
        asked.writing = RemoteWriting(asked, requests, tell, self.manifest.base_digest)
        asked.link.write(asked, requests, every)
        return asked.writing

    def cancel(self, writing: RemoteWriting) -> None:
        """As `TextWriter.cancel`."""
        writing.ticket.link.drop(writing.ticket, Kind.CANCEL)

    def written(self) -> WriterStats:
        """Nothing: the supervisor adds up what engines tell."""
        return WriterStats()
