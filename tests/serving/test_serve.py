"""`qrlora-deploy serve` as a user runs it: a process, signals, foreign clients."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.cli.running import run, run_here
from tests.serving.process import Served
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

httpx = pytest.importorskip("httpx", reason="needs the extra client")

TEXTS = list(SENTENCES)


@pytest.fixture
def place(tmp_path: Path, switchable: Path, exported: Path, customers: dict[str, Coefficients]) -> Path:
    """A folder with a bundle, a merged one, and customers."""
    shutil.copytree(switchable, tmp_path / "bundle")
    shutil.copytree(exported, tmp_path / "merged")
    (tmp_path / "customers").mkdir()
    for name, customer in customers.items():
        write_coefficients(customer, tmp_path / "customers" / f"{name}.safetensors")
    return tmp_path


def logits(url: str, customer: str | None, model: str = "bundle", headers: dict[str, str] | None = None) -> np.ndarray:
    record = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(TEXTS)], "data": TEXTS}],
        "outputs": [{"name": "logits"}],
        "parameters": {"customer": customer or ""},
    }
    reply = httpx.post(f"{url}/v2/models/{model}/infer", json=record, headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    output = reply.json()["outputs"][0]
    return np.array(output["data"], dtype=np.float32).reshape(output["shape"])


def test_models_customers_metrics_and_a_new_file(place: Path, customers: dict[str, Coefficients]) -> None:
    session = SwitchableSession(open_bundle(place / "bundle"), threads=1)
    for name, customer in customers.items():
        session.load(name, customer)
    predictor, merged = Predictor(session), Predictor(open_bundle(place / "merged"), threads=1)
    with Served("bundle", "--model", "other=merged", "--customers", "customers", "--threads", 1, cwd=place) as server:
        assert httpx.get(f"{server.url}/v2/health/ready").status_code == 200
        for name in (None, *customers):
            expected = predictor.predict(TEXTS, customers=[name] * len(TEXTS))
            np.testing.assert_allclose(logits(server.url, name), [one.logits for one in expected], **FP32_ONNX)
        expected = merged.predict(TEXTS)
        np.testing.assert_allclose(
            logits(server.url, None, model="other"), [one.logits for one in expected], **FP32_ONNX
        )
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'qrlora_requests_total{code="200",route="/v2/models/{model}/infer"}' in metrics
        # A file that takes another's place goes live.
        new = replace(customers["acme"], values=customers["acme"].values * np.float32(0.25))
        session.load("acme", new)
        write_coefficients(new, place / "customers" / "acme.safetensors")
        wanted = [one.logits for one in predictor.predict(TEXTS, customers=["acme"] * len(TEXTS))]
        deadline = time.monotonic() + 20
        while not np.allclose(logits(server.url, "acme"), wanted, **FP32_ONNX):
            assert time.monotonic() < deadline
    assert server.end() == 0 and server.errors == []


class Load:
    """Clients that ask until readiness goes off, as behind a load balancer."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.codes, self.failures = url, [], []  # type: ignore[var-annotated]
        self.seen_off = threading.Event()
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self.seen_off.is_set():
                record = {"texts": TEXTS[: 1 + number % 6], "customer": ("acme", "beta")[number % 2]}
                try:
                    self.codes.append(client.post("/v1/classify", json=record).status_code)
                    if number == 0 and client.get("/v2/health/ready").status_code != 200:
                        self.seen_off.set()
                except httpx.HTTPError as error:
                    self.failures.append(error)
                    return

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)


def test_sigterm_under_load_loses_no_request(place: Path) -> None:
    with Served("bundle", "--customers", "customers", "--drain-delay", 3, cwd=place) as server:
        load = Load(server.url, 6)
        deadline = time.monotonic() + 30
        while len(load.codes) < 50:
            assert time.monotonic() < deadline and not load.failures
        server.send(signal.SIGTERM)
        load.wait()
        assert load.seen_off.is_set() and load.failures == [] and set(load.codes) == {200}
        assert server.wait() == 0
    assert server.errors == []


