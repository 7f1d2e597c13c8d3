"""What a base does with a few batches of text: the gradients of its weights, and what goes into its layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DataCollatorWithPadding

from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.rank_rules.seen import Seen, SeenFile
from qrlora_deploy.tasks.answer_rows import answer_rows
from qrlora_deploy.training.batches import collator_for
from qrlora_deploy.training.loop import Progress, explained_failures, load_tokenizer
from qrlora_deploy.training.outputs import Outputs, base_outputs, encode_rows
from qrlora_deploy.training.rows import Rows, build_rows
from qrlora_deploy.training.settings import MAX_COUNT, choose_device


@dataclass(frozen=True)
class Observation:
    """Which batches are looked at.

    Attributes:
        batches: how many; they come from the files in turn.
        batch_size: rows of each, all of one file.
        max_length: tokens of a row that are read.
        seed: of the rows that are drawn.

    Raises:
        InputError: a value is out of range.
    """

    batches: int = 24
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batches", "batch_size", "max_length"):
            if not 1 <= getattr(self, name) <= MAX_COUNT:
                raise InputError(
                    f"{argument(name)} must be at least 1 and at most {MAX_COUNT}, not {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"{argument('seed')} must be between 0 and {2**32 - 1}, not {self.seed}")

    def seen(self, data: Sequence[Examples]) -> Seen:
        """The record of what is looked at.

        Raises:
            InputError: there are fewer batches than files, so that some would not be looked at.
        """
        if not data or self.batches < len(data):
            raise InputError(
                f"{argument('batches', self.batches)} must be at least the number of files, {len(data)}, and there "
                "must be one: each is to be looked at"
            )
        files = tuple(SeenFile(part.name, part.digest, len(part)) for part in data)
        return Seen(files, self.batches, self.batch_size, self.max_length, self.seed)

    def rows(self, parts: Sequence[Rows]) -> Iterator[Rows]:
        """The rows of each batch: every file is read in an order of its own, over and over."""
        random = np.random.default_rng(self.seed)
        orders = [random.permutation(len(part)) for part in parts]
        for batch in range(self.batches):
            part, order = parts[batch % len(parts)], orders[batch % len(parts)]
            start = batch // len(parts) * self.batch_size
            # No row twice in a batch, which is smaller where the file is.
            places = (start + np.arange(min(self.batch_size, len(part)))) % len(part)
            yield [part[row] for row in order[places]]


def check_labels(checkpoint: Checkpoint, data: Sequence[Examples]) -> None:
    """Hold data against the base's head, before anything is computed for `sensitivities`.

    Raises:
        InputError: the base has no head, or one that does not know a label; the line says what can be done.
    """
    outputs = base_outputs(checkpoint)
    for part in data:
        outputs.task.check_rows(part)
        try:
            outputs.task.encode(part, outputs.labels)
        except InputError as error:
            way = "leave such rows out, give the base a head for them by `warmup`, or choose another"
            raise InputError(f"{error}; {way} {argument('spread')}") from error


def sensitivities(
    checkpoint: Checkpoint,
    basis: Basis,
    data: Sequence[Examples],
    observation: Observation,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """The mean square gradient of the loss in each direction of a basis, at the base: a diagonal of the Fisher matrix.

    A direction is `Q_i R_i / ||R_i||`, a change of its weight of norm 1, so that directions of all weights compare and
    the scale of R says nothing. Its gradient in a batch is `Q_i^T G R_i^T / ||R_i||`, with G that of the weight.
    Dropout is off and arithmetic is fp32.

    Args:
        checkpoint: the base, with its task head.
        basis: made from this base, with every direction that there is to choose from.
        data: of one customer each, with labels that the head knows.
        observation: which batches.
        device: "auto", "cpu" or "cuda".
        progress: called with (description, done, total) after each batch.

    Returns:
        `[rank]` fp64 by the target's name.

    Raises:
        InputError: the base has no head, or data have labels that it does not know.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the memory is full.
    """
    outputs = base_outputs(checkpoint)
    watched = _Watched(checkpoint, data, observation, device, outputs)
    layers = {target.name: resolve_layer(watched.model, target.name)[1] for target in basis.targets}
    for layer in layers.values():
        layer.get_parameter("weight").requires_grad_(True)
    found = {target.name: np.zeros(target.rank) for target in basis.targets}
    with explained_failures(checkpoint.folder):
        for done, batch in enumerate(watched.batches(), start=1):
            labels = batch.pop("labels")
            outputs.task.loss(outputs.task.graded(watched.model, batch, labels), labels).backward()
            for target in basis.targets:
                found[target.name] += _squares(layers[target.name], target) / observation.batches
            if progress:
                progress("sensitivity", done, observation.batches)
    return found


def _squares(layer: nn.Module, target: BasisTarget) -> np.ndarray:
    """The square gradient of each direction, `[rank]` fp64; the gradient is taken from the weight."""
    weight = layer.get_parameter("weight")
    gradient, weight.grad = weight.grad, None
    if gradient is None:
        return np.zeros(target.rank)
    gradient = gradient.T if is_conv1d(layer) else gradient
    q, r = (torch.from_numpy(np.asarray(factor)).to(gradient.device, gradient.dtype) for factor in (target.q, target.r))
    norms = r.norm(dim=1).clamp_min(torch.finfo(r.dtype).tiny)
    along = ((q.mT @ gradient) * r).sum(dim=1) / norms
    return along.double().square().cpu().numpy()


def second_moments(
    checkpoint: Checkpoint,
    names: Sequence[str],
    data: Sequence[Examples],
    observation: Observation,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """`E[x x^T]` of what goes into each layer, over the tokens of the batches without padding.

    Args:
        checkpoint: the base, with or without a head.
        names: module paths of the layers.
        data: text of one customer each; labels are not used.
        observation: which batches.
        device: "auto", "cpu" or "cuda".
        progress: called with (description, done, total) after each batch.

    Returns:
        `[in, in]` fp64 by name.

    Raises:
        InputError: a layer is missing.
        ProviderError: CUDA was asked for where there is none.
        QrloraError: the memory is full.
    """
    # Prompts with answers are read as they are trained on; of all else texts alone.
    outputs = base_outputs(checkpoint) if checkpoint.writes_text else None
    watched = _Watched(checkpoint, data, observation, device, outputs)
    sums: dict[str, torch.Tensor] = {}
    counts = dict.fromkeys(names, 0)
    mask: list[torch.Tensor] = []

    def look(name: str, given: torch.Tensor) -> None:
        rows = given[mask[0]] if given.shape[:2] == mask[0].shape else given.reshape(-1, given.shape[-1])
        product = (rows.T @ rows).double()
        sums[name] = sums[name] + product if name in sums else product
        counts[name] += len(rows)

    with explained_failures(checkpoint.folder), torch.inference_mode(), _inputs(watched.model, names, look):
        for done, batch in enumerate(watched.batches(), start=1):
            batch.pop("labels", None)
            mask[:] = [batch["attention_mask"].bool()]
            watched.model(**batch)
            if progress:
                progress("inputs", done, observation.batches)
    return {name: (sums[name] / counts[name]).cpu().numpy() for name in names}


@contextmanager
def _inputs(model: Any, names: Sequence[str], look: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the block `look` is called with every input of each layer."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, given: look(name, given[0])

    hooks = [resolve_layer(model, name)[1].register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Watched:
    """A base on its device, frozen, and the batches that it reads."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        data: Sequence[Examples],
        observation: Observation,
        device: str,
        outputs: Outputs | None,
    ) -> None:
        """`outputs` say what rows are trained towards; None: texts alone are read."""
        self.device = choose_device(device)
        self.observation = observation
        self.model = checkpoint.load_model(**(outputs.options if outputs else {})).requires_grad_(False)
        task = outputs.task if outputs else None
        pairs = any(part.pairs is not None for part in data) and not (task and task.pairs_apart)
        padded = not (task and task.writes_text)
        tokenizer = load_tokenizer(checkpoint, self.model, observation.max_length, pairs, padded=padded)
        self.parts = [_rows(tokenizer, part, observation.max_length, outputs) for part in data]
        self.collate = collator_for(task, tokenizer) if task else DataCollatorWithPadding(tokenizer)
        self.model.to(self.device)

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Each batch on the device."""
        for rows in self.observation.rows(self.parts):
            yield {name: value.to(self.device) for name, value in self.collate(rows).items()}


def _rows(tokenizer: Any, part: Examples, max_length: int, outputs: Outputs | None) -> Rows:
    if outputs is None:
        return build_rows(tokenizer, part, [0] * len(part), max_length)
    targets, _ = encode_rows(outputs, part, None)
    if outputs.task.writes_text:
        return answer_rows(tokenizer, part, max_length).rows
    return build_rows(tokenizer, part, targets, max_length, outputs.task)
