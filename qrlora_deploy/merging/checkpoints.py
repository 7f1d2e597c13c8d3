"""Fold a customer's update into a checkpoint's plain weights, and take it out again.

Sums are formed in fp64 and rounded once to the stored type. A checkpoint is rewritten shard by
shard, so the memory needed is that of its largest shard.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.formats.provenance import (
    MergedTarget,
    Provenance,
    labels_of,
    model_card,
    read_config,
    read_provenance,
    tool_versions,
    with_base_labels,
    with_labels,
    write_provenance,
)
from qrlora_deploy.io.files import atomic_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.arithmetic import (
    Fold,
    check_head,
    digest_of,
    folds_of,
    half_step,
    merged_weight,
    plan_folds,
    resolve_layer,
    round_once,
)
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.models.head import replace_head
from qrlora_deploy.models.shards import copy_side_files, copy_weights, rewrite_shards

__all__ = ["MergeReport", "UnmergeReport", "merge", "merge_model", "merged_weight", "unmerge"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    Attributes:
        targets: module paths of the weights that were changed.
        max_rounding_error: largest `|stored - exact|`.
        unchanged_share: share of the weights with a non-zero update that rounding left as they were.
        max_update: largest `|ΔW|`.
        output: the folder that was written.
    """

    targets: tuple[str, ...]
    max_rounding_error: float
    unchanged_share: float
    max_update: float
    output: Path


@dataclass(frozen=True)
class UnmergeReport:
    """What taking an update out gave back.

    Attributes:
        targets: module paths of the weights that were restored.
        max_deviation: bound on `|restored - base|`: the roundings of the merge and of the
            subtraction; 0 when exact.
        exact: every restored weight has the bytes of the base.
        output: the folder that was written.
    """

    targets: tuple[str, ...]
    max_deviation: float
    exact: bool
    output: Path


@dataclass
class _Tally:
    """Figures gathered over the targets of one merge."""

    max_rounding_error: float = 0.0
    max_update: float = 0.0
    touched: int = 0
    unchanged: int = 0
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, tensor: str, before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor) -> None:
        error = (after.double() - (before.double() + delta)).abs().max()
        self.max_rounding_error = max(self.max_rounding_error, float(error))
        self.max_update = max(self.max_update, float(delta.abs().max()))
        self.touched += int((delta != 0).sum())
        self.unchanged += int(((delta != 0) & (after == before)).sum())
        self.digests[tensor] = digest_of(after)

    def figures(self) -> dict[str, float]:
        share = self.unchanged / self.touched if self.touched else 0.0
        return {
            "max_rounding_error": self.max_rounding_error,
            "max_update": self.max_update,
            "unchanged_share": share,
        }


def merge(
    checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients, output: Path, progress: Progress | None = None
) -> MergeReport:
    """Write `checkpoint` with the customer's update folded in to the new folder `output`.

    The result is a plain checkpoint in the base's own types and shards, with the tokenizer, a
    model card and `qrlora.json`. On any error nothing is left at `output`.

    Raises:
        InputError: the base is quantised, merged already or has no such head, a target's weight is
            shared with another layer, or `output` exists.
        BasisMismatchError: base, basis and coefficients do not belong together.
        QrloraError: the disk is full, or a sum does not fit the stored type.
    """
    check_free_folder(output)
    config = read_config(checkpoint.folder)
    folds = plan_folds(checkpoint, basis, coefficients, checkpoint.skeleton())
    head = {name: torch.from_numpy(values) for name, values in coefficients.head.items()}
    outputs = check_head(checkpoint, coefficients)
    tally = _Tally()

    def change(name: str, stored: torch.Tensor) -> torch.Tensor:
        if name in head:
            return round_once(head[name].double(), stored.dtype).contiguous()
        if name not in folds:
            return stored
        merged = folds[name].merged(stored)
        tally.add(name, stored, merged, folds[name].delta())
        return merged

    with atomic_folder(output) as folder:
        copy_side_files(checkpoint, folder)
        rewrite_shards(checkpoint, folder, change, progress)
        named = with_labels(config, coefficients.task, coefficients.labels, outputs, coefficients.thresholds)
        write_json(folder / "config.json", named)
        provenance = _provenance(checkpoint, basis, coefficients, folds, tally)
        write_provenance(provenance, folder)
        (folder / "README.md").write_text(model_card(provenance), encoding="utf-8")
    return MergeReport(targets=tuple(basis.names), output=output, **tally.figures())


