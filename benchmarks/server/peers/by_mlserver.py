"""MLServer over the session, with its adaptive batching and its process for the model.

python -m benchmarks.server.peers.by_mlserver PORT PROCESSES
"""

import asyncio
import json
import sys
import tempfile
from pathlib import Path

import mlserver
from mlserver.cli.serve import load_settings
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

from benchmarks.server.load import MLSERVER_MODEL
from benchmarks.server.peers.answering import Answerer, Behind


class Peer(mlserver.MLModel):
    """Inputs `text` and `customer`, outputs `label` and `score`."""

    model: Answerer

    async def load(self) -> bool:
        """In the process that runs the model."""
        self.model = Behind.told().open()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """All rows of a batch in one run."""
        inputs = {one.name: StringCodec.decode_input(one) for one in payload.inputs}
        labels, scores = self.model.answer(inputs["text"], inputs["customer"])
        score = ResponseOutput(name="score", shape=[len(scores), 1], datatype="FP32", data=scores)
        outputs = [StringCodec.encode_output("label", labels, use_bytes=False), score]
        return InferenceResponse(model_name=self.name, outputs=outputs)


def main() -> None:
    """Start it in a folder of its own."""
    port, processes, behind = int(sys.argv[1]), int(sys.argv[2]), Behind.told()
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": port + 1,
        "metrics_port": port + 2,
        "parallel_workers": processes,
        "debug": False,
    }
    model = {
        "name": MLSERVER_MODEL,
        "implementation": "benchmarks.server.peers.by_mlserver.Peer",
        "max_batch_size": behind.rows,
        "max_batch_time": behind.wait_ms / 1e3,
    }
    with tempfile.TemporaryDirectory() as name:
        Path(name, "settings.json").write_text(json.dumps(settings | {"metrics_dir": name}))
        Path(name, "model-settings.json").write_text(json.dumps(model))
        asyncio.run(serve(name))


async def serve(folder: str) -> None:
    """Until it is told to end."""
    read, models = (await load_settings(folder))[:2]
    await mlserver.MLServer(read).start(models)


if __name__ == "__main__":
    main()
