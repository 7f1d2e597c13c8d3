"""A decoder's replicas by Ray Serve on this machine: answers and streams are a session's own, and none is left behind.

Slow: Ray takes some seconds to start. `.ci/ray_only` runs this where Ray is installed.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="needs the extra ray; .ci/ray_only runs it")
import httpx

from qrlora_deploy.runtime.generation.requests import GenerationRequest
from qrlora_deploy.runtime.generation.sampling import Sampling
from qrlora_deploy.runtime.generation.session import GenerationSession
from tests.ready import DECODER, READY
from tests.serving.process import Served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

OWNERS = (None, "one", "two", "three")
PROMPTS = ("play some music", "where is my parcel?", "book a flight to berlin")
ASKED = [(prompt, owner) for prompt in PROMPTS for owner in OWNERS]


@pytest.fixture(scope="module")
def place() -> Path:
    """A folder with `switchable` and `customers`."""
    if READY is None or not (READY / DECODER).is_dir():
        pytest.skip("needs the folder that `python -m tests.ready` made")
    return READY / DECODER


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Served]:
    with Served(
        *("switchable", "--customers", "customers", "--threads", 1, "--ray", "--replicas", 2, "--max-answers", 8),
        cwd=place,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def texts(place: Path) -> list[str]:
    """What a session answers, drawn by the number's seed."""
    sampled = [Sampling(temperature=1.0, seed=number) for number, _ in enumerate(ASKED)]
    requests = [GenerationRequest(*asked, how, max_tokens=24) for asked, how in zip(ASKED, sampled, strict=True)]
    with GenerationSession.open(place / "switchable", place / "customers", threads=1) as session:
        found = [answer.text for answer in session.answers(requests)]
    assert len(set(found)) > len(PROMPTS)
    return found


def record_of(number: int, stream: bool) -> dict[str, object]:
    prompt, owner = ASKED[number]
    model = "switchable" if owner is None else f"switchable:{owner}"
    asked = {"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 1.0, "seed": number}
    return asked | {"stream": stream}


def whole(server: Served, number: int) -> str:
    reply = httpx.post(f"{server.url}/v1/completions", json=record_of(number, False), timeout=60)
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][0]["text"]
    return text


def streamed(server: Served, number: int) -> str:
    with httpx.stream("POST", f"{server.url}/v1/completions", json=record_of(number, True), timeout=60) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def test_many_at_once_answer_as_a_session_whole_and_streamed(server: Served, texts: list[str]) -> None:
    for ask in (whole, streamed):
        with ThreadPoolExecutor(len(ASKED)) as pool:
            assert list(pool.map(lambda number, ask=ask: ask(server, number), range(len(ASKED)))) == texts


def test_refusals_have_their_status_and_who_goes_away_harms_nobody(server: Served, texts: list[str]) -> None:
    url = f"{server.url}/v1/completions"
    unknown = record_of(1, True) | {"model": "switchable:nobody"}
    assert httpx.post(url, json=unknown, timeout=60).status_code == 404
    for number in range(4):
        with httpx.stream("POST", url, json=record_of(number, True) | {"max_tokens": 100}, timeout=60) as reply:
            next(reply.iter_lines())
    assert [streamed(server, number) for number in range(4)] == texts[:4]
    assert 'qrlora_rows_total{model="switchable"}' in httpx.get(f"{server.url}/metrics", timeout=60).text
