"""`POST /v1/classify`: texts in plain JSON, answers in plain JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qrlora_deploy.errors import MalformedInputError, QrloraError
from qrlora_deploy.serving.answering import Texts
from qrlora_deploy.serving.engine.rows import RowAnswer
from qrlora_deploy.serving.inference.questions import owners
from qrlora_deploy.serving.served import ServedModel

FIELDS = ("texts", "pairs", "customer", "customers", "model")


def parse_classify(record: Mapping[str, Any]) -> tuple[Texts, list[str | None], str | None]:
    """What is asked, the customer of each text, and the model; None: the first one.

    Raises:
        MalformedInputError: a field is missing, unknown or of another type.
    """
    unknown = [name for name in record if name not in FIELDS]
    if unknown:
        raise MalformedInputError(f"there is no field {unknown[0]!r:.60}; choose from {', '.join(FIELDS)}")
    texts = list_of(record, "texts", str)
    pairs = list_of(record, "pairs", str) if record.get("pairs") is not None else None
    model = record.get("model")
    if not isinstance(model, str | None):
        raise MalformedInputError("model must be a text")
    return Texts(texts, pairs), customers_of(record, len(texts)), model


def customers_of(record: Mapping[str, Any], rows: int) -> list[str | None]:
    """The customer of each row, by `customer` or `customers`.

    Raises:
        MalformedInputError: they are no names, or another number.
    """
    one = record.get("customer")
    if record.get("customers") is None:
        if not isinstance(one, str | None):
            raise MalformedInputError("customer must be a text")
        return [one or None] * rows
    if one is not None:
        raise MalformedInputError("give customer for all texts or customers with one for each, not both")
    return owners(list_of(record, "customers", (str, type(None))), rows)


def list_of(record: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> list[Any]:
    """A field that is a list of texts.

    Raises:
        MalformedInputError: it is none.
    """
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(item, kind) for item in found):
        raise MalformedInputError(f"{name} must be a list of texts")
    return found


def classify_answer(model: ServedModel, customers: Sequence[str | None], answers: Sequence[RowAnswer]) -> Any:
    """The body of the answer.

    Raises:
        QrloraError: a row's numbers are not finite.
    """
    return {
        "model": model.name,
        "base_digest": model.bundle.manifest.base_digest,
        "answers": [
            _one(model, number, customer, answer)
            for number, (customer, answer) in enumerate(zip(customers, answers, strict=True))
        ],
    }


def _one(model: ServedModel, number: int, customer: str | None, given: RowAnswer) -> dict[str, Any]:
    answer = given.answering.answer(model.task, given.logits, given.words)
    # NaN is unequal to itself, and infinite numbers less themselves are NaN.
    if answer.score - answer.score != 0:
        raise QrloraError(f"the answer to text {number} is not finite; verify the customer")
    found: dict[str, Any] = {
        "label": answer.label,
        "score": answer.score,
        "labels": list(answer.labels),
        "customer": customer,
        "customer_digest": given.digest,
    }
    if model.task.answers_words:
        found["spans"] = [asdict(span) for span in answer.spans]
    return found
