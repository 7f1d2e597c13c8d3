"""The service over the tiny bundle."""

import pytest

pytest.importorskip("grpc", reason="needs the extra serve")
pytest.importorskip("grpc_tools", reason="needs grpcio-tools, whose compiler makes the client's messages")

from qrlora_deploy.serving.grpc.service import InferenceService
from qrlora_deploy.serving.life import Life
from qrlora_deploy.serving.served import Models


@pytest.fixture
def service(models: Models) -> InferenceService:
    return InferenceService(models, Life())
