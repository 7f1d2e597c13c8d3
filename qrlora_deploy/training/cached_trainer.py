"""A Trainer that takes hidden states of a frozen trunk from a cache and trains what is above it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qrlora_deploy.errors import InputError
from qrlora_deploy.tasks.base import IGNORED, Task
from qrlora_deploy.training.loop import SmallTrainer
from qrlora_deploy.training.precision import halve_frozen, has_bf16, mixed_precision
from qrlora_deploy.training.rows import Rows, texts_of
from qrlora_deploy.training.trunk.cache import TrunkCache, fill_cache
from qrlora_deploy.training.trunk.cuda_graph import GraphedStep, step_gradients
from qrlora_deploy.training.trunk.memory import CacheWish, find_room
from qrlora_deploy.training.trunk.padding_free import packed_layout, padded_layout
from qrlora_deploy.training.trunk.split import SplitModel, split_model
from qrlora_deploy.training.trunk.upper import Upper

LENGTH_STEP = 16
"""On a GPU batches are padded to a multiple of this, so that few graphs serve all of them."""


@dataclass(frozen=True)
class Texts:
    """Tokens of the training rows, then of the evaluation rows.

    Attributes:
        rows: one dict of `input_ids` and so on a row.
        collate: pads rows to a batch.
        padding_side: of these batches.
    """

    rows: Rows
    collate: Callable[[list[Any]], Any]
    padding_side: str


@dataclass(frozen=True)
class CachedModel:
    """The part of a model above its trunk, on cached hidden states.

    Attributes:
        split: the model.
        upper: the same without padding; None where the model is of another kind than BERT's.
        cache: what the trunk answers to each row.
        texts: the rows.
        task: chooses the loss.
    """

    split: SplitModel
    upper: Upper | None
    cache: TrunkCache
    texts: Texts
    task: Task

    def logits(self, numbers: torch.Tensor) -> torch.Tensor:
        """Logits `[n, labels]`, or `[n, length, labels]`, of rows, by their numbers `[n]` int64 on the CPU."""
        with mixed_precision(self.cache.device):
            if self.upper is None:
                batch = self.texts.collate([self.texts.rows[number] for number in numbers.tolist()])
                batch = {name: tensor.to(self.cache.device) for name, tensor in batch.items()}
                return self.split.upper(self.cache.padded(numbers, batch["attention_mask"]), batch)
            if self.cache.device.type == "cpu":
                order = self.cache.lengths(numbers).argsort(stable=True)
                hidden, lengths = self.cache.packed(numbers[order])
                found = self.upper(hidden, packed_layout(lengths))
                return (_in_rows(found, lengths) if self.task.answers_words else found)[order.argsort()]
            length = self.length_of(numbers)
            return self.logits_padded(*self.cache.rectangle(numbers, length), length)

    def logits_padded(self, hidden: torch.Tensor, lengths: torch.Tensor, length: int) -> torch.Tensor:
        """The same on hidden states `[n * length, width]` padded to a length that is known before."""
        if self.upper is None:
            raise RuntimeError("a model of another kind than BERT's runs on whole batches")
        found = self.upper(hidden, padded_layout(lengths, length))
        return found.unflatten(0, (-1, length)) if self.task.answers_words else found

    def length_of(self, numbers: torch.Tensor) -> int:
        """The length to which these rows are padded on a GPU."""
        longest = max(len(self.texts.rows[number]["input_ids"]) for number in numbers.tolist())
        return -(-longest // LENGTH_STEP) * LENGTH_STEP

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch, as `Task.loss`."""
        return self.task.loss(self.beside(logits, labels), labels)

    def beside(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The logits of the tokens that `labels [n, longest]` are of, where words have them: others are padding."""
        return logits[:, : labels.shape[1]] if self.task.answers_words else logits


def _in_rows(logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`[tokens, labels]` of texts one after another as `[rows, longest, labels]`, zero behind each text."""
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    padded = logits.new_zeros(*mask.shape, logits.shape[1])
    padded[mask] = logits
    return padded


def build_cached(model: Any, targets: Sequence[str], texts: Texts, task: Task, wish: CacheWish) -> CachedModel:
    """Split a model and run its trunk over all rows.

    Args:
        model: on its device, with its side branches.
        targets: module paths of the adapted layers.
        texts: every row.
        task: of the model.
        wish: where the cache shall be.

    Raises:
        InputError: the model cannot be split, the cache has no room, or it would save nothing.
        OSError: the disk is full.
    """
    split = split_model(model, targets, texts.padding_side, task.forward)
    device = next(model.parameters()).device
    try:
        upper = Upper(split, task.answers_words)
    except InputError:
        # Another kind of model, whose own forward runs above the trunk.
        if split.first == 0:
            raise
        upper = None
    rows = [{name: value for name, value in row.items() if name != "labels"} for row in texts.rows]
    count = sum(len(row["input_ids"]) for row in rows)
    # Under autocast too, what a block hands on is the fp32 of its last LayerNorm.
    size_bytes = count * model.config.hidden_size * next(model.parameters()).element_size()
    room = find_room(wish.wanted, size_bytes, device, wish.folder)
    if has_bf16(device.type):
        halve_frozen(model)
    with mixed_precision(device):
        cache = fill_cache(split, rows, texts.collate, room, report=wish.report(len(rows)))
    return CachedModel(split, upper, cache, replace(texts, rows=rows), task)


class CachedTrainer(SmallTrainer):
    """Trains on row numbers: `cached` knows the hidden states. Without dropout.

    Args:
        cached: the upper part of the Trainer's model.
    """

    def __init__(self, *args: Any, cached: CachedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cached = cached
        self.trained = list(self.trainable().values())
        on_gpu = cached.cache.device.type == "cuda" and cached.upper is not None
        self.graphs: dict[int, GraphedStep] | None = {} if on_gpu else None
        self.pool = torch.cuda.graph_pool_handle() if on_gpu else None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a batch, which leaves its gradient in the parameters."""
        numbers, labels = inputs["number"], inputs["labels"].to(self.cached.cache.device)
        if self.graphs is not None and len(numbers) == self.args.per_device_train_batch_size:
            loss, gradients = self._replay(self.graphs, numbers, labels)
        else:
            loss, gradients = step_gradients(lambda: self._loss(numbers, labels), self.trained)
        for parameter, gradient in zip(self.trained, gradients, strict=True):
            parameter.grad = gradient
        return loss

    def _loss(self, numbers: np.ndarray, labels: torch.Tensor) -> torch.Tensor:
        return self.cached.loss(self.cached.logits(torch.from_numpy(numbers)), labels)

    def _replay(
        self, graphs: dict[int, GraphedStep], numbers: np.ndarray, labels: torch.Tensor
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        cached, rows = self.cached, torch.from_numpy(numbers)
        length = cached.length_of(rows)
        if cached.task.answers_words:
            labels = functional.pad(labels, (0, length - labels.shape[1]), value=IGNORED)
        inputs = (*cached.cache.rectangle(rows, length), labels)
        if length not in graphs:

            def loss(hidden: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
                with mixed_precision(cached.cache.device):
                    logits = cached.logits_padded(hidden, lengths, length)
                return cached.loss(logits, labels)

            graphs[length] = GraphedStep(loss, inputs, self.trained, self.pool)
        return graphs[length](inputs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss, and the logits where they are wanted."""
        logits = self.cached.logits(torch.from_numpy(inputs["number"]))
        logits = self.cached.beside(logits, inputs["labels"])
        loss = self.cached.loss(logits, inputs["labels"])
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted."""
        return 0


def numbered(rows: Rows, start: int) -> Rows:
    """What the Trainer gets instead of `rows`: the numbers of their texts in the cache, and labels.

    Args:
        rows: of data, with one text each, or two.
        start: the number of texts in the rows before.
    """
    found = []
    for row in rows:
        count = len(texts_of(row))
        found.append({"number": list(range(start, start + count)), "labels": row["labels"]})
        start += count
    return found


def collate_numbers(rows: Rows, padding_side: str = "right") -> dict[str, Any]:
    """Numbers as numpy, which stay on the CPU, all first texts before all second ones; labels as a tensor: `[n]`, or
    `[n, ...]` padded as tokens."""
    numbers = np.array([row["number"] for row in rows], dtype=np.int64).T.reshape(-1)
    labels = [torch.tensor(row["labels"]) for row in rows]
    longest = max(label.numel() for label in labels)
    if any(label.numel() < longest for label in labels):
        gaps = [longest - label.numel() for label in labels]
        sides = [(gap, 0) if padding_side == "left" else (0, gap) for gap in gaps]
        pairs = zip(labels, sides, strict=True)
        labels = [functional.pad(label, side, value=IGNORED) for label, side in pairs]
    return {"number": numbers, "labels": torch.stack(labels)}