def _provenance(
    checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients, folds: dict[str, Fold], tally: _Tally
) -> Provenance:
    return Provenance(
        base_name=checkpoint.name,
        base_digest=checkpoint.digest,
        basis_digest=basis.digest,
        coefficients_digest=coefficients.digest,
        task=coefficients.task,
        labels=coefficients.labels,
        head=tuple(sorted(coefficients.head)),
        base_labels=labels_of(read_config(checkpoint.folder)),
        targets=tuple(
            MergedTarget(fold.target.name, tensor, fold.target.rank, tally.digests[tensor])
            for tensor, fold in folds.items()
        ),
        rounding=tally.figures(),
        training=coefficients.training,
        versions=tool_versions(),
    )


def merge_model(model: Any, checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients) -> None:
    """Fold the update into `model`, loaded from `checkpoint`, in place and in the model's dtype.

    A head with another number of labels takes the place of the model's. On an error in the checks
    the model is left as it was.

    Raises:
        InputError: the base is quantised, merged already or has no such head, or a target's weight is shared with
            another layer.
        BasisMismatchError: base, basis and coefficients do not belong together.
        QrloraError: a sum does not fit the dtype.
    """
    folds = plan_folds(checkpoint, basis, coefficients, model)
    check_head(checkpoint, coefficients)
    with torch.no_grad():
        for fold in folds.values():
            weight: Any = resolve_layer(model, fold.target.name)[1].weight
            weight.copy_(fold.merged(weight.detach()))
        if coefficients.head:
            replace_head(model, coefficients)


def unmerge(
    merged: Checkpoint,
    basis: Basis,
    coefficients: Coefficients,
    output: Path,
    base: Checkpoint | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Write the base of a merged checkpoint to the new folder `output`.

    With `base` its files are copied, bit for bit. Without it the update is subtracted in fp64 and
    rounded once, which gives back the base to the roundings of the merge and of the subtraction.

    Raises:
        InputError: `merged` was not merged by this tool or was changed since, or the customer's own
            head replaced the base's and no `base` is given to take it from.
        BasisMismatchError: basis, coefficients or `base` are not those of the merge.
    """
    check_free_folder(output)
    provenance = read_provenance(merged.folder)
    _check_merged_from(merged, basis, coefficients, provenance)
    merged.check_usable()
    if base is not None:
        base.check_usable()
        if base.digest != provenance.base_digest:
            raise BasisMismatchError(
                f"{base.name} ({base.digest[:12]}…) is not the base of {merged.name} ({provenance.base_digest[:12]}…)"
            )
        with atomic_folder(output) as folder:
            copy_side_files(base, folder)
            copy_weights(base, folder, progress)
        return UnmergeReport(tuple(basis.names), 0.0, True, output)
    if provenance.head:
        raise InputError(
            f"{merged.name}: the customer's head replaced {', '.join(provenance.head)} of the base; "
            f"give the base ({provenance.base_name}) to take it from"
        )
    return _subtract(merged, basis, coefficients, output, provenance, progress)


def _check_merged_from(merged: Checkpoint, basis: Basis, coefficients: Coefficients, provenance: Provenance) -> None:
    coefficients.check_fits(basis)
    pairs = (
        ("basis", basis.digest, provenance.basis_digest),
        ("coefficients", coefficients.digest, provenance.coefficients_digest),
    )
    for what, given, expected in pairs:
        if given != expected:
            raise BasisMismatchError(
                f"{merged.name} was merged from {what} {expected[:12]}, not {given[:12]}; give those it was merged from"
            )
    changed = [
        target.name
        for target in provenance.targets
        if target.tensor not in merged.tensor_files or merged.tensor_digest(target.tensor) != target.merged_digest
    ]
    if changed:
        raise InputError(f"{merged.name} was changed after the merge: {', '.join(changed)}; take its base instead")


def _subtract(
    merged: Checkpoint,
    basis: Basis,
    coefficients: Coefficients,
    output: Path,
    provenance: Provenance,
    progress: Progress | None,
) -> UnmergeReport:
    folds = folds_of(merged, basis, -coefficients.values, merged.skeleton())
    deviations, digests = [0.0], {}

    def change(name: str, stored: torch.Tensor) -> torch.Tensor:
        if name not in folds:
            return stored
        restored = folds[name].merged(stored)
        deviations.append(float((half_step(stored) + half_step(restored)).max()))
        digests[folds[name].target.name] = digest_of(restored)
        return restored

    with atomic_folder(output) as folder:
        copy_side_files(merged, folder)
        rewrite_shards(merged, folder, change, progress)
        write_json(folder / "config.json", with_base_labels(read_config(merged.folder), provenance))
    exact = all(digests[target.name] == target.weight_digest for target in basis.targets)
    return UnmergeReport(tuple(basis.names), 0.0 if exact else max(deviations), exact, output)
