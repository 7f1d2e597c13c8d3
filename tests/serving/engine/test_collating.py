"""Rows padded to batches as the tokenizer pads them, and the answers of tokens without the padding."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from qrlora_deploy.runtime import Bundle
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder
from qrlora_deploy.runtime.sessions.versions import Version
from qrlora_deploy.serving.engine.collating import Collator
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.rows import Row
from qrlora_deploy.tasks.answering import Answering
from tests.serving.engine.place import a_row, ask
from tests.tiny import SENTENCES

OWN = Answering(("a", "b", "c"), (0.25, 0.5, 0.75))


def padded_on(bundle: Bundle, side: str) -> Bundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"padding_side": side}))


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_those_of_the_tokenizer(bundle: Bundle, side: str) -> None:
    bundle = padded_on(bundle, side)
    encoder = TextEncoder(bundle)
    expected = encoder.encode(list(SENTENCES))
    alone = [encoder.encode([text]) for text in SENTENCES]
    rows = [Row({name: values[0] for name, values in inputs.items()}, None) for inputs in alone]
    assert len({row.length for row in rows}) > 2
    made = Collator(bundle).batch(rows)
    assert made.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(made[name], values)


class Echo:
    """Answers each token by its id, five times; where there are no labels a row by its ids."""

    buckets, table = None, ()

    def __init__(self, bundle: Bundle, answering: Answering = OWN) -> None:
        self.bundle, self.manifest, self.answering = bundle, bundle.manifest, answering

    def answer(
        self, inputs: dict[str, np.ndarray], customers: Sequence[str | None]
    ) -> tuple[np.ndarray, list[Version]]:
        ids = inputs["input_ids"].astype(np.float32)
        logits = np.repeat(ids[:, :, None], 5, axis=2) if self.answering.labels else ids[:, :2]
        return logits, [Version(self.answering, "digest")] * len(customers)

    def lacks(self, customers: Sequence[str | None]) -> list[str]:
        return []

    def bring(self, customers: Sequence[str | None]) -> None:
        raise AssertionError("nobody is lacking")


@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_are_answered_without_the_padding(bundle: Bundle, side: str) -> None:
    with LocalEngine(Echo(padded_on(bundle, side))) as engine:
        rows = [a_row(length, "acme", length) for length in (3, 9, 6)]
        for row, answer in zip(rows, ask(engine, rows).result(30), strict=True):
            np.testing.assert_array_equal(answer.logits, np.repeat(row.inputs["input_ids"][:, None], 3, axis=1))
            assert (answer.answering, answer.digest) == (OWN, "digest")


def test_embeddings_are_answered_whole(bundle: Bundle) -> None:
    with LocalEngine(Echo(bundle, Answering(()))) as engine:
        rows = [a_row(length, "acme", length) for length in (3, 9)]
        for row, answer in zip(rows, ask(engine, rows).result(30), strict=True):
            np.testing.assert_array_equal(answer.logits, row.inputs["input_ids"][:2])
            assert answer.labels == ()
