"""LitServe over the session or over PEFT's mixed batch, with LitServe's own batches.

python -m benchmarks.server.peers.by_litserve PORT PROCESSES
"""

import sys
from typing import Any

import litserve

from benchmarks.server.peers.answering import Answerer, Behind


class Api(litserve.LitAPI):
    """Requests of several rows each meet in a batch."""

    model: Answerer

    def setup(self, device: str) -> None:
        """In the process that runs the model."""
        self.model = Behind.told().open()

    def decode_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """The body as it is."""
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Requests stay apart until they run."""
        return inputs

    def predict(self, x: Any) -> list[Any]:
        """All rows of all requests in one run."""
        texts = [text for request in x for text in request["texts"]]
        owners = [owner for request in x for owner in request["customers"]]
        rows = iter(zip(*self.model.answer(texts, owners), strict=True))
        return [[next(rows) for _ in request["texts"]] for request in x]

    def unbatch(self, output: list[Any]) -> list[Any]:
        """One for each request."""
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        """The body of one request's answer."""
        return {"answers": [{"label": label, "score": score} for label, score in output]}


if __name__ == "__main__":
    behind = Behind.told()
    api = Api(max_batch_size=behind.rows, batch_timeout=behind.wait_ms / 1e3, api_path="/v1/classify")
    # Its own word for the device: the session and PEFT take theirs from what they were told.
    server = litserve.LitServer(api, accelerator="cpu", devices=1, workers_per_device=1, timeout=300)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[1]),
        num_api_servers=int(sys.argv[2]),
        log_level="warning",
        generate_client_file=False,
    )
