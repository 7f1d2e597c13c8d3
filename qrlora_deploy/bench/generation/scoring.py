"""Accuracy of decoders on customers' own rows: each answer token by token, behind the right ones before it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qrlora_deploy.bench.generation.reading import BundleTokenizer
from qrlora_deploy.bench.generation.subject import DecoderSubject
from qrlora_deploy.bench.report_parts import Accuracy
from qrlora_deploy.data.examples import read_examples
from qrlora_deploy.errors import InputError, QrloraError
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.sessions.runners import open_graph
from qrlora_deploy.runtime.verification.forced import ForcedSteps
from qrlora_deploy.tasks.answer_rows import Row, answer_rows
from qrlora_deploy.tasks.base import IGNORED

BATCH = 8
"""Rows that are answered at once."""


@dataclass(frozen=True)
class Score:
    """As `CausalLM.score` has them: the share of rows whose every token is the likeliest, and the loss of a token."""

    exact_match: float
    nll: float


def measure_answers(subject: DecoderSubject, files: Mapping[str, Path]) -> list[Accuracy]:
    """Exact match and loss of a decoder for every customer it serves; what cannot be measured says why.

    Args:
        subject: open.
        files: of each customer, rows with prompts and answers, or chats.
    """
    session = open_graph(subject.bundle, subject.spec.provider, subject.spec.threads, False)
    return [_measure(subject, session, customer, files[customer]) for customer in _served(subject, files)]


def _served(subject: DecoderSubject, files: Mapping[str, Path]) -> list[str]:
    if subject.served:
        return sorted(files)
    name = subject.bundle.folder.name
    return [name] if name in files else sorted(files) if len(files) == 1 else []


def _measure(subject: DecoderSubject, session: Any, customer: str, file: Path) -> Accuracy:
    nothing = Accuracy(subject=subject.record.name, customer=customer, data=str(file))
    try:
        if subject.served and customer not in subject.customers:
            raise InputError(subject.refused.get(customer, f"no file of {customer} is among the customers"))
        examples = read_examples(file)
        if examples.turns is None:
            raise InputError(f"{file} holds no prompts with completions, and no chats")
        found = answer_rows(BundleTokenizer(subject.bundle.folder), examples, subject.bundle.manifest.max_length)
        own = _score(subject, session, found.rows, customer)
        base = _score(subject, session, found.rows, None) if subject.served else None
    except QrloraError as error:
        return nothing.model_copy(update={"error": str(error)})
    return nothing.model_copy(
        update={
            "rows": len(found.rows),
            "accuracy": own.exact_match,
            "base_accuracy": base.exact_match if base else None,
            "nll": own.nll,
            "base_nll": base.nll if base else None,
        }
    )


def _score(subject: DecoderSubject, session: Any, rows: Sequence[Row], customer: str | None) -> Score:
    """Of all rows. The mean is that of all answers' tokens, as in training."""
    right, losses = [], []
    for batch in _batches(rows):
        further = _customer_inputs(subject, customer, len(batch))
        for whole, nll in _forced(session, batch, further):
            right.append(whole)
            losses.append(nll)
    return Score(float(np.mean(right)), float(np.concatenate(losses).mean()))


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of like lengths together."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(ordered), BATCH):
        yield ordered[start : start + BATCH]


def _customer_inputs(subject: DecoderSubject, customer: str | None, rows: int) -> dict[str, np.ndarray]:
    """The table of one customer, and everybody's slot in it."""
    customers = subject.session.customers
    if customers is None:
        return {}
    held, _versions = customers.rows([customer])
    return {TABLE: held[TABLE], SLOT: np.zeros(rows, np.int64)}


def _forced(session: Any, batch: Sequence[Row], further: Mapping[str, np.ndarray]) -> Iterator[tuple[bool, np.ndarray]]:
    """Of each row whether every answer's token is the likeliest one, and the loss of each."""
    lengths = [len(row["input_ids"]) for row in batch]
    first = min(_first_answer(row) for row in batch)
    ids = np.stack([np.pad(row["input_ids"], (0, max(lengths) - len(row["input_ids"]))) for row in batch])
    targets = np.stack(
        [np.pad(row["labels"], (0, max(lengths) - len(row["labels"])), constant_values=IGNORED) for row in batch]
    )
    steps = ForcedSteps(session, len(batch), max(lengths), further)
    rows = np.arange(len(batch))
    whole, losses = np.ones(len(batch), bool), [list[float]() for _ in batch]
    for place in range(first, max(lengths)):
        # The first piece is what all prompts have in common in length; then a token a step.
        valid = np.full(len(batch), place)
        if place == first:
            logits = steps.run(ids[:, :first], valid, first, rows * first + first - 1)
        else:
            logits = steps.run(ids[:, place - 1 : place], valid, steps.buffer, rows)
        for row in np.flatnonzero(targets[:, place] != IGNORED):
            target = int(targets[row, place])
            losses[row].append(_nll(logits[row], target))
            whole[row] &= int(logits[row].argmax()) == target
    yield from zip(whole.tolist(), map(np.array, losses), strict=True)


def _first_answer(row: Row) -> int:
    """The place of the first token that is looked at, behind at least one token."""
    return next(place for place, label in enumerate(row["labels"]) if place and label != IGNORED)


def _nll(logits: np.ndarray, target: int) -> float:
    values = logits.astype(np.float64)
    top = values.max()
    return float(np.log(np.exp(values - top).sum()) + top - values[target])
