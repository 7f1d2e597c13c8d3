"""Customers folded into plain weights, and taken out again."""

from pathlib import Path

from qrlora_deploy.api.inputs import Progress, StrPath, customer_with_basis
from qrlora_deploy.api.sources import as_checkpoint, base_if_found, base_of
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.checkpoints import MergeReport, UnmergeReport
from qrlora_deploy.merging.checkpoints import merge as merge_into
from qrlora_deploy.merging.checkpoints import unmerge as unmerge_from
from qrlora_deploy.models.checkpoint import Checkpoint


def merge(
    base: StrPath | Checkpoint | None,
    basis: StrPath | Basis | None,
    coefficients: StrPath | Coefficients,
    output: StrPath,
    *,
    progress: Progress | None = None,
) -> MergeReport:
    """Fold a customer into its base: a plain Hugging Face checkpoint, in the base's own types and shards.

    Sums `W + Q diag(c) R` are formed in fp64 and rounded once.

    Args:
        base: folder or hub name; None where a coefficients file remembers one that is found.
        basis: a file or a `Basis`; None as for `base`.
        coefficients: the customer: a file or `Coefficients`.
        output: the new folder, which must not hold anything yet.
        progress: called with (description, done, total) after each shard.

    Returns:
        The figures of the rounding, in the units of a weight.

    Raises:
        InputError: the base is quantised, merged already or has no such head, a target's weight is shared with
            another layer, or `output` exists.
        BasisMismatchError: base, basis and coefficients do not belong together.
        QrloraError: the disk is full, or a sum does not fit the stored type. Nothing is left at `output`.

    Examples:
        >>> report = qr.merge("base", "basis.safetensors", "customers/acme.safetensors", "acme")
        >>> report.max_rounding_error < report.max_update
        True
    """
    place = Path(output)
    check_free_folder(place)
    frozen, customer = customer_with_basis(basis, coefficients)
    return merge_into(base_of(base, coefficients), frozen, customer, place, progress)


def unmerge(
    merged: StrPath | Checkpoint,
    basis: StrPath | Basis | None,
    coefficients: StrPath | Coefficients,
    output: StrPath,
    *,
    base: StrPath | Checkpoint | None = None,
    progress: Progress | None = None,
) -> UnmergeReport:
    """Take a customer out of a merged checkpoint.

    Where the base is given or found its files are copied, bit for bit; else the update is subtracted in fp64 and
    rounded once.

    Args:
        merged: folder that `merge` wrote.
        basis: a file or a `Basis`; None where a coefficients file remembers one that is found.
        coefficients: the customer: a file or `Coefficients`.
        output: the new folder, which must not hold anything yet.
        base: folder or hub name of the base; None: the one that a coefficients file remembers, where it is found.
        progress: called with (description, done, total) after each shard.

    Returns:
        What came back, and how far from the base it may be.

    Raises:
        InputError: `merged` was not merged by this tool or was changed since, or the customer's own head replaced
            the base's and there is no base to take it from.
        BasisMismatchError: basis, coefficients or base are not those of the merge.

    Examples:
        >>> qr.merge("base", "basis.safetensors", "customers/acme.safetensors", "merged")  # doctest: +ELLIPSIS
        MergeReport(...)
        >>> qr.unmerge("merged", "basis.safetensors", "customers/acme.safetensors", "again", base="base").exact
        True
    """
    place = Path(output)
    check_free_folder(place)
    frozen, customer = customer_with_basis(basis, coefficients)
    pristine = base_if_found(base, coefficients)
    return unmerge_from(as_checkpoint(merged), frozen, customer, place, pristine, progress)
