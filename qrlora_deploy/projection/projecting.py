"""A LoRA or a tuned checkpoint as a customer of a basis."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.adapter import resolve_layer
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.head import output_layer
from qrlora_deploy.models.targets import is_conv1d
from qrlora_deploy.projection.least_squares import DenseUpdate, Held, Update, hold
from qrlora_deploy.projection.lora_folder import is_lora_folder, read_lora
from qrlora_deploy.projection.tuned import changes


@dataclass(frozen=True)
class Projection:
    """A customer that comes as close to an update as its basis allows.

    Attributes:
        customer: the result.
        share: of the update's squared norm that the coefficients hold; 1 for an update of nothing.
        targets: the same for each target that was updated.
        left_out: what the basis has no target for, with its share of the squared norm of the whole update.
    """

    customer: Coefficients
    share: float
    targets: Mapping[str, float]
    left_out: Mapping[str, float]


@dataclass
class Tally:
    """Coefficients and energies, gathered target by target."""

    basis: Basis
    held: dict[str, Held] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)

    def projection(self, customer: Coefficients) -> Projection:
        """The outcome, in which `customer` gets the coefficients.

        Raises:
            InputError: a coefficient does not fit fp32.
        """
        parts = [
            self.held[name].values if name in self.held else np.zeros(rank) for name, rank in self.basis.ranks.items()
        ]
        with np.errstate(over="ignore"):
            values = np.concatenate(parts).astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError("the update has coefficients that do not fit fp32")
        whole = sum(one.energy for one in self.held.values()) + sum(self.lost.values())
        held = sum(one.held for one in self.held.values())
        return Projection(
            replace(customer, values=values),
            _share(held, whole),
            {name: _share(one.held, one.energy) for name, one in self.held.items()},
            {name: energy / whole for name, energy in self.lost.items() if energy},
        )


def project(source: Path, checkpoint: Checkpoint, basis: Basis, labels: Sequence[str] = ()) -> Projection:
    """The customer of `basis` whose update comes closest to that of `source`, by least squares.

    Args:
        source: a LoRA folder of PEFT, or the folder of a checkpoint that was tuned from the base.
        checkpoint: the base of both.
        basis: of the base.
        labels: names of the outputs of a LoRA's own head, which its folder does not say; empty: the base's.

    Raises:
        InputError: `source` is neither, is no change of this base, or changes what no customer can have.
        BasisMismatchError: the basis was made from other weights.
        FileFormatError: the LoRA is damaged.
    """
    check_basis_fits(checkpoint, basis)
    checkpoint.require_task_head()
    if is_lora_folder(source):
        return _project_lora(source, checkpoint, basis, tuple(labels))
    tuned = open_checkpoint(str(source))
    if labels:
        raise InputError(f"{source} is a checkpoint, which names its own labels; leave {argument('labels')} out")
    return _project_tuned(tuned, checkpoint, basis)


def _project_lora(source: Path, checkpoint: Checkpoint, basis: Basis, labels: tuple[str, ...]) -> Projection:
    lora, model, tally = read_lora(source), checkpoint.skeleton(), Tally(basis)
    targets = {resolve_layer(model, target.name)[0]: target for target in basis.targets}
    for name, update in lora.updates.items():
        path, layer = resolve_layer(model, name)
        _check_shape(source, path, layer, update)
        _add(source.name, tally, targets.get(path), path, update)
    head = _head_of(source, checkpoint, lora.others)
    outputs = len(next(iter(head.values()))) if head else len(checkpoint.labels)
    same = all(_is(checkpoint, name, lora.others[name]) for name in head)
    labels = labels or checkpoint.labels
    if len(labels) != outputs:
        raise InputError(f"{source} answers with {outputs} outputs; name them by {argument('labels')}")
    origin = {"kind": "lora", "name": source.name, "digest": lora.digest}
    own = {} if same and labels == checkpoint.labels else head
    return _finished(tally, checkpoint, checkpoint.task, labels, own, origin)


def _project_tuned(tuned: Checkpoint, checkpoint: Checkpoint, basis: Basis) -> Projection:
    tuned.require_task_head()
    tally, heads, model = Tally(basis), _head_names(checkpoint), checkpoint.skeleton()
    targets = {checkpoint.tensor_of(target.name): target for target in basis.targets}
    for name, delta in changes(checkpoint, tuned, heads):
        target = targets.get(name)
        turned = target is not None and is_conv1d(resolve_layer(model, target.name)[1])
        _add(tuned.name, tally, target, name, DenseUpdate(delta.T if turned else delta))
    head = {name: tuned.read(name).float().numpy() for name in heads if name in tuned.stored}
    same = all(name in tuned.stored and _equal(checkpoint, tuned, name) for name in heads)
    origin = {"kind": "checkpoint", "name": tuned.folder.name, "digest": tuned.digest}
    return _finished(tally, checkpoint, tuned.task, tuned.labels, {} if same else head, origin)


def _equal(checkpoint: Checkpoint, tuned: Checkpoint, name: str) -> bool:
    return checkpoint.tensor_digest(name) == tuned.tensor_digest(name)


def _add(source: str, tally: Tally, target: BasisTarget | None, name: str, update: Update) -> None:
    with np.errstate(all="ignore"):
        energy = update.energy()
    # Also of what the basis has no target for: the share is one of all of them.
    if not math.isfinite(energy):
        raise InputError(f"{source} changes {name} by NaN or Inf, or by more than numbers can hold; it is damaged")
    if target is None:
        tally.lost[name] = energy
    else:
        tally.held[target.name] = hold(target, update)


def _check_shape(source: Path, path: str, layer: Any, update: Update) -> None:
    weight = layer.weight.shape
    expected = tuple(weight[::-1]) if is_conv1d(layer) else tuple(weight)
    if update.shape != expected:
        raise InputError(f"{source} changes {path} as one of {list(update.shape)}; the base has {list(expected)}")


def _head_names(checkpoint: Checkpoint) -> list[str]:
    """Tensors of the output layer, which a customer may have for itself."""
    if not checkpoint.labels:
        return []
    layer = output_layer(checkpoint.skeleton())
    return [name for name in (f"{layer}.weight", f"{layer}.bias") if name in checkpoint.stored]


def _head_of(source: Path, checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The output layer among tensors that a LoRA trained as a whole; it alone may differ from the base's."""
    heads = _head_names(checkpoint)
    found = {name: tensor.float().numpy() for name, tensor in tensors.items() if name in heads}
    foreign = [name for name, tensor in tensors.items() if name not in heads and not _is(checkpoint, name, tensor)]
    if foreign:
        raise InputError(
            f"{source} trained {_some(foreign)} as a whole; a customer can have coefficients and an output layer alone"
        )
    if found and set(found) != set(heads):
        raise InputError(
            f"{source} has {_some(found)} of the output layer alone, without {_some(set(heads) - set(found))}"
        )
    return found


def _is(checkpoint: Checkpoint, name: str, tensor: torch.Tensor) -> bool:
    return name in checkpoint.stored and torch.equal(checkpoint.read(name).double(), tensor.double())


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _finished(
    tally: Tally,
    checkpoint: Checkpoint,
    task: str,
    labels: tuple[str, ...],
    head: dict[str, np.ndarray],
    origin: dict[str, Any],
) -> Projection:
    basis = tally.basis
    customer = Coefficients(
        values=np.zeros(basis.total_rank, dtype=np.float32),
        basis_digest=basis.digest,
        base_name=checkpoint.name,
        base_digest=checkpoint.digest,
        task=task,
        labels=labels,
        head=head,
        basis_file=str(basis.file) if basis.file else "",
    )
    try:
        made = tally.projection(customer)
    except InputError as error:
        raise InputError(f"{origin['name']}: {error}") from error
    record = {"projected": origin | {"share": made.share}}
    return replace(made, customer=replace(made.customer, training=record))


def _share(held: float, whole: float) -> float:
    # Rounding may leave the held part a hair above the whole.
    return min(1.0, held / whole) if whole else 1.0
