"""Requests of a storm: valid ones, whose answers are known, and hostile ones, which may have no answer."""

import gzip
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.serving.grpc import client as grpc_client

SENTENCES = ("play some music", "what is the weather", "book a table for two tonight", "a", "where is my parcel? " * 8)
UNKNOWN = ("nobody", "acme2", "Acme", "x" * 128)
NO_IDS = ("../bundle", "a/b", ".acme", "x" * 129, "acme\0", "é")
INFER = "/v2/models/bundle/infer"

Expected = Mapping[tuple[str | None, str], Mapping[str, np.ndarray]]
"""Logits by text, by customer and digest; the base is None with the digest ''."""


@dataclass
class Tally:
    """What came of the requests.

    Attributes:
        codes: how often each came, over "http" and "grpc".
        rows: answers that were compared.
        seen: customers and digests that have answered.
        wrong: what must not be, in words.
    """

    codes: dict[tuple[str, str], int] = field(default_factory=dict)
    rows: int = 0
    seen: set[tuple[str | None, str]] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def count(self, over: str, code: object) -> None:
        self.codes[over, str(code)] = self.codes.get((over, str(code)), 0) + 1


@dataclass(frozen=True)
class Rows:
    """A valid question: a text and a customer for each row."""

    texts: Sequence[str]
    customers: Sequence[str | None]

    @classmethod
    def random(cls, chance: random.Random, names: Sequence[str | None]) -> "Rows":
        count = chance.choice((1, 1, 1, 2, 5, 17))
        return cls(chance.choices(SENTENCES, k=count), chance.choices(names, k=count))

    def as_json(self, binary: bool) -> bytes:
        """For HTTP; the outputs in binary or as JSON."""
        names = [name or "" for name in self.customers]
        inputs = [
            {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": data}
            for name, data in (("text", list(self.texts)), ("customer", names))
        ]
        outputs = [{"name": name, "parameters": {"binary_data": binary}} for name in ("logits", "digest")]
        return json.dumps({"inputs": inputs, "outputs": outputs}).encode()

    def as_message(self, raw: bool) -> Any:
        """For gRPC."""
        names = [name or "" for name in self.customers]
        if raw:
            tensors = [("text", "BYTES", [len(names)], grpc_client.raw_texts(self.texts))]
            tensors.append(("customer", "BYTES", [len(names)], grpc_client.raw_texts(names)))
            found = grpc_client.raw_request(tensors, outputs=("logits", "digest"))
        else:
            tensors = [grpc_client.texts(self.texts), grpc_client.texts(names, "customer")]
            found = grpc_client.request(tensors, ("logits", "digest"))
        found.model_name = "bundle"
        return found

    def compare(self, logits: np.ndarray, digests: Sequence[str], expected: Expected, tally: Tally) -> None:
        """Hold each row against the version whose digest it has."""
        if len(logits) != len(self.texts) or len(digests) != len(self.texts):
            tally.wrong.append(f"{len(logits)} answers to {len(self.texts)} rows")
            return
        for text, customer, row, digest in zip(self.texts, self.customers, logits, digests, strict=True):
            known = expected.get((customer, digest))
            if known is None:
                tally.wrong.append(f"{customer} was answered by {digest!r}, which is no version of it")
            # Others may be in the batch: of fp32 the last bits may differ.
            elif not np.allclose(row[: len(known[text])], known[text], rtol=1e-4, atol=1e-4):
                tally.wrong.append(f"{customer}, {digest}, {text!r}: {row} and not {known[text]}")
            tally.rows += 1
            tally.seen.add((customer, digest))


def logits_of_json(content: bytes) -> tuple[np.ndarray, list[str]]:
    """Of an answer in JSON."""
    outputs = {it["name"]: it for it in json.loads(content)["outputs"]}
    logits = np.array(outputs["logits"]["data"], dtype=np.float32).reshape(outputs["logits"]["shape"])
    return logits, outputs["digest"]["data"]


def logits_of_binary(content: bytes, head: int) -> tuple[np.ndarray, list[str]]:
    """Of an answer with binary outputs."""
    outputs, rest = {it["name"]: it for it in json.loads(content[:head])["outputs"]}, content[head:]
    size = outputs["logits"]["parameters"]["binary_data_size"]
    logits = np.frombuffer(rest[:size], "<f4").reshape(outputs["logits"]["shape"])
    return logits, [raw.decode() for raw in grpc_client._split(rest[size:])]


Http = tuple[str, str, bytes, dict[str, str]]
"""Method, path, body and headers."""


def hostile_http(chance: random.Random) -> Http:
    """A request that no server should answer well, or fall over."""
    good = Rows.random(chance, ("acme", None)).as_json(chance.random() < 0.5)
    return chance.choice(HOSTILE)(chance, good)


def _changed(chance: random.Random, good: bytes) -> Http:
    body = bytearray(good)
    for _ in range(chance.randint(1, 6)):
        place = chance.randrange(len(body))
        action = chance.randrange(3)
        if action == 0:
            body[place] = chance.randrange(256)
        elif action == 1:
            del body[place : place + chance.randint(1, 20)]
        else:
            body[place:place] = bytes(chance.choices(b'[]{}",:0-9\\\xff\x00', k=3))
        if not body:
            break
    return "POST", INFER, bytes(body), {}


def _of_nobody(chance: random.Random, good: bytes) -> Http:
    customer = chance.choice(UNKNOWN + NO_IDS)
    return "POST", "/v1/classify", json.dumps({"texts": ["a"], "customer": customer}).encode(), {}


def _of_a_shape(chance: random.Random, good: bytes) -> Http:
    record = json.loads(good)
    record["inputs"][0]["shape"] = chance.choice(([0], [-1], [2**62], [1, 2, 3], [], ["1"], None, [1e9], 7))
    return "POST", INFER, json.dumps(record).encode(), {}


def _of_lying_sizes(chance: random.Random, good: bytes) -> Http:
    record = json.loads(good)
    record["inputs"][0].pop("data")
    record["inputs"][0]["parameters"] = {"binary_data_size": chance.choice((0, 5, 2**40, -1, "x", None, 10**30))}
    head = json.dumps(record).encode()
    said = chance.choice((len(head), len(head) + 99, -1, "x", 2**70, 0))
    return "POST", INFER, head + bytes(chance.randrange(40)), {"inference-header-content-length": str(said)}


def _packed(chance: random.Random, good: bytes) -> Http:
    body = chance.choice((good, gzip.compress(good)[:-9], b"", gzip.compress(good) + b"more"))
    return "POST", INFER, body, {"content-encoding": chance.choice(("gzip", "deflate", "br", "gzip, gzip"))}


def _elsewhere(chance: random.Random, good: bytes) -> Http:
    paths = ("/", INFER, "/v2/models/none/infer", "/v2/models/bundle/versions/9/infer", "/..%2f..%2fetc/passwd", "/%00")
    return chance.choice(("GET", "POST", "DELETE", "PATCH")), chance.choice(paths), b"", {}


def _deep(chance: random.Random, good: bytes) -> Http:
    depth = chance.choice((10, 1000, 50_000))
    return "POST", chance.choice((INFER, "/v1/classify")), b"[" * depth + b"]" * depth, {}


def _large(chance: random.Random, good: bytes) -> Http:
    texts = chance.choice((["a"] * 5000, ["x " * 200_000], [], [None], [5], ["\ud800"], "text"))
    return "POST", "/v1/classify", json.dumps({"texts": texts}).encode(), {}


def _of_headers(chance: random.Random, good: bytes) -> Http:
    headers = chance.choice(
        (
            {"x-request-timeout-ms": chance.choice(("0", "-1", "nan", "1e400", "x"))},
            {"x-request-id": "a b\x7f" * 40},
            {"authorization": "Bearer qd_x_y"},
            {"content-type": "text/plain; charset=utf-16"},
            {"traceparent": "00-zz-zz-01"},
            {"accept-encoding": "gzip;q=x, *;q=0"},
        )
    )
    return "POST", "/v1/classify", b'{"texts": ["a"], "customer": "nobody"}', headers


HOSTILE: tuple[Callable[[random.Random, bytes], Http], ...] = (
    _changed,
    _changed,
    _of_nobody,
    _of_a_shape,
    _of_lying_sizes,
    _packed,
    _elsewhere,
    _deep,
    _large,
    _of_headers,
)


def hostile_message(chance: random.Random) -> Any:
    """For gRPC: bytes or a message."""
    good = Rows.random(chance, ("acme", None)).as_message(raw=True)
    action = chance.randrange(5)
    if action == 0:
        body = bytearray(good.SerializeToString())
        for _ in range(chance.randint(1, 6)):
            body[chance.randrange(len(body))] = chance.randrange(256)
        return bytes(body)
    if action == 1:
        good.raw_input_contents[0] = good.raw_input_contents[0][: chance.randrange(4)]
    elif action == 2:
        good.inputs[0].shape[:] = chance.choice(([], [-1], [2**62], [0], [3, 3]))
    elif action == 3:
        good.model_name = chance.choice(("none", "", "../bundle"))
    else:
        good.raw_input_contents[1] = grpc_client.raw_texts([chance.choice(UNKNOWN + NO_IDS)])
    return good
