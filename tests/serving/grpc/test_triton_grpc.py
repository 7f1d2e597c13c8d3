"""Triton's own client, which wants another protobuf than the rest of the tests: it runs in an environment of its own.

python3 -m venv FOLDER && FOLDER/bin/pip install 'tritonclient[grpc]'
QRLORA_TRITON=FOLDER/bin/python pytest tests/serving/grpc/test_triton_grpc.py
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.runtime.bundle.bundle import open_bundle
from qrlora_deploy.runtime.prediction.predictor import Predictor
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.serving.process import Served
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

PYTHON = os.environ.get("QRLORA_TRITON", "")

SCRIPT = """
import json, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

client = triton.InferenceServerClient(f"127.0.0.1:{sys.argv[1]}")
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny", "1")
metadata = client.get_model_metadata("tiny", as_json=True)
assert [one["name"] for one in metadata["outputs"]][:2] == ["logits", "scores"]

def tensor(name, values):
    found = triton.InferInput(name, [len(values)], "BYTES")
    found.set_data_from_numpy(np.array(values, dtype=object))
    return found

texts, owners = json.loads(sys.argv[2])
whole = client.infer("tiny", [tensor("text", texts), tensor("customer", owners)], request_id="7")
assert whole.get_response().id == "7"
one = client.infer(
    "tiny", [tensor("text", texts)], outputs=[triton.InferRequestedOutput("logits")],
    parameters={"customer": "acme"}, client_timeout=30, timeout=30_000_000, compression_algorithm="gzip",
)
try:
    client.infer("tiny", [tensor("text", texts)], parameters={"customer": "nobody"})
except InferenceServerException as error:
    assert "NOT_FOUND" in error.status()
config = client.get_model_config("tiny", as_json=True)["config"]
assert config["input"][0] == {"name": "text", "data_type": "TYPE_STRING", "dims": ["-1"]}
assert all(one["optional"] for one in config["input"][1:])
(stats,) = client.get_inference_statistics("tiny", as_json=True)["model_stats"]
assert stats["inference_count"] == str(2 * len(texts)) and int(stats["inference_stats"]["compute_infer"]["ns"]) > 0
assert client.get_inference_statistics().model_stats[0].name == "tiny"
label = [text.decode() for text in whole.as_numpy("label")]
print(json.dumps([whole.as_numpy("logits").tolist(), label, one.as_numpy("logits").tolist()]))
"""


@pytest.mark.skipif(not PYTHON, reason="QRLORA_TRITON names no Python with tritonclient[grpc]")
def test_tritons_client_unchanged(switchable: Path, customers: dict[str, Coefficients], tmp_path: Path) -> None:
    texts, owners = list(SENTENCES), ["acme", "", "beta", "acme", "", "beta"]
    session = SwitchableSession(open_bundle(switchable), threads=1)
    (tmp_path / "customers").mkdir()
    for name in ("acme", "beta"):
        session.load(name, customers[name])
        write_coefficients(customers[name], tmp_path / "customers" / f"{name}.safetensors")
    options = ("--model", f"tiny={switchable}", "--customers", "customers", "--grpc-port", 0)
    with Served(*options, cwd=tmp_path) as server:
        words = [PYTHON, "-c", SCRIPT, str(server.ports["--grpc-port"]), json.dumps([texts, owners])]
        # None of this environment's packages.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        ran = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert ran.returncode == 0, ran.stderr
    logits, label, one = json.loads(ran.stdout)
    expected = Predictor(session).predict(texts, customers=[name or None for name in owners])
    np.testing.assert_allclose(logits, [answer.logits for answer in expected], **FP32_ONNX)
    assert label == [answer.label for answer in expected]
    acme = Predictor(session).predict(texts, customers=["acme"] * len(texts))
    np.testing.assert_allclose(one, [answer.logits for answer in acme], **FP32_ONNX)
