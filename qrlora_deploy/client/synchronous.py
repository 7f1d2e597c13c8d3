"""The client for programs that wait."""

import ssl
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import httpx

from qrlora_deploy.client.answers import Answer, Inference, read_answers, read_inference
from qrlora_deploy.client.calls import HEADER_LENGTH, Call, classify_call, error_of, infer_call, timed, transport_error
from qrlora_deploy.client.retrying import Retries, Tries
from qrlora_deploy.client.settings import Settings
from qrlora_deploy.client.tensors import Input


class Client:
    """Asks a server. Safe for many threads, which share its connections; close it, or use it in a `with`.

    A request that is refused for load (429), finds the server beginning or ending (503), or breaks off, is tried again
    after a random wait, never before the server asks for it, and never beyond its deadline.

    Args:
        url: of the server, such as `https://host:8080`.
        key: sent with each request.
        deadline_s: seconds that a request with all its tries may take; None: no bound.
        retries: how often it is tried again.
        verify: the server's certificate, as httpx takes it; an `ssl.SSLContext` may hold the client's own.
        http: an httpx client of the caller's, in place of one of its own; it is not closed.

    It is closed by `with`: `with Client("http://localhost:8080", key=key) as client:` and then, for one,
    `client.classify(["my card was stolen"], customer="acme")[0].label`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        deadline_s: float | None = 30.0,
        retries: Retries | None = None,
        verify: ssl.SSLContext | bool = True,
        http: httpx.Client | None = None,
    ) -> None:
        self._settings = Settings(url, key, deadline_s, retries or Retries())
        self._own = http is None
        self._http = httpx.Client(verify=verify) if http is None else http

    def __repr__(self) -> str:
        return f"Client({self._settings.url!r})"

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def classify(
        self,
        texts: Sequence[str],
        customer: str | None = None,
        *,
        customers: Sequence[str | None] | None = None,
        pairs: Sequence[str] | None = None,
        model: str | None = None,
        deadline_s: float | None = None,
    ) -> list[Answer]:
        """Answer texts.

        Args:
            texts: the texts.
            customer: whose all of them are; None: the base answers.
            customers: instead of it, one for each text.
            pairs: the second texts, for a task on pairs.
            model: None: the server's first one.
            deadline_s: for this request, in place of the client's.

        Returns:
            One for each text.

        Raises:
            ServerError: the subclass says why there is no answer.
            MalformedInputError: what is asked cannot be sent.
        """
        body, _ = self._ask(classify_call(texts, customer, customers, pairs, model), deadline_s)
        return read_answers(body, len(texts))

    def infer(
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
        """Ask by the Open Inference Protocol v2.

        Args:
            model: its name.
            inputs: by name: `text` `[n]` (and `text_pair`), or `input_ids`, `attention_mask` `[n, length]`; `customer`
                `[n]` names one for each row.
            customer: whose all rows are.
            outputs: names; None: all.
            binary: tensors go as bytes, which is faster; otherwise as JSON.
            request_id: comes back in the answer.
            deadline_s: for this request, in place of the client's.

        Raises:
            ServerError: the subclass says why there is no answer.
            MalformedInputError: an input cannot be sent.
        """
        body, headers = self._ask(infer_call(model, inputs, customer, outputs, binary, request_id), deadline_s)
        return read_inference(body, headers.get(HEADER_LENGTH))

    def ready(self) -> bool:
        """Whether the server takes requests; also False where nobody listens."""
        try:
            return self._http.get(f"{self._settings.url}/v2/health/ready", timeout=self._settings.health_s).is_success
        except httpx.RequestError:
            return False

    def _ask(self, call: Call, deadline_s: float | None) -> tuple[bytes, httpx.Headers]:
        tries = self._settings.tries(deadline_s)
        while True:
            try:
                reply, body = self._try(call, tries)
                error = error_of(reply, body)
            except httpx.RequestError as broken:
                error = transport_error(broken, self._settings.url)
            if error is None:
                return body, reply.headers
            time.sleep(tries.wait_s(error))

    def _try(self, call: Call, tries: Tries) -> tuple[httpx.Response, bytes]:
        headers, timeout = timed(call, tries.left_s())
        headers |= self._settings.headers
        url = self._settings.url + call.path
        with self._http.stream("POST", url, content=call.body, headers=headers, timeout=timeout) as reply:
            parts = []
            for part in reply.iter_bytes():
                # The time-outs of httpx are for each wait, and an answer may come drop by drop.
                tries.left_s()
                parts.append(part)
            return reply, b"".join(parts)