def test_sighup_reads_keys_and_packed_files_again(place: Path, customers: dict[str, Coefficients]) -> None:
    both = {name: customers[name] for name in ("acme", "beta")}
    pack = ("pack", "only", "--bundle", "bundle", "-o", "packed.safetensors")
    (place / "only").mkdir()
    write_coefficients(both["acme"], place / "only" / "acme.safetensors")
    assert run_here(*pack, cwd=place).code == 0
    first = run_here("keys", "add", "keys.json", "--customer", "*", "--json", cwd=place).json["key"]
    with Served("bundle", "--packed", "packed.safetensors", "--keys", "keys.json", cwd=place) as server:

        def code(customer: str, key: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            record = {"texts": TEXTS, "customer": customer}
            return int(httpx.post(f"{server.url}/v1/classify", json=record, headers=headers).status_code)

        assert (code("acme", first), code("beta", first), code("acme", "other")) == (200, 404, 401)
        write_coefficients(both["beta"], place / "only" / "beta.safetensors")
        assert run_here(*pack, cwd=place).code == 0
        second = run_here("keys", "add", "keys.json", "--customer", "beta", "--json", cwd=place).json["key"]
        server.send(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while (code("beta", second), code("acme", second)) != (200, 404):
            assert time.monotonic() < deadline
        # What cannot be read leaves what was there.
        (place / "packed.safetensors").write_bytes(b"nothing")
        server.send(signal.SIGHUP)
        while not any("not reloaded" in line for line in server.errors):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert code("beta", second) == 200
    assert server.end() == 0
    assert not any(key in line for key in (first, second) for line in server.errors)


@pytest.mark.parametrize("processes", [0, 2])
def test_grpc_and_the_admin_api_share_models_keys_and_quotas(place: Path, processes: int) -> None:
    grpc = pytest.importorskip("grpc", reason="needs the extra serve")
    from tests.serving.grpc.client import Client, message

    key = run_here("keys", "add", "keys.json", "--customer", "*", "--admin", "--json", cwd=place).json["key"]
    stored = json.loads((place / "keys.json").read_text("utf-8"))
    stored["quotas"] = {"beta": {"rows_per_second": 1, "burst": 3}}
    (place / "keys.json").write_text(json.dumps(stored), "utf-8")
    ports = ("--grpc-port", 0, "--admin-port", 0, "--audit-log", "audit.jsonl", "--count-customer", "beta")
    options = (
        "--model",
        "tiny=bundle",
        "--customers",
        "customers",
        "--keys",
        "keys.json",
        "--processes",
        processes,
        *ports,
    )
    headers = {"authorization": f"Bearer {key}"}
    with Served(*options, cwd=place) as server:

        async def over_grpc(customer: str, texts: list[str]) -> np.ndarray:
            asked = message("ModelInferRequest", model_name="tiny")
            asked.inputs.add(name="text", datatype="BYTES", shape=[len(texts)]).contents.bytes_contents.extend(
                text.encode() for text in texts
            )
            asked.outputs.add(name="logits")
            asked.parameters["customer"].string_param = customer
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports['--grpc-port']}") as channel:
                reply = await Client(channel).infer(asked, metadata=tuple(headers.items()))
            values = reply.outputs[0].contents.fp32_contents or np.frombuffer(reply.raw_output_contents[0], "<f4")
            return np.array(values, dtype=np.float32).reshape(tuple(reply.outputs[0].shape))

        before = asyncio.run(over_grpc("acme", TEXTS))
        np.testing.assert_allclose(before, logits(server.url, "acme", model="tiny", headers=headers), **FP32_ONNX)
        # What the admin API puts is what both fronts answer by.
        admin = f"http://127.0.0.1:{server.ports['--admin-port']}/v1/models/tiny/customers/acme"
        content = (place / "customers" / "beta.safetensors").read_bytes()
        assert httpx.put(admin, content=content).status_code == 401
        assert httpx.put(admin, content=content, headers=headers).status_code == 200
        deadline = time.monotonic() + 20
        while np.allclose(asyncio.run(over_grpc("acme", TEXTS)), before, **FP32_ONNX):
            assert time.monotonic() < deadline
        np.testing.assert_allclose(
            asyncio.run(over_grpc("acme", TEXTS)),
            logits(server.url, "acme", model="tiny", headers=headers),
            **FP32_ONNX,
        )
        # beta has used up its rows of this second.
        record = {"texts": TEXTS[:3], "customer": "beta"}
        replies = [httpx.post(f"{server.url}/v1/classify", json=record, headers=headers) for _ in range(2)]
        assert [reply.status_code for reply in replies] == [200, 429] and "retry-after" in replies[1].headers
        scraped = httpx.get(f"{server.url}/metrics", headers=headers).text
        assert 'qrlora_customer_rows_total{customer="beta"} 3.0' in scraped and "acme" not in scraped
    assert server.end() == 0 and server.errors == []
    assert '"action":"put"' in (place / "audit.jsonl").read_text("utf-8")


def test_logs_as_json_name_the_request_and_no_text(place: Path) -> None:
    with Served("bundle", "--customers", "customers", "--log-json", cwd=place) as server:
        headers = {"x-request-id": "one-of-mine"}
        record = {"texts": ["a secret of somebody"], "customer": "acme"}
        assert httpx.post(f"{server.url}/v1/classify", json=record, headers=headers).status_code == 200
    lines = [line for line in server.errors if "one-of-mine" in line]
    assert len(lines) == 1 and '"route":"/v1/classify"' in lines[0] and '"rows":1' in lines[0]
    assert not any("secret" in line for line in server.errors)


def test_check_opens_everything_and_names_what_is_wrong(place: Path) -> None:
    ran = run_here("serve", "bundle", "--customers", "customers", "--check", "--port", 0, "--json", cwd=place)
    assert ran.code == 0 and ran.json["models"] == [{"model": "bundle", "customers": 4, "problems": []}]
    (place / "customers" / "beta.safetensors").write_bytes(b"nothing")
    ran = run_here("serve", "bundle", "--customers", "customers", "--check", "--port", 0, cwd=place)
    assert ran.code == 1 and "1 customers cannot be served: beta:" in ran.err


REFUSED = {
    "no bundle": ("serve", "give a BUNDLE"),
    "everybody": ("serve bundle --host 0.0.0.0", "--keys FILE, or --insecure"),
    "half of TLS": ("serve bundle --tls-cert bundle/manifest.json", "belong together"),
    "an authority alone": ("serve bundle --tls-client-ca bundle/manifest.json", "needs --tls-cert"),
    "TLS of no certificate": (
        "serve bundle --port 0 --tls-cert bundle/manifest.json --tls-key bundle/manifest.json",
        "TLS cannot be offered",
    ),
    "a model without a name": ("serve --model bundle", "must be NAME=BUNDLE"),
    "a name for no URL": ("serve --model a/b=bundle", "cannot be the name of a model"),
    "one name twice": ("serve bundle --model bundle=merged", "given twice"),
    "no such customers": ("serve bundle --customers nowhere", "there is no nowhere"),
    "customers of a merged bundle": ("serve merged --customers customers", "takes no others"),
    "buckets that are none": ("serve bundle --buckets 8", "such as 1,8,32:32,128"),
    "buckets too long": ("serve bundle --buckets 8:4096", "longer than the model's"),
    "merged weights of a merged bundle": (
        "serve merged --merged-cache-mib 8 --check",
        "--merged-cache-mib does nothing for merged",
    ),
    "no such device": ("serve bundle --provider tpu", "tpu"),
    "an audit log without an admin API": ("serve bundle --audit-log a.jsonl", "--audit-log is of the admin API"),
    "two fronts on a port": (
        "serve bundle --port 8080 --grpc-port 8080 --check",
        "--grpc-port 8080 is the port of HTTP",
    ),
    "an admin API without keys": ("serve bundle --admin-port 0", "--admin-port needs --keys and --audit-log"),
    "keys that are none": ("serve bundle --keys bundle/manifest.json", "manifest.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_one_line(place: Path, name: str) -> None:
    line, words = REFUSED[name]
    ran = run_here(*line.split(), cwd=place)
    assert ran.code == 2 and words in ran.err, ran.err
    assert len(ran.err.strip().splitlines()) == 1 and "internal error" not in ran.err


def test_a_port_that_is_taken(place: Path) -> None:
    with Served("bundle", cwd=place) as server:
        ran = run("serve", "bundle", "--port", server.port, cwd=place)
        assert ran.code == 2 and "cannot be listened on" in ran.err and len(ran.err.splitlines()) == 1


def test_tritonclient_with_its_defaults_and_with_plain_json(place: Path) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    with Served("bundle", "--customers", "customers", cwd=place) as server:
        expected = logits(server.url, "acme")
        client = triton.InferenceServerClient(f"127.0.0.1:{server.port}")
        assert client.is_server_ready() and client.is_model_ready("bundle")
        texts = np.array(TEXTS, dtype=object)
        for binary in (True, False):
            text = triton.InferInput("text", [len(texts)], "BYTES")
            text.set_data_from_numpy(texts, binary_data=binary)
            outputs = [triton.InferRequestedOutput("logits", binary_data=binary)]
            for wanted in (None, outputs):
                for way in (None, "gzip", "deflate"):
                    reply = client.infer(
                        "bundle",
                        [text],
                        outputs=wanted,
                        parameters={"customer": "acme"},
                        request_compression_algorithm=way,
                        response_compression_algorithm=way,
                    )
                    np.testing.assert_allclose(reply.as_numpy("logits"), expected, **FP32_ONNX)
        client.close()


def test_the_examples_of_the_page_work(place: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    page = Path(__file__).parents[2] / "docs" / "serving-http.md"
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    commands = [
        command for block in blocks for command in re.split(r"^(?=curl )", block, flags=re.MULTILINE) if command
    ]
    assert len(commands) > 10 and all(command.startswith("curl -s ") for command in commands)
    with Served("bundle", "--customers", "customers", cwd=place) as server:
        for command in commands:
            asked = command.replace("http://127.0.0.1:8080", server.url).replace(
                "curl ", "curl -S --fail-with-body ", 1
            )
            ran = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60, check=False)
            assert ran.returncode == 0, (command, ran.stdout, ran.stderr)
            assert json.loads(ran.stdout)


@pytest.mark.parametrize("processes", [0, 1])
def test_the_second_signal_does_not_wait(place: Path, processes: int) -> None:
    with Served("bundle", "--drain-delay", 600, "--processes", processes, cwd=place) as server:
        server.send(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while httpx.get(f"{server.url}/v2/health/ready").status_code == 200:
            assert time.monotonic() < deadline
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.wait() == 0
