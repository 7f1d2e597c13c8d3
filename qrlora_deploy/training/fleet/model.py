"""The frozen base with a side branch, and where asked an output layer, of every active customer."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import check_not_adapted, check_stored, draw_weight, output_layer
from qrlora_deploy.tasks.base import IGNORED
from qrlora_deploy.tasks.causal_lm import CausalLM
from qrlora_deploy.training.fleet.adam import AdamTable
from qrlora_deploy.training.fleet.branch import RowHead, RowLinear, RowValues, attach_rows, padded_rank
from qrlora_deploy.training.fleet.shipping import ship
from qrlora_deploy.training.fleet.tokens import IDS, LABELS
from qrlora_deploy.training.forward_only import check_reads_forward
from qrlora_deploy.training.loop import load_tokenizer
from qrlora_deploy.training.outputs import Outputs, base_outputs
from qrlora_deploy.training.precision import halve_frozen, has_bf16, mixed_precision
from qrlora_deploy.training.settings import TrainSettings
from qrlora_deploy.training.trunk.padding_free import Layout
from qrlora_deploy.training.trunk.split import SplitModel, split_decoder, split_model
from qrlora_deploy.training.trunk.upper import Upper

MASK = "attention_mask"
PROBE = "Where is my parcel? It should have come two days ago."
"""What a decoder is tried on."""


@dataclass(frozen=True)
class Learnt:
    """What a customer has learnt.

    Attributes:
        values: `[total_rank]` fp32, its coefficients.
        head: its output layer, by tensor name of the checkpoint; empty where the base's is used.
    """

    values: np.ndarray
    head: dict[str, np.ndarray]

    @property
    def is_finite(self) -> bool:
        """Whether all of it are numbers."""
        return all(bool(np.isfinite(array).all()) for array in (self.values, *self.head.values()))


class FleetModel:
    """A base, its tables of `slots` customers, and its trunk where it can be split.

    Args:
        checkpoint: the base, with its task head.
        basis: made from it.
        settings: which head is trained, the seed and the length of texts.
        slots: how many customers are active at once.
        labels: outputs of the largest head of a customer; read where heads are trained.
        device: where everything lives.

    Attributes:
        pad: id of padding by name of each input with one value a token.
        blocks: how many run in each step; 1 where that is not known.

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
        own = base_outputs(checkpoint)
        self.writes_text = own.task.writes_text
        self.model = checkpoint.load_model(**own.options).to(device)
        self.tokenizer = load_tokenizer(checkpoint, self.model, settings.max_length, padded=not self.writes_text)
        if self.writes_text:
            check_reads_forward(self.model, [{"input_ids": self.tokenizer(PROBE)["input_ids"]}], False)
        self.device, self.seed = device, settings.seed
        self.values = RowValues()
        paths = [resolve_layer(self.model, name)[0] for name in basis.names]
        self.split = _split(self.model, paths, None if self.writes_text else self.tokenizer.padding_side)
        head = output_layer(self.model) if settings.head == "output" else None
        if head is not None:
            check_not_adapted(head, basis)
        self.ranks = [padded_rank(target.rank) for target in basis.targets]
        real = [torch.arange(padded) < target.rank for padded, target in zip(self.ranks, basis.targets, strict=True)]
        self.columns = torch.cat(real).nonzero().squeeze(1).to(device)
        self.scale = attach_rows(self.model, basis, self.values)
        self.u = AdamTable((slots, sum(self.ranks)), device)
        self.head: dict[str, AdamTable] = {}
        if head is not None:
            self._build_head(checkpoint, head, slots, labels)
        self.limits = torch.zeros(slots, max(1, labels), device=device)
        self.upper = None if self.writes_text else self._build_upper()
        # A decoder's head may be its embedding, which is not to be rounded.
        if has_bf16(device.type) and not self.writes_text:
            halve_frozen(self.model, RowLinear)  # after the parts were held against the whole, in fp32
        self.blocks = len(self.split.blocks) - self.split.first if self.split else 1
        if self.writes_text:
            if self.split is None:
                self.blocks = int(self.model.config.get_text_config().num_hidden_layers)
            self.pad = {IDS: 0, LABELS: IGNORED}
            return
        known = {IDS: self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        self.pad = {name: known.get(name, 0) for name in self.tokenizer("a") if name != MASK}

    def enter(self, slots: list[int], outputs: list[Outputs]) -> None:
        """Customers begin: coefficients of zero, and output layers as `head.prepare_head` draws them."""
        where = ship(torch.tensor(slots), self.device)
        self.u.enter(where, self.u.value.new_zeros(len(slots), self.u.value.shape[1]))
        if not self.head:
            return
        counts = ship(torch.tensor([len(output.labels) for output in outputs]), self.device)
        absent = torch.arange(self.limits.shape[1], device=self.device) >= counts[:, None]
        self.limits.index_copy_(0, where, self.limits.new_zeros(absent.shape).masked_fill(absent, -torch.inf))
        for part, table in self.head.items():
            table.enter(where, ship(self._head_starts(part, outputs), self.device))

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
        values.parts = (self.scale * self.u.value).index_select(0, slots).split(self.ranks, 1)
        for name, table in self.head.items():
            setattr(values, f"head_{name}", table.value)

    def logits_packed(self, hidden: torch.Tensor, layout: Layout, token_rows: torch.Tensor) -> torch.Tensor:
        """What each row's customer answers, from hidden states without padding.

        Args:
            hidden: `[tokens, width]` below the first adapted block.
            layout: of these tokens.
            token_rows: `[tokens]` int64, the row of each.

        Returns:
            `[rows, labels]` fp32; minus infinity for labels that the customer has not.

        Raises:
            RuntimeError: the base is of another kind than BERT's.
        """
        if self.upper is None:
            raise RuntimeError("a base of another kind than BERT's runs on padded rows")
        self.values.token_rows = token_rows
        return self._limited(self.upper(hidden, layout))

    def logits_padded(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> torch.Tensor:
        """The same from a batch of the model's inputs, and what the trunk gave for it where there is one.

        Of a decoder it is `CausalLM.row_sums`.
        """
        if self.writes_text:
            return self._row_sums(batch, hidden)
        if self.split is None or hidden is None:
            return self._limited(self.model(**batch).logits)
        return self._limited(self.split.upper(hidden, batch))

    def _row_sums(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> torch.Tensor:
        targets = batch.pop(LABELS)
        with nullcontext() if self.split is None or hidden is None else self.split.given(hidden):
            graded = CausalLM().graded(self.model, batch, targets)
        return CausalLM().row_sums(graded, targets)

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
        where = ship(torch.tensor(slots), self.device)
        for table in (self.u, *self.head.values()):
            table.keep(where)

    def return_to_best(self, slots: list[int]) -> None:
        """Let some customers, who have ended, answer by what was kept last of them."""
        where = ship(torch.tensor(slots), self.device)
        for table in (self.u, *self.head.values()):
            table.return_to_best(where)

    def best(self, slots: list[int], outputs: list[Outputs]) -> list[Learnt]:
        """What was kept last of some customers: all of them at once, as the device is waited for."""
        where = ship(torch.tensor(slots), self.device)
        values = (self.scale * self.u.best.index_select(0, where)).index_select(1, self.columns).cpu().numpy()
        heads = {
            f"{self.head_name}.{name}": table.best.index_select(0, where).cpu().numpy()
            for name, table in self.head.items()
        }
        # Copies, so that one customer's do not keep those of all alive.
        return [
            Learnt(own.copy(), {name: table[row, : len(output.labels)].copy() for name, table in heads.items()})
            for row, (own, output) in enumerate(zip(values, outputs, strict=True))
        ]

    def _build_head(self, checkpoint: Checkpoint, name: str, slots: int, labels: int) -> None:
        layer = self.model.get_submodule(name)
        self.head_name, self.base_head = name, {part: value.detach().cpu() for part, value in layer.named_parameters()}
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
        self.values.parts = tuple(part[:1] for part in self.values.parts)
        try:
            return Upper(self.split)
        except InputError:
            return None

    def _head_starts(self, part: str, outputs: list[Outputs]) -> torch.Tensor:
        """`[customers, labels, ...]` on the CPU, where a parameter of their output layers starts."""
        starts = torch.zeros(len(outputs), *self.head[part].value.shape[1:])
        for start, output in zip(starts, outputs, strict=True):
            count = len(output.labels)
            if not output.new:
                start[:count] = self.base_head[part]
            elif part == "weight":
                start[:count] = draw_weight((count, start.shape[1]), self.model.config, self.seed)
            else:
                start[:count] = output.bias
        return starts


def _split(model: Any, paths: list[str], padding_side: str | None) -> SplitModel | None:
    """The parts of a model; `padding_side` is None of a decoder that writes text."""
    try:
        return split_decoder(model, paths) if padding_side is None else split_model(model, paths, padding_side)
    except InputError:
        return None  # the whole model runs in every step: slower, and as right
