"""What an export is measured by: PyTorch's logits through the side branch, on real text.

The side branch is not what is exported (that is the merged weight), so agreement covers the
merge as well as the graph. Everything runs in fp32 on the CPU, where there is no TF32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from exporters.onnx.prepared import Prepared, Texts
from exporters.onnx.side_branches import Inputs, side_branches
from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.capacity import padding_reach
from qrlora_deploy.runtime.verification.parity import Case, without_padding

LONGEST = 1024
"""Tokens of the longest case. PyTorch's scores of a row take the square of it: 8,192 and twelve heads are 3 GB."""


def build_reference(prepared: Prepared, basis: Basis, customer: Coefficients) -> list[Case]:
    """Logits of a customer and of the base for batches of every kind of padding.

    Raises:
        InputError: the tokenizer cannot pad, or the customer does not fit the base.
        BasisMismatchError: base, basis and customer do not belong together.
    """
    with side_branches(prepared, basis) as side:
        side.check(customer)
        batches = reference_batches(prepared)
        return [
            Case(name, inputs, *(without_padding(logits, inputs) for logits in side.answers(customer, inputs)))
            for name, inputs in batches.items()
        ]


def reference_batches(prepared: Prepared) -> dict[str, Inputs]:
    """Inputs `[batch, length]` of the texts for every way a row can be padded, by name.

    Raises:
        InputError: the tokenizer cannot pad.
    """
    reach = padding_reach(prepared.checkpoint.skeleton())
    return build_batches(prepared.tokenizer, prepared.texts, prepared.input_names, prepared.max_tokens, reach)


def build_batches(
    tokenizer: Any, texts: Texts, names: tuple[str, ...], max_length: int, reach: int | None = None
) -> dict[str, Inputs]:
    """Inputs `[batch, length]` for every way a row can be padded.

    Args:
        max_length: of a row; the longest case has at most `LONGEST` tokens all the same.
        reach: most padding before a text; None: any.

    Raises:
        InputError: the tokenizer has no padding token.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token; set pad_token in its config")
    max_length = min(max_length, LONGEST)
    first, pairs = cut_texts(tokenizer, texts.texts, texts.pairs, max_length)
    encoded = tokenizer(first, pairs, truncation=True, max_length=max_length)
    rows = [{name: encoded[name][index] for name in names if name in encoded} for index in range(len(texts.texts))]
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
    widest = max(len(row["input_ids"]) for row in rows)
    room = max(min(widest + 5, max_length) - widest, 0)
    fill = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}

    def pad(chosen: list[dict[str, list[int]]], left: Callable[[int, int], int], extra: int = 0) -> Inputs:
        width = max(len(row["input_ids"]) for row in chosen) + extra

        def before(index: int, gap: int) -> int:
            return left(index, gap) if reach is None else min(left(index, gap), reach)

        return {
            name: np.array([_pad(row[name], width, before, index, fill[name]) for index, row in enumerate(chosen)])
            for name in names
        }

    holes = pad(rows, lambda index, gap: 0)
    # The first token stays: the models read their answer there, and a row must keep something.
    holes["attention_mask"][:, 2::3] = 0
    repeated = {name: np.resize(np.array(rows[0][name]), (2, max_length)) for name in names}
    # Padding as it is served: models that answer at the last token look for it by the padding token.
    for name in names:
        repeated[name][1, max_length - max_length // 3 :] = fill[name]
    return {
        "single text": pad(rows[:1], lambda index, gap: 0),
        "right padding": pad(rows, lambda index, gap: 0),
        "left padding": pad(rows, lambda index, gap: gap, room),
        "padding on both sides": pad(rows, lambda index, gap: index * gap // len(rows), room),
        "mask with holes": holes,
        "longest input": repeated,
    }


def _pad(values: list[int], width: int, left: Callable[[int, int], int], index: int, fill: int) -> np.ndarray:
    gap = width - len(values)
    before = left(index, gap)
    return np.pad(np.array(values, dtype=np.int64), (before, gap - before), constant_values=fill)
