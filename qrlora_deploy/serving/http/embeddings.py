"""`POST /v1/embeddings`: vectors of texts, in the shape of OpenAI's interface, which many clients speak."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora_deploy.errors import MalformedInputError, QrloraError
from qrlora_deploy.serving.answering import Texts
from qrlora_deploy.serving.engine.rows import RowAnswer
from qrlora_deploy.serving.http.classify import customers_of, list_of
from qrlora_deploy.serving.served import ServedModel

FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbeddingsRequest:
    """What is asked.

    Attributes:
        question: the texts.
        customers: one for each.
        model: None: the first one.
        as_base64: vectors as base64 of little-endian fp32; else as numbers.
    """

    question: Texts
    customers: list[str | None]
    model: str | None
    as_base64: bool


def parse_embeddings(record: Mapping[str, Any]) -> EmbeddingsRequest:
    """Read a request; fields that are not ours, such as `user`, are passed over.

    Raises:
        MalformedInputError: a field is missing or of another type, or asks for what is not offered.
    """
    texts = [record["input"]] if isinstance(record.get("input"), str) else list_of(record, "input", str)
    model, form = record.get("model"), record.get("encoding_format") or "float"
    if not isinstance(model, str | None):
        raise MalformedInputError("model must be a text")
    if form not in FORMATS:
        raise MalformedInputError(f"encoding_format must be float or base64, not {form!r:.40}")
    if record.get("dimensions") is not None:
        raise MalformedInputError("dimensions is not offered: vectors are as wide as the model makes them")
    return EmbeddingsRequest(Texts(texts), customers_of(record, len(texts)), model, form == "base64")


def embeddings_answer(model: ServedModel, asked: EmbeddingsRequest, answers: Sequence[RowAnswer]) -> dict[str, Any]:
    """The body of the answer.

    Raises:
        QrloraError: a vector is not finite.
    """
    data = [
        {
            "object": "embedding",
            "index": number,
            "embedding": _written(number, answer.logits, asked.as_base64),
            "customer_digest": answer.digest,
        }
        for number, answer in enumerate(answers)
    ]
    return {"object": "list", "model": model.name, "base_digest": model.bundle.manifest.base_digest, "data": data}


def _written(number: int, vector: np.ndarray, as_base64: bool) -> Any:
    if as_base64:
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    if not np.isfinite(vector).all():
        raise QrloraError(f"the embedding of text {number} is not finite; verify the customer")
    return np.ascontiguousarray(vector)
