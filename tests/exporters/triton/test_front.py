"""The front of a repository, in a small fake of Triton's Python backend: answers are those of the predictor."""

import asyncio
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.triton.repository import MODEL
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime import Predictor, open_bundle
from qrlora_deploy.runtime.customers.packed_writer import write_packed
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.exporters.triton.fake_backend import MOST_ROWS, Asked, Backend, InferenceResponse
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

OWNERS = ["acme", "beta", None, "gamma", "delta", "acme"]
OUTPUTS = ("logits", "scores", "labels", "label", "digest")

Start = Callable[..., "Running"]


class Running:
    """`model.py` of a repository, loaded as Triton loads it."""

    def __init__(self, repository: Path, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> None:
        self.backend = Backend(repository)
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.backend)  # type: ignore[arg-type]
        place = repository / "intents"
        spec = importlib.util.spec_from_file_location("model", place / "1" / MODEL)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        said = parameters_of(place / "config.pbtxt") | parameters
        config = {
            "max_batch_size": MOST_ROWS,
            "parameters": {name: {"string_value": value} for name, value in said.items()},
        }
        self.model = module.TritonPythonModel()
        self.model.initialize(
            {"model_config": json.dumps(config), "model_repository": str(place), "model_version": "1"}
        )

    def ask(self, *requests: Asked) -> list[InferenceResponse]:
        found = asyncio.run(self.model.execute(list(requests)))
        assert len(found) == len(requests)
        return found


def parameters_of(config: Path) -> dict[str, str]:
    words = [line.split('"')[1] for line in config.read_text().splitlines() if "key:" in line or "string_value" in line]
    return dict(zip(words[::2], words[1::2], strict=True))


@pytest.fixture
def start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    running: list[Running] = []

    def start(**parameters: str) -> Running:
        running.append(Running(repository, monkeypatch, **parameters))
        return running[-1]

    yield start
    for one in running:
        one.model.finalize()


def asked(texts: list[Any], customers: list[str | None] | None = None, **parameters: Any) -> Asked:
    inputs: dict[str, list[Any]] = {"text": texts}
    if customers is not None:
        inputs["customer"] = [name or "" for name in customers]
    return Asked(inputs, OUTPUTS, parameters)


@pytest.fixture(scope="module")
def session(switchable: Path, folder: Path) -> SwitchableSession:
    """The reference: the same customers in a switchable bundle of the same base."""
    session = SwitchableSession(open_bundle(switchable), threads=1)
    for file in folder.iterdir():
        session.load(file.stem, file)
    return session


def check(response: InferenceResponse, texts: list[str], owners: list[str | None], session: SwitchableSession) -> None:
    """Hold an answer against the predictor's."""
    assert not response.has_error(), response.error()
    found = response.arrays()
    for row, expected in enumerate(Predictor(session).predict(texts, customers=owners)):
        labels = [name.decode() for name in found["labels"][row] if name]
        count = len(expected.logits)
        np.testing.assert_allclose(found["logits"][row, :count], expected.logits, **FP32_ONNX)
        assert (found["logits"][row, count:] == np.finfo(np.float32).min).all()
        assert found["label"][row, 0].decode() == expected.label == labels[int(found["logits"][row].argmax())]
        np.testing.assert_allclose(found["scores"][row].max(), expected.score, **FP32_ONNX)


def test_every_row_is_answered_for_its_customer(
    start: Start, session: SwitchableSession, customers: dict[str, Coefficients]
) -> None:
    running = start()
    (response,) = running.ask(asked(list(SENTENCES), OWNERS))
    check(response, list(SENTENCES), OWNERS, session)
    digests = [customers[name].digest.encode() if name else b"" for name in OWNERS]
    assert response.arrays()["digest"][:, 0].tolist() == digests
    assert response.arrays()["logits"].shape == (6, 6) and response.arrays()["label"].shape == (6, 1)


def test_requests_that_come_together_share_runs_and_get_their_own_rows(
    start: Start, session: SwitchableSession
) -> None:
    running = start()
    owners = [OWNERS, OWNERS[::-1], ["beta"] * 6, [None] * 6]
    responses = running.ask(*(asked(list(SENTENCES), names) for names in owners))
    for response, names in zip(responses, owners, strict=True):
        check(response, list(SENTENCES), names, session)
    assert sum(len(run["input_ids"]) for run in running.backend.runs) == 24
    # Every text has 16 tokens at most, so that all of them have one shape.
    assert len(running.backend.runs) == 1 and running.backend.runs[0]["input_ids"].shape == (24, 16)
    assert len(np.unique(running.backend.runs[0]["coefficients"], axis=0)) == 3


