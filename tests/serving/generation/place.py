"""A decoder behind a server, and clients of it."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.session import GenerationSession
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.generation.engine import TextEngine
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.opening import ModelPlaces, OpenModel, RunOptions
from qrlora_deploy.serving.served import Models
from tests.runtime.generation.written import Written
from tests.serving.running import Running, running

NEW = 12


class Served:
    """A decoder that is served.

    Attributes:
        running: the server.
        url: of it.
        engine: of the decoder.
    """

    def __init__(self, running: Running, model: OpenModel) -> None:
        self.running = running
        self.url = f"http://127.0.0.1:{running.server.http.port}"
        assert isinstance(model.served.engine, TextEngine)
        self.engine = model.served.engine

    def slow_down(self, seconds: float = 0.01) -> None:
        """Let every step take longer, so that an answer is under way for a while."""
        inner = self.engine.session._engine
        step = inner.step

        def slow() -> None:
            time.sleep(seconds)
            step()

        inner.step = slow  # type: ignore[method-assign]

    def post(self, path: str, record: Any, **headers: str) -> httpx.Response:
        """A request and its answer."""
        return httpx.post(self.url + path, json=record, headers=headers, timeout=30)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, timeout=30)

    def complete(self, prompt: str, customer: str | None = None, **fields: Any) -> dict[str, Any]:
        """A greedy answer, `NEW` tokens at most."""
        record = {"model": name_of(customer), "prompt": prompt, "temperature": 0, "max_tokens": NEW} | fields
        reply = self.post("/v1/completions", record)
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def events(self, path: str, record: Any) -> Iterator[Any]:
        """The records of a stream, with its end as a text."""
        with httpx.stream("POST", self.url + path, json=record, timeout=30) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            for line in reply.iter_lines():
                if line:
                    assert line.startswith("data: ")
                    yield "[DONE]" if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def name_of(customer: str | None) -> str:
    return "text" if customer is None else f"text:{customer}"


@contextmanager
def served(
    written: Written, keys: Path | None = None, limits: Limits | None = None, answers: int = 4, **options: Any
) -> Iterator[Served]:
    """The decoder behind a server that runs."""
    run = RunOptions(threads=1, limits=limits or Limits(), max_answers=answers)
    model = OpenModel(ModelPlaces("text", written.bundle, written.customers), run)
    try:
        models = Models([model.served])
        front = Front(models, keys=None if keys is None else Keys.open(keys), metrics=Metrics(list(models)))
        with running(front, **options) as server:
            yield Served(server, model)
    finally:
        model.close()


def alone(written: Written, prompt: Any, customer: str | None, new: int = NEW) -> str:
    """What a session of its own answers, greedily."""
    with GenerationSession.open(written.bundle, written.customers, threads=1, max_rows=1) as session:
        (answer,) = session.answers([GenerationRequest(prompt, customer, max_tokens=new)])
    return answer.text
