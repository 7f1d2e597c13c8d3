"""A client over gRPC, whose answers are checked like those of HTTP."""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from benchmarks.server_soak.place import CUSTOMERS, Known, Place, name_of
from benchmarks.server_soak.told import Checker, Given, Told, now
from qrlora_deploy.serving.grpc.schema import SERVICE, ModelInferRequest, ModelInferResponse

AT_ONCE = 16
TELL_S = 1.0
AGAIN_S = 0.1
LATE_S = 60.0

BUSY = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


class Channel:
    """The server that the address names, and its calls that have not ended."""

    def __init__(self, port: int) -> None:
        self.port, self.open = port, 0
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.infer = self.channel.unary_unary(
            f"/{SERVICE}/ModelInfer",
            request_serializer=ModelInferRequest.SerializeToString,
            response_deserializer=ModelInferResponse.FromString,
        )


class Client:
    """Asks at a rate.

    Args:
        place: of the soak.
        seed: of its questions.
        rate: calls a second.
    """

    def __init__(self, place: Place, seed: int, rate: float) -> None:
        self._place, self._rate, self._known = place, rate, Known.of(place.folder)
        self._random = np.random.default_rng(seed)
        self.told = Told(place.folder / "told" / f"grpc-{seed}.json")
        self._checker = Checker(self._known, place.replaced_s(), self.told)
        self._channel: Channel | None = None
        self._turns = asyncio.Semaphore(AT_ONCE)

    async def run(self, seconds: float) -> None:
        """Ask for so long."""
        start_s, told_s, begun = now(), 0.0, 0
        calls: set[asyncio.Task[None]] = set()
        while now() < start_s + seconds:
            for _ in range(int((now() - start_s) * self._rate) - begun):
                await self._turns.acquire()
                call = asyncio.create_task(self._ask())
                calls.add(call)
                call.add_done_callback(calls.discard)
                begun += 1
            if now() > told_s + TELL_S:
                self.told.write()
                told_s = now()
            await asyncio.sleep(1 / self._rate)
        if calls:
            _, late = await asyncio.wait(calls, timeout=LATE_S)
            self.told.add("lost at the end", len(late))
        self.told.write()

    async def _ask(self) -> None:
        text, customer = int(self._random.integers(len(self._known.texts))), int(self._random.integers(CUSTOMERS))
        request = self._request(text, customer)
        metadata = (("authorization", f"Bearer {self._known.keys[customer]}"),)
        self.told.add("asked")
        try:
            while True:
                channel, begun_s = await self._current(), now()
                channel.open += 1
                try:
                    reply = await channel.infer(request, metadata=metadata, timeout=LATE_S)
                    break
                except grpc.aio.AioRpcError as error:
                    self._failed(error)
                    await asyncio.sleep(AGAIN_S)
                finally:
                    channel.open -= 1
            self.told.add("gRPC: OK")
            self.told.add("answered")
            logits = np.frombuffer(reply.raw_output_contents[0], "<f4")
            digest = reply.raw_output_contents[1][4:].decode()
            self._checker.check([text], [customer], [Given(digest, logits)], begun_s)
        finally:
            self._turns.release()

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        name, trailing = error.code().name, dict(error.trailing_metadata() or ())
        self.told.add(f"gRPC: {name}")
        if error.code() not in BUSY or "retry-after" not in trailing:
            self.told.fault(f"unexplained: gRPC {name}", error.details())

    def _request(self, text: int, customer: int) -> Any:
        request = ModelInferRequest(model_name="bundle")
        request.parameters["customer"].string_param = name_of(customer)
        request.inputs.add(name="text", datatype="BYTES", shape=[1])
        raw = self._known.texts[text].encode()
        request.raw_input_contents.append(len(raw).to_bytes(4, "little") + raw)
        for name in ("logits", "digest"):
            request.outputs.add(name=name)
        return request

    async def _current(self) -> Channel:
        port = json.loads(self._place.address.read_text())["grpc"]
        if self._channel is None or self._channel.port != port:
            before, self._channel = self._channel, Channel(port)
            if before is not None:
                asyncio.create_task(_close(before))
        return self._channel


async def _close(channel: Channel) -> None:
    """Let go of a channel when its calls have ended."""
    while channel.open:
        await asyncio.sleep(AGAIN_S)
    await channel.channel.close()


async def ask(place: Path, seed: int, rate: float, seconds: float) -> None:
    """Ask within an event loop, which gRPC wants to be there when its channels are made."""
    await Client(Place(place), seed, rate).run(seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, required=True, help="calls a second")
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    asyncio.run(ask(options.place, options.seed, options.rate, options.seconds))


if __name__ == "__main__":
    main()
