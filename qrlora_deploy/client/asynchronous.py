"""The client for programs with an event loop."""

import ssl
from collections.abc import Mapping, Sequence
from types import TracebackType

import anyio
import httpx

from qrlora_deploy.client.answers import Answer, Inference, read_answers, read_inference
from qrlora_deploy.client.calls import HEADER_LENGTH, Call, classify_call, error_of, infer_call, timed, transport_error
from qrlora_deploy.client.retrying import Retries, Tries
from qrlora_deploy.client.settings import Settings
from qrlora_deploy.client.tensors import Input


class AsyncClient:
    """As `Client`, for asyncio and trio.

    Args:
        url: of the server, such as `https://host:8080`.
        key: sent with each request.
        deadline_s: seconds that a request with all its tries may take; None: no bound.
        retries: how often it is tried again.
        verify: the server's certificate, as httpx takes it; an `ssl.SSLContext` may hold the client's own.
        http: an httpx client of the caller's, in place of one of its own; it is not closed.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        deadline_s: float | None = 30.0,
        retries: Retries | None = None,
        verify: ssl.SSLContext | bool = True,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._settings = Settings(url, key, deadline_s, retries or Retries())
        self._own = http is None
        self._http = httpx.AsyncClient(verify=verify) if http is None else http

    def __repr__(self) -> str:
        return f"AsyncClient({self._settings.url!r})"

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def classify(
        self,
        texts: Sequence[str],
        customer: str | None = None,
        *,
        customers: Sequence[str | None] | None = None,
        pairs: Sequence[str] | None = None,
        model: str | None = None,
        deadline_s: float | None = None,
    ) -> list[Answer]:
        """As `Client.classify`.

        Raises:
            ServerError: the subclass says why there is no answer.
            MalformedInputError: what is asked cannot be sent.
        """
        body, _ = await self._ask(classify_call(texts, customer, customers, pairs, model), deadline_s)
        return read_answers(body, len(texts))

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Input],
        customer: str | None = None,
        *,
        outputs: Sequence[str] | None = None,
        binary: bool = True,
        request_id: str = "",
        deadline_s: float | None = None,
    ) -> Inference:
        """As `Client.infer`.

        Raises:
            ServerError: the subclass says why there is no answer.
            MalformedInputError: an input cannot be sent.
        """
        body, headers = await self._ask(infer_call(model, inputs, customer, outputs, binary, request_id), deadline_s)
        return read_inference(body, headers.get(HEADER_LENGTH))

    async def ready(self) -> bool:
        """Whether the server takes requests; also False where nobody listens."""
        url = f"{self._settings.url}/v2/health/ready"
        try:
            return (await self._http.get(url, timeout=self._settings.health_s)).is_success
        except httpx.RequestError:
            return False

    async def _ask(self, call: Call, deadline_s: float | None) -> tuple[bytes, httpx.Headers]:
        tries = self._settings.tries(deadline_s)
        while True:
            try:
                reply = await self._try(call, tries)
                error = error_of(reply, reply.content)
            except httpx.RequestError as broken:
                error = transport_error(broken, self._settings.url)
            if error is None:
                return reply.content, reply.headers
            await anyio.sleep(tries.wait_s(error))

    async def _try(self, call: Call, tries: Tries) -> httpx.Response:
        left_s = tries.left_s()
        headers, timeout = timed(call, left_s)
        headers |= self._settings.headers
        url = self._settings.url + call.path
        # The time-outs of httpx are for each wait, and an answer may come drop by drop.
        with anyio.move_on_after(left_s):
            return await self._http.post(url, content=call.body, headers=headers, timeout=timeout)
        raise tries.too_late()
