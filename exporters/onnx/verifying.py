"""A bundle that lies on the disk, against PyTorch."""

from dataclasses import replace

from exporters.onnx.prepared import Prepared, choose_texts
from exporters.onnx.reference import build_reference
from exporters.onnx.side_branches import side_branches
from exporters.onnx.synthetic_customers import brought, mixed_reference
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, CheckFailed, InputError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.row_layout import HeadLayout
from qrlora_deploy.runtime.sessions.session import check_provider
from qrlora_deploy.runtime.verification.parity import ParityReport, check_graphs, shows_customers
from qrlora_deploy.tasks.registry import task_named


def verify_against(
    bundle: Bundle,
    checkpoint: Checkpoint,
    basis: Basis,
    coefficients: Coefficients,
    texts: Examples | None = None,
    provider: str = "cpu",
) -> ParityReport:
    """Check a bundle against PyTorch anew, on texts of one's own, instead of its stored logits.

    In a switchable bundle neighbouring rows are the customer's and the base's.

    Raises:
        BasisMismatchError: base, basis or coefficients are not those of the bundle.
        CheckFailed: the customer of a switchable bundle does nothing on these texts.
        ProviderError: the provider does not load or cannot compute in the bundle's precision.
    """
    manifest = bundle.manifest
    check_originals(bundle, checkpoint, basis, coefficients)
    check_provider(provider)
    checkpoint = checkpoint.taken_for(manifest.task)
    # The customer's thresholds for the base's rows too: whether two decisions are alike is asked of any.
    task = task_named(manifest.task).deciding_at(coefficients.thresholds)
    prepared = Prepared(checkpoint, checkpoint.tokenizer(), choose_texts(texts, task.pairs_apart))
    if manifest.kind == "merged":
        return check_graphs(bundle, build_reference(prepared, basis, coefficients), task, provider)
    head = HeadLayout(manifest.head_labels, manifest.head_features) if manifest.head_labels else None
    if coefficients.head and head is None:
        raise InputError(
            f"the customer has a head of its own; {bundle.folder} was exported without {argument('head_labels')}"
        )
    with side_branches(prepared, basis) as side:
        reference = mixed_reference(side, [coefficients], head, manifest.table_dtype)
    if manifest.kind == "per-row":
        reference = [replace(case, inputs=brought(case.inputs)) for case in reference]
    if not shows_customers(reference, task.least_size):
        raise CheckFailed(
            f"the customer does not move the logits on these texts, so agreement proves nothing; "
            f"choose other {argument('data')}"
        )
    return check_graphs(bundle, reference, task, provider)


def check_originals(bundle: Bundle, checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients) -> None:
    """Refuse, by a BasisMismatchError, a base, basis or customer that a bundle was not exported from."""
    manifest = bundle.manifest
    given = [
        ("base", checkpoint.digest, manifest.base_digest),
        ("basis", basis.digest, manifest.basis_digest),
    ]
    if manifest.coefficients_digest is not None:
        given.append(("coefficients", coefficients.digest, manifest.coefficients_digest))
    wrong = [f"{name} {mine[:12]}, not {theirs[:12]}" for name, mine, theirs in given if mine != theirs]
    if wrong:
        raise BasisMismatchError(f"{bundle.folder} was exported from others: {'; '.join(wrong)} as in the bundle")
