"""Decoders behind a front over replicas in this process: answers and streams are those of one server, whatever ends."""

import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

pytest.importorskip("torch", reason="makes bundles")
pytest.importorskip("httpx", reason="needs the extra client")
import httpx

from qrlora_deploy.serving.engine.protocol import EngineStats
from qrlora_deploy.serving.generation.engine import TextEngine
from qrlora_deploy.serving.opening import ModelPlaces, RunOptions
from qrlora_deploy.serving.ray.calls import Call, Part, Reply
from qrlora_deploy.serving.ray.relay import RelayFront
from qrlora_deploy.serving.ray.rendezvous import ranked
from qrlora_deploy.serving.ray.replica import Replica, ReplicaOptions
from qrlora_deploy.serving.ray.whose import customer_of
from qrlora_deploy.serving.refusals import LostError
from tests.runtime.generation.written import Written, write_everything
from tests.runtime.place import until
from tests.serving.generation.place import NEW, Served, served
from tests.serving.running import running

pytestmark = pytest.mark.makes

PATHS = ("/v1/completions", "/v1/chat/completions")


class Nearby:
    """`Replicas` in this process.

    Attributes:
        lost_after: of the next call, so many parts come; then its replica is lost. None: all of them.
        asked: names of the replicas that had a call.
    """

    def __init__(self, options: ReplicaOptions, names: str = "ab") -> None:
        self.replicas = {name: Replica(options, name) for name in names}
        self.lost_after: int | None = None
        self.asked = list[str]()

    def _replica(self, call: Call) -> Replica:
        name = ranked(call.customer or "", [name for name in self.replicas if name not in call.avoid])[0]
        self.asked.append(name)
        return self.replicas[name]

    async def ask(self, call: Call) -> Reply:
        return await self._replica(call).answer(call)

    async def parts(self, call: Call) -> AsyncGenerator[Reply | Part]:
        left, self.lost_after = self.lost_after, None
        async with aclosing(self._replica(call).parts(call)) as parts:
            async for part in parts:
                if left == 0:
                    raise LostError("it ended")
                left = None if left is None else left - 1
                yield part

    async def stats(self) -> list[Mapping[str, EngineStats]]:
        return [replica.stats() for replica in self.replicas.values()]

    def engine(self, name: str) -> TextEngine:
        (model,) = self.replicas[name]._opened.front.models
        assert isinstance(model.engine, TextEngine)
        return model.engine


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_everything(tmp_path_factory.mktemp("written"))


@contextmanager
def relayed(written: Written, **options: Any) -> Iterator[tuple[Nearby, str]]:
    """Replicas, and the address of a front over them."""
    places = [ModelPlaces("text", written.bundle, written.customers)]
    nearby = Nearby(ReplicaOptions(places, RunOptions(threads=1, max_answers=4, **options)))
    try:
        with running(RelayFront(nearby)) as server:
            yield nearby, f"http://127.0.0.1:{server.server.http.port}"
    finally:
        for replica in nearby.replicas.values():
            replica.close()


@pytest.fixture(scope="module")
def place(written: Written) -> Iterator[tuple[Nearby, str]]:
    with relayed(written) as found:
        yield found


@pytest.fixture(scope="module")
def alone(written: Written) -> Iterator[Served]:
    """One server with the same model."""
    with served(written) as found:
        yield found


def record_of(path: str, customer: str | None = "two", **more: Any) -> dict[str, Any]:
    text = "where is my parcel?"
    asked = {"messages": [{"role": "user", "content": text}]} if "chat" in path else {"prompt": text}
    model = "text" if customer is None else f"text:{customer}"
    return {"model": model, "max_tokens": NEW, "temperature": 1.0, "seed": 3, **asked, **more}


