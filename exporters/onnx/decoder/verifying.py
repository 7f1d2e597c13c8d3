"""A decoder's bundle that lies on the disk, against PyTorch."""

import numpy as np

from exporters.onnx.decoder.export import open_decoder, texts_of
from exporters.onnx.decoder.reference import SLOTS, choose_rows, lend, make_case
from exporters.onnx.verifying import check_originals
from qrlora_deploy.errors import CheckFailed, argument
from qrlora_deploy.exporting.job import Original
from qrlora_deploy.runtime.bundle.bundle import Bundle
from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from qrlora_deploy.runtime.verification.alone import check_decoder
from qrlora_deploy.runtime.verification.forced import bound_of_forced
from qrlora_deploy.runtime.verification.parity import ParityReport, open_for_check

MIXED = tuple(min(slot, 1) for slot in SLOTS)
"""Rows of the customer, and one of the base."""


def verify_decoder(bundle: Bundle, original: Original, provider: str) -> ParityReport:
    """Check a decoder's bundle against PyTorch anew, with a customer and on texts of one's own.

    Raises:
        BasisMismatchError: base, basis or customer are not those of the bundle.
        CheckFailed: the customer of a switchable bundle does nothing on these texts.
        ProviderError: the provider does not load or cannot compute in the bundle's precision.
    """
    manifest, customer = bundle.manifest, original.coefficients
    check_originals(bundle, original.checkpoint, original.basis, customer)
    session = open_for_check(bundle.model, manifest.precision, provider)
    decoder = open_decoder(original.checkpoint)
    rows = choose_rows(decoder.tokenizer, texts_of(original.texts), manifest.max_length, manifest.pad_token_id)
    model = original.checkpoint.load_model(attn_implementation="eager")
    with lend(model, original.basis) as forward:
        if manifest.kind == "merged":
            case = make_case(forward, rows, customer.values[None], None, (0,) * len(SLOTS))
        else:
            layout = TableLayout(list(original.basis.ranks.values()), manifest.table_dtype)
            customers = np.stack([np.zeros_like(customer.values), customer.values])
            case = make_case(forward, rows, customers, layout, MIXED)
    if manifest.kind == "switchable" and np.abs(case.logits - case.base_logits).max() < bound_of_forced([case], "fp32"):
        raise CheckFailed(
            f"the customer does not move the logits on these texts, so agreement proves nothing; "
            f"choose other {argument('data')}"
        )
    return check_decoder(session, [case], manifest.precision, bundle.model, manifest.max_length)