def test_a_long_text_runs_in_a_longer_shape(start: Start, session: SwitchableSession) -> None:
    running = start()
    texts = [SENTENCES[0], " ".join(SENTENCES[:3])]
    (response,) = running.ask(asked(texts, ["acme", "beta"]))
    check(response, texts, ["acme", "beta"], session)
    assert sorted(run["input_ids"].shape for run in running.backend.runs) == [(1, 16), (1, 32)]


def test_the_parameter_names_the_customer_of_all_rows(start: Start, session: SwitchableSession) -> None:
    running = start()
    named, base = running.ask(asked(list(SENTENCES), customer="acme"), asked(list(SENTENCES)))
    check(named, list(SENTENCES), ["acme"] * 6, session)
    check(base, list(SENTENCES), [None] * 6, session)


def test_one_bad_request_does_not_spoil_the_others(start: Start, session: SwitchableSession, folder: Path) -> None:
    running = start()
    good, unknown, unread, counts, wrong, nothing = running.ask(
        asked(list(SENTENCES), OWNERS),
        asked(["a"], ["nobody"]),
        asked([b"\xff"]),
        asked(["a", "b"], ["acme"]),
        asked(["a"], customer=7),
        asked([]),
    )
    check(good, list(SENTENCES), OWNERS, session)
    assert unknown.error().code == "NOT_FOUND" and str(folder) not in unknown.error().message()
    for response, message in (
        (unread, "UTF-8"),
        (counts, "2 rows but 1 customers"),
        (wrong, "parameter customer must be a text"),
        (nothing, "holds no texts"),
    ):
        assert response.error().code == "INVALID_ARG" and message in response.error().message()


def test_a_graph_that_fails_is_said_to(start: Start) -> None:
    running = start()
    running.backend.fails = True
    (response,) = running.ask(asked(["a"]))
    assert (response.error().code, response.error().message()) == ("INTERNAL", "intents_graph: out of memory")
    running.backend.loaded = False
    (response,) = running.ask(asked(["a"]))
    assert response.error().message() == "intents_graph: Model 'intents_graph' is not ready"


def test_only_the_outputs_that_are_asked_for_come(start: Start) -> None:
    (response,) = start().ask(Asked({"text": ["a"]}, ["label"], {}))
    assert set(response.arrays()) == {"label"}


def test_packed_customers_and_a_small_table(
    start: Start, session: SwitchableSession, customers: dict[str, Coefficients], repository: Path, tmp_path: Path
) -> None:
    manifest = open_bundle(repository / "intents_graph" / "1").manifest
    kept = [(name, customers[name]) for name in ("acme", "beta")]
    write_packed(kept, tmp_path / "all.packed", manifest)
    running = start(customers="", packed=str(tmp_path / "all.packed"))
    owners: list[str | None] = ["acme", "beta", None]
    known, unknown = running.ask(asked(list(SENTENCES[:3]), owners), asked(["a"], ["gamma"]))
    check(known, list(SENTENCES[:3]), owners, session)
    assert unknown.error().code == "NOT_FOUND"
    small = start(max_customers="1")
    for name in ("acme", "beta", "acme"):
        (response,) = small.ask(asked(list(SENTENCES), [name] * 6))
        check(response, list(SENTENCES), [name] * 6, session)
    assert len(small.model.front.customers.customers()) == 1


def test_a_changed_file_is_answered_for_without_a_restart(
    start: Start, customers: dict[str, Coefficients], folder: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "customers"))
    running = start(customers=str(place))

    def digest() -> bytes:
        (response,) = running.ask(asked(["a"], ["acme"]))
        return response.arrays()["digest"][0, 0]

    assert digest() == customers["acme"].digest.encode()
    write_coefficients(customers["beta"], place / "acme.safetensors")
    deadline = time.monotonic() + 30
    while digest() != customers["beta"].digest.encode():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_file_of_another_base_is_told_to_the_log_alone(
    start: Start, customers: dict[str, Coefficients], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of ours")
    (response,) = start(customers=str(tmp_path)).ask(asked(["a"], ["bad"]))
    assert response.error().code == "INTERNAL" and str(tmp_path) not in response.error().message()
    assert "bad.safetensors" in caplog.text
