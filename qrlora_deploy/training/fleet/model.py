"""The frozen base with a side branch, and where asked an output layer, of every active customer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qrlora_deploy.adapter import resolve_layer
from qrlora_deploy.basis import Basis
from qrlora_deploy.checkpoint import Checkpoint
from qrlora_deploy.errors import InputError
from qrlora_deploy.training.fleet.branch import RowHead, RowValues, attach_rows
from qrlora_deploy.training.fleet.pool import IDS, PackedRows
from qrlora_deploy.training.fleet.table import AdamTable
from qrlora_deploy.training.head import (
    Outputs,
    base_outputs,
    check_not_adapted,
    check_stored,
    draw_weight,
    output_layer,
)
from qrlora_deploy.training.loop import load_tokenizer, mixed_precision, quiet_transformers
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trunk import SplitModel, split_model
from qrlora_deploy.training.upper import Upper

MASK = "attention_mask"


class FleetModel:
    """A base, its tables of `slots` customers, and its trunk where it can be split.

    Args:
        checkpoint: the base, with its task head.
        basis: made from it.
        settings: which head is trained, the seed and the length of texts.
        slots: how many customers are active at once.
        labels: outputs of the largest head of a customer; read where heads are trained.
        device: where everything lives.

    Raises:
        InputError: the base has no usable head, or the basis adapts the output layer that is to be trained.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        basis: Basis,
        settings: TrainSettings,
        slots: int,
        labels: int,
        device: torch.device,
    ) -> None:
        with quiet_transformers():
            self.model = checkpoint.load_model(**base_outputs(checkpoint).options).to(device)
        self.tokenizer = load_tokenizer(checkpoint, self.model, settings.max_length)
        self.device, self.seed = device, settings.seed
        self.values = RowValues()
        paths = [resolve_layer(self.model, name)[0] for name in basis.names]
        self.split = _split(self.model, paths, self.tokenizer.padding_side)
        head = output_layer(self.model) if settings.head == "output" else None
        if head is not None:
            check_not_adapted(head, basis)
        self.scale = attach_rows(self.model, basis, self.values)
        self.u = AdamTable((slots, basis.total_rank), device)
        self.head: dict[str, AdamTable] = {}
        if head is not None:
            self._build_head(checkpoint, head, slots, labels)
        self.limits = torch.zeros(slots, labels, device=device)
        self.upper = self._build_upper() if self.split is not None else None

    @property
    def pad(self) -> dict[str, int]:
        """Id of padding by name of each input with one value a token."""
        known = {IDS: self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {name: known.get(name, 0) for name in self.tokenizer("a") if name != MASK}

    def enter(self, slots: list[int], outputs: list[Outputs]) -> None:
        """Customers begin: coefficients of zero, and output layers as `head.prepare_head` draws them."""
        where = torch.tensor(slots, device=self.device)
        self.u.enter(where, self.u.value.new_zeros(len(slots), self.u.value.shape[1]))
        for slot, output in zip(slots, outputs, strict=True):
            self.limits[slot] = 0.0
            if self.head:
                self.limits[slot, len(output.labels) :] = -torch.inf
                self._enter_head(slot, output)

    @contextmanager
    def precision(self, training: bool) -> Iterator[None]:
        """Run the block with or without gradients, in bf16 on CUDA where that is supported.

        Attention is not left to cuDNN, which PyTorch prefers on Hopper: it builds a plan for each new
        number of rows and length, tens of milliseconds each, and nearly every chunk has new ones.
        """
        with (
            sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]),
            mixed_precision(self.device),
            torch.set_grad_enabled(training),
        ):
            yield

    def trunk(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Hidden states `[rows, length, width]` below the first adapted block.

        Raises:
            RuntimeError: the base cannot be split.
        """
        if self.split is None:
            raise RuntimeError("a base that is not split has no trunk")
        return self.split.trunk(batch)

    def give(self, slots: torch.Tensor, places: torch.Tensor, places_end: int) -> None:
        """Tell the layers whose rows come next.

        Args:
            slots: `[rows]` int64, whose row each is.
            places: `[rows]` int64, which of its customer's rows in this batch it is.
            places_end: one more than the largest of `places`.
        """
        values = self.values
        values.slots, values.places, values.places_end = slots, places, places_end
        values.c = (self.scale * self.u.value).index_select(0, slots)
        for name, table in self.head.items():
            setattr(values, f"head_{name}", table.value)

    def logits_packed(self, rows: PackedRows) -> torch.Tensor:
        """What each row's customer answers, from hidden states without padding.

        Returns:
            `[rows, labels]` fp32; minus infinity for labels that the customer has not.

        Raises:
            RuntimeError: the base is of another kind than BERT's.
        """
        if self.upper is None:
            raise RuntimeError("a base of another kind than BERT's runs on padded rows")
        self.values.token_rows = rows.token_rows
        return self._limited(self.upper(rows.hidden, rows.layout))

    def logits_padded(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> torch.Tensor:
        """The same from a batch of the model's inputs, and what the trunk gave for it where there is one."""
        if self.split is None or hidden is None:
            return self._limited(self.model(**batch).logits)
        return self._limited(self.split.upper(hidden, batch))

    def _limited(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.float() + self.limits[self.values.slots] if self.head else logits.float()

    def step(self, rates: dict[str, torch.Tensor], steps: torch.Tensor) -> None:
        """One step of AdamW for every customer.

        Args:
            rates: `[slots]` learning rates of "coefficients" and "head".
            steps: `[slots]`, how many steps each customer has made with this one.
        """
        self.u.step(rates["coefficients"], steps)
        for table in self.head.values():
            table.step(rates["head"], steps)

    def keep(self, slots: list[int]) -> None:
        """Remember the best epoch of some customers."""
        where = torch.tensor(slots, device=self.device)
        for table in (self.u, *self.head.values()):
            table.keep(where)

    def best(self, slot: int, outputs: Outputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The coefficients `[total_rank]` and the output layer, by tensor name, that were kept last."""
        values = (self.scale * self.u.best[slot]).cpu().numpy()
        # Copies: the next customer of this slot may begin while these are still being written.
        head = {
            f"{self.head_name}.{name}": table.best[slot, : len(outputs.labels)].cpu().numpy().copy()
            for name, table in self.head.items()
        }
        return values, head

    def _build_head(self, checkpoint: Checkpoint, name: str, slots: int, labels: int) -> None:
        layer = self.model.get_submodule(name)
        self.head_name, self.base_head = name, {part: value.detach() for part, value in layer.named_parameters()}
        check_stored([f"{name}.{part}" for part in self.base_head], checkpoint)
        self.values.head_bias = None
        self.head = {
            part: AdamTable((slots, labels, *value.shape[1:]), self.device) for part, value in self.base_head.items()
        }
        self.model.set_submodule(name, RowHead(self.values))

    def _build_upper(self) -> Upper | None:
        """The blocks above the trunk without padding; None where the base is of another kind than BERT's."""
        if self.split is None:
            return None
        # It is held against the model on two rows, which are of one customer then.
        rows = torch.arange(2, device=self.device)
        self.give(torch.zeros_like(rows), rows, 2)
        self.values.c = self.values.c[:1]
        try:
            return Upper(self.split)
        except InputError:
            return None

    def _enter_head(self, slot: int, outputs: Outputs) -> None:
        count, where = len(outputs.labels), torch.tensor([slot], device=self.device)
        for part, table in self.head.items():
            start = torch.zeros(1, *table.value.shape[1:])
            if not outputs.new:
                start[0, :count] = self.base_head[part].cpu()
            elif part == "weight":
                start[0, :count] = draw_weight((count, table.value.shape[2]), self.model.config, self.seed)
            table.enter(where, start.to(self.device))


def _split(model: Any, paths: list[str], padding_side: str) -> SplitModel | None:
    try:
        return split_model(model, paths, padding_side)
    except InputError:
        return None  # the whole model runs in every step: slower, and as right
