"""What an export is measured by: PyTorch's logits through the side branch, on real text.

The side branch is not what is exported (that is the merged weight), so agreement covers the
merge as well as the graph. Everything runs in fp32 on the CPU, where there is no TF32.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from exporters.onnx.graph import input_names
from qrlora_deploy.data.cutting import cut_texts
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.arithmetic import check_head, plan_folds
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.capacity import max_tokens, padding_reach
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import set_head
from qrlora_deploy.runtime.verification.parity import Case

BATCH = 8
"""Rows of a case: enough for different lengths, few enough for a quick check."""

LONGEST = 1024
"""Tokens of the longest case. PyTorch's scores of a row take the square of it: 8,192 and twelve heads are 3 GB."""

Inputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Texts:
    """The texts of the cases, single or in pairs."""

    texts: Sequence[str]
    pairs: Sequence[str] | None = None


def choose_texts(examples: Examples | None) -> Texts:
    """The first rows of `examples`, or texts that come with the project.

    Raises:
        InputError: there are no texts.
    """
    if examples is None:
        # Imported here: it is only data, but a serving host has no use for it.
        from qrlora_deploy.data.sample import sample_texts

        return Texts(sample_texts()[:BATCH])
    if not examples.texts:
        raise InputError(f"{examples.name} holds no texts to check the export with")
    return Texts(examples.texts[:BATCH], examples.pairs[:BATCH] if examples.pairs else None)


class SideBranches:
    """The base in PyTorch with side branches beside its layers: one model that answers as any customer.

    Args:
        checkpoint: the base.
        basis: made from it.
        texts: of the batches.

    Attributes:
        batches: inputs `[batch, length]` for every way a row can be padded, by name.

    Raises:
        InputError: the tokenizer cannot pad, or the model has no such layers.
    """

    def __init__(self, checkpoint: Checkpoint, basis: Basis, texts: Texts) -> None:
        self.checkpoint, self.basis = checkpoint, basis
        # The plainest attention there is, so that no fused kernel is on both sides of the comparison.
        self.model = checkpoint.load_model(attn_implementation="eager")
        tokenizer = checkpoint.tokenizer()
        names, length = input_names(self.model, tokenizer), max_tokens(self.model, tokenizer)
        self.batches = build_batches(tokenizer, texts, names, length, padding_reach(self.model))
        self._adapters = attach(self.model, basis)
        self._own_head: dict[str, nn.Parameter] = {}

    def check(self, customer: Coefficients) -> None:
        """Make sure that a customer belongs to this base.

        Raises:
            As `merge_model`.
        """
        plan_folds(self.checkpoint, self.basis, customer, self.checkpoint.skeleton())
        check_head(self.checkpoint, customer)

    def answers(self, customer: Coefficients, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
        """Logits `[batch, labels]` of a customer and of the base; both by the customer's own head where it has one,
        so that their difference is the effect of `c` alone."""
        self._use_head(customer.head)
        base = self.logits(np.zeros_like(customer.values), inputs)
        return (self.logits(customer.values, inputs) if customer.values.any() else base), base

    def logits(self, values: np.ndarray, inputs: Inputs) -> np.ndarray:
        """Logits `[batch, labels]` with coefficients `values [total_rank]`, by the head that was used last."""
        set_coefficients(self._adapters, self.basis, values)
        return model_logits(self.model, inputs)

    def _use_head(self, head: Mapping[str, np.ndarray]) -> None:
        for name in head.keys() - self._own_head.keys():
            self._own_head[name] = self.model.get_parameter(name)
        own = {name: nn.Parameter(torch.from_numpy(array)) for name, array in head.items()}
        set_head(self.model, own or self._own_head)


def build_reference(checkpoint: Checkpoint, basis: Basis, customer: Coefficients, texts: Texts) -> list[Case]:
    """Logits of a customer and of the base for batches of every kind of padding.

    Raises:
        As `SideBranches` and its `check`.
    """
    side = SideBranches(checkpoint, basis, texts)
    side.check(customer)
    return [Case(name, inputs, *side.answers(customer, inputs)) for name, inputs in side.batches.items()]


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


def model_logits(model: Any, inputs: Inputs) -> np.ndarray:
    """Logits `[batch, outputs]` fp32 of a PyTorch model."""
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        logits: np.ndarray = model(**tensors).logits.float().numpy()
    return logits