def without_times(text: str) -> Any:
    """What a reply or a stream says, but for what every answer has of its own."""

    def plain(record: Any) -> Any:
        return {key: value for key, value in record.items() if key not in ("id", "created", "usage")}

    if not text.startswith("data: "):
        return plain(json.loads(text))
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [line if line == "[DONE]" else plain(json.loads(line)) for line in lines]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"stream": True, "n": 2},
        {"customer": None, "logprobs": True, "top_logprobs": 2},
        {"customer": "nobody", "stream": True},
        {"max_tokens": 10**6, "stream": True},
        {"temperature": "hot"},
    ],
    ids=str,
)
def test_answers_and_refusals_are_those_of_one_server(
    place: tuple[Nearby, str], alone: Served, path: str, more: dict[str, Any]
) -> None:
    if path == PATHS[0] and "logprobs" in more:
        more = {"customer": None, "logprobs": 2}
    record = record_of(path, **more)
    ours, theirs = (httpx.post(url + path, json=record, timeout=30) for url in (place[1], alone.url))
    assert ours.status_code == theirs.status_code
    assert without_times(ours.text) == without_times(theirs.text)
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert ("content-length" in ours.headers) == ("content-length" in theirs.headers)


def test_models_are_those_of_one_server(place: tuple[Nearby, str], alone: Served) -> None:
    for path in ("/v1/models/text", "/v1/models/text:one", "/v1/models/text:nobody", "/v1/models/none"):
        ours, theirs = (httpx.get(url + path, timeout=30) for url in (place[1], alone.url))
        assert ours.status_code == theirs.status_code
        assert without_times(ours.text) == without_times(theirs.text)


def test_a_customer_of_a_decoder_stays_where_it_is(place: tuple[Nearby, str]) -> None:
    nearby, url = place
    nearby.asked.clear()
    for customer in ("one", "two", "three") * 2:
        assert httpx.post(url + PATHS[0], json=record_of(PATHS[0], customer), timeout=30).status_code == 200
    assert nearby.asked == [ranked(customer, "ab")[0] for customer in ("one", "two", "three")] * 2
    assert customer_of(b'{"model": "text:two"}') == "two" and customer_of(b'{"model": "text"}') is None


def test_a_stream_comes_as_it_is_written(written: Written) -> None:
    with relayed(written) as (nearby, url):
        for name in "ab":
            slow_down(nearby.engine(name))
        begin = time.monotonic()
        with httpx.stream("POST", url + PATHS[0], json=record_of(PATHS[0], stream=True), timeout=30) as reply:
            times = [time.monotonic() - begin for line in reply.iter_lines() if line]
    assert len(times) > NEW / 2
    # Twelve tokens, one hundredth of a second and more between them.
    assert times[-1] - times[0] > 0.05


def test_a_lost_replica_is_asked_again_before_the_first_word_and_told_of_after_it(place: tuple[Nearby, str]) -> None:
    nearby, url = place
    record = record_of(PATHS[0], stream=True)
    whole = httpx.post(url + PATHS[0], json=record, timeout=30).text
    nearby.asked.clear()
    nearby.lost_after = 0
    again = httpx.post(url + PATHS[0], json=record, timeout=30).text
    assert without_times(again) == without_times(whole) and len(nearby.asked) == 2
    nearby.lost_after = 1
    *begun, error, done = without_times(httpx.post(url + PATHS[0], json=record, timeout=30).text)
    assert begun == without_times(whole)[: len(begun)] and begun
    assert (error["error"]["code"], done) == ("lost", "[DONE]") and len(nearby.asked) == 3
    text = httpx.get(url + "/metrics").text
    assert 'qrlora_asked_again_total{reason="lost"} 1.0' in text
    assert 'qrlora_rows_total{model="text"}' in text


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_row(written: Written, stream: bool) -> None:
    with relayed(written) as (nearby, url):
        for name in "ab":
            slow_down(nearby.engine(name))
        written_of = nearby.engine(ranked("one", "ab")[0]).written
        client = httpx.Client()
        record = record_of(PATHS[0], "one", stream=stream, max_tokens=100, n=4)
        if stream:
            reply = client.send(client.build_request("POST", url + PATHS[0], json=record), stream=True)
            next(reply.iter_lines())
            assert written_of().running > 1
            reply.close()
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url + PATHS[0], json=record, timeout=0.3)
        client.close()
        until(lambda: written_of().running == 0)
        assert written_of().cancelled > 1


def slow_down(engine: TextEngine, seconds: float = 0.01) -> None:
    """Let every step take longer."""
    inner = engine.session._engine
    step = inner.step

    def slow() -> None:
        time.sleep(seconds)
        step()

    inner.step = slow  # type: ignore[method-assign]
