"""Requests of many kinds, what may come back for each, and how an answer is read."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.server_soak.place import CUSTOMERS, Known, name_of
from benchmarks.server_soak.told import Given

SHARES = {
    "classify one": 0.56,
    "classify four": 0.10,
    "infer": 0.10,
    "infer binary": 0.08,
    "many customers": 0.05,
    "short of time": 0.02,
    "not its customer": 0.03,
    "nobody's customer": 0.02,
    "no key": 0.02,
    "not JSON": 0.02,
}
"""Of all requests."""

EXPECTED = {"not its customer": 404, "nobody's customer": 404, "no key": 401, "not JSON": 400}
"""The one status of what is refused by right; others are answered by 200."""

BUSY = (429, 503)
"""Refusals after which a client asks again; the server says when."""


@dataclass(frozen=True)
class Question:
    """A request.

    Attributes:
        kind: of `SHARES`.
        request: its bytes.
        texts: numbers of its rows.
        customers: of the rows; `CUSTOMERS` is the base.
        read: from headers and body to the answers of the rows.
    """

    kind: str
    request: bytes
    texts: Sequence[int]
    customers: Sequence[int]
    read: "Callable[[bytes, bytes], list[Given]]"

    def may_be(self, status: int) -> bool:
        """Whether a status is one of those that it may be answered by, but for a busy server's."""
        return status == EXPECTED.get(self.kind, 200) or (self.kind == "short of time" and status == 504)


class Asker:
    """Makes questions.

    Args:
        known: texts and keys.
        seed: of the choice.
    """

    def __init__(self, known: Known, seed: int) -> None:
        self._known, self._random = known, np.random.default_rng(seed)
        self._kinds, self._shares = list(SHARES), list(SHARES.values())

    def questions(self, count: int) -> list[Question]:
        """Some, of all kinds."""
        return [self._question(str(kind)) for kind in self._random.choice(self._kinds, count, p=self._shares)]

    def _question(self, kind: str) -> Question:
        known, random = self._known, self._random
        rows = {"classify four": 4, "many customers": 8}.get(kind, 1)
        texts = random.integers(len(known.texts), size=rows).tolist()
        customers = [int(random.integers(CUSTOMERS))] * rows
        key = known.keys[customers[0]]
        if kind == "many customers":
            customers, key = random.integers(CUSTOMERS + 1, size=rows).tolist(), known.keys[-1]
        names = [name_of(customer) if customer < CUSTOMERS else None for customer in customers]
        if kind == "not its customer":
            names = [name_of((customers[0] + 1) % CUSTOMERS)]
        if kind == "nobody's customer":
            names, key = ["nobody"], known.keys[-1]
        if kind.startswith("infer"):
            return self._infer(kind, texts, customers, names[0] or "", key)
        record: dict[str, Any] = {"texts": [known.texts[text] for text in texts], "customers": names}
        body = b'{"texts": [' if kind == "not JSON" else json.dumps(record).encode()
        more = ["x-request-timeout-ms: 3"] if kind == "short of time" else []
        head = _head("/v1/classify", len(body), "" if kind == "no key" else key, more)
        return Question(kind, head + body, texts, customers, read_classify)

    def _infer(self, kind: str, texts: list[int], customers: list[int], name: str, key: str) -> Question:
        is_binary = kind == "infer binary"
        data = [self._known.texts[text] for text in texts]
        outputs = [{"name": "logits", "parameters": {"binary_data": is_binary}}, {"name": "digest"}]
        record = {
            "id": str(texts[0]),
            "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": data}],
            "outputs": outputs,
            "parameters": {"customer": name},
        }
        body = json.dumps(record).encode()
        return Question(kind, _head("/v2/models/bundle/infer", len(body), key) + body, texts, customers, read_infer)


def _head(path: str, length: int, key: str, more: Sequence[str] = ()) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: s", f"Content-Length: {length}", *more]
    if key:
        lines.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*lines, "", ""]).encode()


def read_classify(head: bytes, body: bytes) -> list[Given]:
    """Of `/v1/classify`."""
    return [Given(row["customer_digest"], score=row["score"]) for row in json.loads(body)["answers"]]


def read_infer(head: bytes, body: bytes) -> list[Given]:
    """Of the protocol, in JSON or with binary logits."""
    mark = b"inference-header-content-length:"
    found = head.lower().find(mark)
    length = len(body) if found < 0 else int(head[found + len(mark) :].split(b"\r\n", 1)[0])
    outputs = {output["name"]: output for output in json.loads(body[:length])["outputs"]}
    raw = body[length:]
    logits = outputs["logits"]
    values = np.array(logits["data"], np.float32) if found < 0 else np.frombuffer(raw, "<f4")
    rows = values.reshape(logits["shape"])
    return [Given(digest, row) for digest, row in zip(outputs["digest"]["data"], rows, strict=True)]
