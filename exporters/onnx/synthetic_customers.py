"""Customers for the parity check of a switchable graph: made up, and different in every row of a batch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from exporters.onnx.reference import reference_batches
from exporters.onnx.side_branches import Inputs, SideBranches
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.runtime.bundle.row_layout import (
    HEAD_TABLE,
    SLOT,
    TABLE,
    TABLE_OF,
    HeadLayout,
    TableLayout,
    head_arrays,
)
from qrlora_deploy.runtime.verification.parity import Case, without_padding

SYNTHETIC = 3
"""Customers beside the base: with fewer, a swap of two rows could go unseen."""

MIN_EFFECT = 0.25
"""What a made-up customer's effect on the logits is at least, as a share of the base's logits (root mean
squares over the first texts). Trained customers have 0.19 to 0.26. How far a precision turns the effect
depends on its size, so a weaker customer would be refused for what no user loses, and a stronger
one would hide a loss."""

FIRST_TEXTS = 4
"""Texts on which the strength is measured: it needs no more, and each costs some eight runs of the model."""

SCALES = (0.2, 0.3, 0.45, 0.7, 1.0, 1.5)
"""Mean absolute coefficients that are tried, in this order. At 1 the part of each weight that the basis holds
is doubled or taken away; trained coefficients have 0.4 to 2."""

ALL_TEXTS = "right padding"
"""The case of a reference that holds each text once, as it is served."""


def base_customer(checkpoint: Checkpoint, basis: Basis) -> Coefficients:
    """The base as a customer: all coefficients zero, the base's own head."""
    return Coefficients(
        values=np.zeros(basis.total_rank, dtype=np.float32),
        basis_digest=basis.digest,
        base_name=checkpoint.name,
        base_digest=checkpoint.digest,
        task=checkpoint.task,
        labels=checkpoint.labels,
    )


def synthetic_customers(side: SideBranches, head: HeadLayout | None) -> list[Coefficients]:
    """Customers with seeded coefficients that all differ from zero, about as strong as trained ones.

    With `head` all but the last have an output layer of their own: one of full width and one
    with fewer labels.
    """
    random = np.random.default_rng(20)
    checkpoint = side.prepared.checkpoint
    base = base_customer(checkpoint, side.basis)
    signs = random.choice([-1.0, 1.0], (SYNTHETIC, side.basis.total_rank))
    inputs = {name: array[:FIRST_TEXTS] for name, array in reference_batches(side.prepared)[ALL_TEXTS].items()}
    values = _strengthen(side, signs * random.uniform(0.5, 1.5, signs.shape), inputs)
    return [replace(base, values=row, **_own_head(checkpoint, head, index, random)) for index, row in enumerate(values)]


def _strengthen(side: SideBranches, values: np.ndarray, inputs: Inputs) -> list[np.ndarray]:
    """Each row of `values` by the first of `SCALES` with which it has `MIN_EFFECT` on `inputs`, else by the last.

    A larger scale has a larger effect, so the first one is found by halving.
    """
    base = side.logits(np.zeros(side.basis.total_rank, dtype=np.float32), inputs)

    def is_weak(scaled: np.ndarray) -> bool:
        return bool(np.linalg.norm(side.logits(scaled, inputs) - base) < MIN_EFFECT * np.linalg.norm(base))

    chosen = []
    for row in values:
        scaled = [(scale * row).astype(np.float32) for scale in SCALES]
        first, last = 0, len(SCALES) - 1
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if is_weak(scaled[middle]) else (first, middle)
        chosen.append(scaled[first])
    return chosen


