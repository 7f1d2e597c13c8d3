"""A server over a model that costs nothing: what is left is the server's own work.

    python benchmarks/server/own_cpu_server.py BUNDLE http|grpc|empty

Tokenising gives a row that was made before, and a run gives zeros; queue, batching, threads, keys and fronts are those
of `serve`. It prints its port and the key that it takes. Every line of its input is answered by its CPU seconds so far.
`empty` is grpc's own aio server with a handler that answers the same bytes to everything: less than that no server
takes that is made of it. It is run by path, so that the project may be that of another checkout.
"""

import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.runtime import SwitchableSession, open_bundle
from qrlora_deploy.runtime.sessions.buckets import Buckets
from qrlora_deploy.serving.access import Keys
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.rows import Row
from qrlora_deploy.serving.http.front import Front
from qrlora_deploy.serving.keys_file import empty_keys, with_key, write_keys
from qrlora_deploy.serving.metrics import Metrics
from qrlora_deploy.serving.served import Models, ServedModel
from qrlora_deploy.serving.server import Server, ServerOptions
from qrlora_deploy.serving.tokenizing import RowTokenizer

TOKENS = 16


class Free:
    """A session whose runs take no time: zeros for everybody.

    Args:
        session: whose customers it has.
    """

    def __init__(self, session: SwitchableSession) -> None:
        self.bundle, self.manifest, self.table = session.bundle, session.manifest, session.table
        self.buckets: Buckets | None = None
        self._logits = np.zeros((4096, len(session.manifest.labels)), np.float32)
        inputs = {name: np.ones((1, TOKENS), np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
        names = {record.name for record in session.manifest.inputs}
        _, self._versions = session.answer({name: inputs[name] for name in inputs if name in names}, [None])

    def answer(self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]) -> tuple[np.ndarray, list[Any]]:
        """Zeros."""
        return self._logits[: len(customers)], self._versions * len(customers)

    def bring(self, customers: Sequence[str | None]) -> None:
        """Everybody is there."""

    def lacks(self, customers: Sequence[str | None]) -> list[str]:
        """Nobody."""
        return []


class FreeTokenizer(RowTokenizer):
    """Gives the same row for every text."""

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None, customers: Sequence[str | None]) -> list[Row]:
        """A row for each text."""
        if not hasattr(self, "_inputs"):
            (row,) = super().rows(["one text"], None, [None])
            self._inputs = {name: np.resize(values, TOKENS) for name, values in row.inputs.items()}
        return [Row(self._inputs, customer) for customer in customers]


def make_keys(folder: Path) -> tuple[Keys, str]:
    """A file of a thousand keys, and one that may ask for everybody."""
    file, _, key = with_key(empty_keys(), ["*"], [])
    record = file.keys[0].model_dump()
    more = [record | {"id": secrets.token_hex(6), "hash": secrets.token_hex(32)} for _ in range(999)]
    file = type(file)(**file.model_dump() | {"keys": [record, *more]})
    write_keys(file, folder / "keys.json")
    return Keys.open(folder / "keys.json"), key


def answer_lines() -> None:
    """CPU seconds for each line."""
    for _ in sys.stdin:
        print(time.process_time(), flush=True)


def run_empty() -> None:
    """grpc alone, in the event loop that `serve` has."""
    import grpc
    import uvloop

    from qrlora_deploy.serving.grpc.schema import ModelInferResponse

    message = ModelInferResponse(model_name="bundle", model_version="1")
    message.outputs.add(name="label", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"LABEL_0")
    answer = message.SerializeToString()

    async def handle(body: bytes, context: Any) -> bytes:
        return answer

    class Handlers(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            return grpc.unary_unary_rpc_method_handler(handle)

    async def serve() -> None:
        server = grpc.aio.server(handlers=(Handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, "none", flush=True)
        threading.Thread(target=answer_lines, daemon=True).start()
        await server.wait_for_termination()

    uvloop.run(serve())


def main() -> None:
    """Command line of this script."""
    if sys.argv[2] == "empty":
        run_empty()
        return
    with tempfile.TemporaryDirectory() as name:
        run(Path(sys.argv[1]), sys.argv[2], Path(name))


def run(folder: Path, kind: str, keys_folder: Path) -> None:
    """The server of a bundle."""
    bundle = open_bundle(folder)
    keys, key = make_keys(keys_folder)
    engine = LocalEngine(Free(SwitchableSession(bundle, threads=1)))
    models = Models([ServedModel("bundle", bundle, engine, FreeTokenizer(bundle))])
    front = Front(models, keys=keys, metrics=Metrics(list(models)))
    companions: list[Any] = []
    if kind == "grpc":
        from qrlora_deploy.serving.grpc.server import GrpcServer
        from qrlora_deploy.serving.grpc.service import InferenceService

        service = InferenceService(models, front.life, keys, front.metrics, counts=front.counts)
        companions.append(GrpcServer(service))
    server = Server(front, ServerOptions(port=0), companions=companions)

    def started() -> None:
        print((companions[0] if companions else server.http).port, key, flush=True)
        threading.Thread(target=answer_lines, daemon=True).start()

    server.run(started)


if __name__ == "__main__":
    main()
