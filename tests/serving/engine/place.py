"""A session that says what it ran, and rows for it."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from qrlora_deploy.errors import QrloraError
from qrlora_deploy.runtime import Bundle, SwitchableSession
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.rows import Load, Row, RowAnswer

WORDS = 30
"""Ids of the tiny model that are no padding begin here."""


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class WatchedSession(SwitchableSession):
    """Keeps what it was asked, and does not begin before `gate` is open."""

    def __init__(self, bundle: Bundle, **options: object) -> None:
        super().__init__(bundle, threads=1, **options)  # type: ignore[arg-type]
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[tuple[dict[str, np.ndarray], list[str | None]]] = []
        self.poison: set[int] = set()
        self.failing = QrloraError("poisoned")

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        assert self.gate.wait(30)
        self.asked.append((inputs, list(customers)))
        if self.poison & set(inputs["input_ids"][:, 1].tolist()):
            raise self.failing
        return super().answer(inputs, customers)


def a_row(length: int, customer: str | None = None, seed: int = 0, second: int | None = None) -> Row:
    """A row of so many tokens; `second` is the id of its second one."""
    ids = np.random.default_rng(seed * 1000 + length).integers(WORDS, WORDS + 20, length)
    if second is not None:
        ids[1] = second
    return Row(
        {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones(length, np.int64),
            "token_type_ids": np.zeros(length, np.int64),
        },
        customer,
    )


def ask(engine: LocalEngine, rows: Sequence[Row], deadline_s: float | None = None) -> "Future[list[RowAnswer]]":
    """Admit and submit."""
    load = Load(len(rows), sum(row.length for row in rows) + 4 * len(rows), sum(row.length for row in rows) * 5)
    return engine.submit(engine.admit(load, [row.customer for row in rows], deadline_s), rows)


def alone(session: SwitchableSession, row: Row, length: int | None = None) -> np.ndarray:
    """What the session itself says to a row, padded to a length: logits of the customer's own labels."""
    length = length or row.length
    inputs = {}
    for name, values in row.inputs.items():
        inputs[name] = np.full((1, length), session.manifest.pad_token_id if name == "input_ids" else 0, np.int64)
        inputs[name][0, : len(values)] = values
    logits, labels = SwitchableSession.predict(session, inputs, [row.customer])
    return logits[0, : len(labels[0])]