def _own_head(
    checkpoint: Checkpoint, head: HeadLayout | None, index: int, random: np.random.Generator
) -> dict[str, Any]:
    """The fields `head` and `labels` of customer `index`; empty where it has the base's."""
    if head is None or index == SYNTHETIC - 1:
        return {}
    labels = head.labels if index == 0 else max(1, head.labels // 2)
    layer = output_layer(checkpoint.skeleton())
    weight = random.normal(scale=head.features**-0.5, size=(labels, head.features))
    tensors = {f"{layer}.weight": weight, f"{layer}.bias": random.normal(size=labels)}
    own = {name: array.astype(np.float32) for name, array in tensors.items() if name in checkpoint.tensor_files}
    return {"head": own, "labels": tuple(f"label {number}" for number in range(labels))}


def read_base_head(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The base's own output layer, fp32, by tensor name."""
    layer = output_layer(checkpoint.skeleton())
    names = [name for name in (f"{layer}.weight", f"{layer}.bias") if name in checkpoint.tensor_files]
    return {name: checkpoint.read(name).float().numpy() for name in names}


def base_tables(
    checkpoint: Checkpoint, basis: Basis, head: HeadLayout | None, table_dtype: str = "fp32"
) -> dict[str, np.ndarray]:
    """Tables `[1, width]` by input whose only row is the base's."""
    return _tables(checkpoint, basis, [base_customer(checkpoint, basis)], head, table_dtype)


def mixed_reference(
    side: SideBranches, customers: Sequence[Coefficients], head: HeadLayout | None, table_dtype: str = "fp32"
) -> list[Case]:
    """Batches of every kind of padding in which neighbouring rows belong to different customers.

    The base is one of them, in slot 0. Each customer's logits come from side branches in PyTorch that hold its
    coefficients alone, in fp32, so nothing of the table is on that side of the comparison: neither its columns nor the
    rounding of its rows to `table_dtype`. A customer answers the rows that are its own, no others.

    Raises:
        InputError, BasisMismatchError: as `SideBranches.check`.
    """
    checkpoint = side.prepared.checkpoint
    everyone = [base_customer(checkpoint, side.basis), *customers]
    for customer in everyone:
        side.check(customer)
    tables = _tables(checkpoint, side.basis, everyone, head, table_dtype)
    width = head.labels if head is not None else None
    batches = reference_batches(side.prepared)
    return [
        Case(name, inputs | tables | slots, *_mixed_answers(side, everyone, slots[SLOT], inputs, width))
        for index, (name, inputs) in enumerate(batches.items())
        for slots in [_slots(index, inputs, len(everyone))]
    ]


def brought(inputs: Inputs) -> Inputs:
    """Inputs of a switchable graph as those of a per-row one: each row has what its slot of the tables has."""
    slot = inputs[SLOT]
    rows = {name: inputs[table][slot] for name, table in TABLE_OF.items() if table in inputs}
    return {name: array for name, array in inputs.items() if name not in (SLOT, TABLE, HEAD_TABLE)} | rows


def _tables(
    checkpoint: Checkpoint, basis: Basis, everyone: Sequence[Coefficients], head: HeadLayout | None, table_dtype: str
) -> dict[str, np.ndarray]:
    layout = TableLayout(list(basis.ranks.values()), table_dtype)
    tables = {TABLE: np.stack([layout.row(customer.values) for customer in everyone])}
    if head is not None:
        own = read_base_head(checkpoint)
        tables[HEAD_TABLE] = np.stack([head.row(*head_arrays(customer.head or own)) for customer in everyone])
    return tables


def _slots(index: int, inputs: Inputs, customers: int) -> Inputs:
    """The slot of each row of the case `index`: the customers in turn."""
    rows = len(next(iter(inputs.values())))
    # Another beginning in every case: one with a single row must not always be the base's.
    return {SLOT: ((np.arange(rows) + index + 1) % customers).astype(np.int64)}


def _mixed_answers(
    side: SideBranches, everyone: Sequence[Coefficients], slot: np.ndarray, inputs: Inputs, width: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[batch, width]` or `[batch, length, width]` of the customer of each row, and of the base with that
    customer's head; None: as wide as the base answers."""
    parts = []
    for owner in np.unique(slot):
        own = np.flatnonzero(slot == owner)
        parts.append((own, side.answers(everyone[owner], {name: array[own] for name, array in inputs.items()})))
    axes = parts[0][1][0].shape[1:]
    shape = (len(slot), *axes[:-1], width or axes[-1])
    logits, base_logits = (np.full(shape, -np.inf, dtype=np.float32) for _ in range(2))
    for own, answers in parts:
        for kept, found in zip((logits, base_logits), answers, strict=True):
            kept[own, ..., : found.shape[-1]] = found
    return without_padding(logits, inputs), without_padding(base_logits, inputs)
