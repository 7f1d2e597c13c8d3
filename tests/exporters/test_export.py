"""Merged = side branch = ONNX, on non-zero coefficients, for every kind of padding."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.onnx import export as export_module
from exporters.onnx import export_merged, verify_against
from exporters.onnx.options import OnnxOptions
from exporters.onnx.prepared import Prepared, Texts
from exporters.onnx.reference import build_reference
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import BasisMismatchError, CheckFailed, InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import open_bundle, open_session, verify
from qrlora_deploy.runtime.verification.parity import Case, read_reference
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX, FP32_SIDE_BRANCH

CASES = {
    "single text",
    "right padding",
    "left padding",
    "padding on both sides",
    "mask with holes",
    "longest input",
}


@pytest.fixture(scope="module")
def reference(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients) -> list[Case]:
    """Logits of the side branch."""
    checkpoint = open_checkpoint(str(tiny_base))
    prepared = Prepared(checkpoint, checkpoint.tokenizer(), Texts(SENTENCES))
    return build_reference(prepared, tiny_basis, tiny_customer)


def test_onnx_equals_side_branch(exported: Path, reference: list[Case]) -> None:
    session = open_session(exported / "model.onnx")
    assert {case.name for case in reference} == CASES
    for case in reference:
        found = session.run(["logits"], case.inputs)[0]
        np.testing.assert_allclose(found, case.logits, **FP32_ONNX, err_msg=case.name)


def test_merged_model_equals_side_branch(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, reference: list[Case]
) -> None:
    import torch

    checkpoint = open_checkpoint(str(tiny_base))
    model = checkpoint.load_model()
    merge_model(model, checkpoint, tiny_basis, tiny_customer)
    for case in reference:
        with torch.no_grad():
            found = model(**{name: torch.from_numpy(array) for name, array in case.inputs.items()}).logits
        np.testing.assert_allclose(found.numpy(), case.logits, **FP32_SIDE_BRANCH, err_msg=case.name)


def test_cases_are_what_their_names_say(reference: list[Case]) -> None:
    masks = {case.name: case.inputs["attention_mask"] for case in reference}
    assert masks["single text"].shape[0] == 1 and masks["single text"].all()
    assert masks["right padding"][:, 0].all() and not masks["right padding"].all()
    assert masks["left padding"][:, -1].all() and not masks["left padding"][:, 0].any()
    both = masks["padding on both sides"]
    assert ((both[:, 0] == 0) & (both[:, -1] == 0)).any()
    assert (np.diff(masks["mask with holes"], axis=1) > 0).any(axis=1).all()
    assert masks["longest input"].shape[1] == 64


def test_manifest_records_what_was_measured(exported: Path, tiny_basis: Basis, tiny_customer: Coefficients) -> None:
    manifest = open_bundle(exported).manifest
    assert manifest.parity.max_abs_error <= manifest.parity.bound
    assert manifest.customer_effect > 1000 * manifest.parity.bound
    assert manifest.parity.label_agreement == 1.0
    assert (manifest.basis_digest, manifest.coefficients_digest) == (tiny_basis.digest, tiny_customer.digest)
    assert [target.rank for target in manifest.targets] == list(tiny_basis.ranks.values())
    assert all(target.padded_rank % 8 == 0 for target in manifest.targets)
    assert {"config.json", "tokenizer.json", "model.onnx", "model.onnx.data"} <= set(manifest.files)


def test_graph_has_attention_nodes_named_axes_and_no_traces(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 2
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [23]
    for value in model.graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    content = (exported / "model.onnx").read_bytes()
    assert b".py" not in content and b"stack_trace" not in content


def test_failed_parity_leaves_nothing(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The graph forgets the customer: exactly what the check is there for.
    monkeypatch.setattr(export_module, "merge_model", lambda *_: None)
    with pytest.raises(CheckFailed, match="logits differ from PyTorch: max abs error"):
        export_merged(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "acme", tiny_customer),
            OnnxOptions(data=texts),
        )
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        export_merged(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path, tiny_customer), OnnxOptions(data=texts)
        )
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_wrong_basis_is_refused(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    stranger = replace(tiny_customer, basis_digest="0" * 64)
    with pytest.raises(BasisMismatchError, match="000000000000"):
        export_merged(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "acme", stranger), OnnxOptions(data=texts)
        )
    assert list(tmp_path.iterdir()) == []


def test_missing_provider_leaves_nothing(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    with pytest.raises(ProviderError, match="warp"):
        export_merged(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "a", tiny_customer),
            OnnxOptions(data=texts, provider="warp"),
        )
    assert list(tmp_path.iterdir()) == []


def test_own_head_travels_into_the_bundle(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    random = np.random.default_rng(3)
    head = {
        "classifier.weight": random.normal(size=(2, 32)).astype(np.float32),
        "classifier.bias": random.normal(size=2).astype(np.float32),
    }
    customer = replace(tiny_customer, head=head, labels=("no", "yes"))
    checkpoint = open_checkpoint(str(tiny_base))
    manifest = export_merged(ExportJob(checkpoint, tiny_basis, tmp_path / "acme", customer), OnnxOptions(data=texts))
    assert manifest.labels == ("no", "yes") and manifest.outputs[0].shape == ("batch", 2)
    assert verify(open_bundle(tmp_path / "acme")).passed


def test_a_model_of_longer_texts_than_the_check_has_opens(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("exporters.onnx.reference.LONGEST", 24)
    checkpoint = open_checkpoint(str(tiny_base))
    export_merged(ExportJob(checkpoint, tiny_basis, tmp_path / "acme", tiny_customer), OnnxOptions(data=texts))
    assert open_bundle(tmp_path / "acme").manifest.max_length == 64
    longest = max(
        case.inputs["input_ids"].shape[1] for case in read_reference(tmp_path / "acme" / "reference.safetensors")
    )
    assert longest == 24


def test_verify_against_recomputes(
    exported: Path, tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    fresh = Examples(["cook some rice please", "rain in denver"], None, ["home", "home"], "fresh")
    checkpoint = open_checkpoint(str(tiny_base))
    assert verify_against(open_bundle(exported), checkpoint, tiny_basis, tiny_customer, fresh).passed
    other = replace(tiny_customer, values=-tiny_customer.values)
    with pytest.raises(BasisMismatchError, match="coefficients"):
        verify_against(open_bundle(exported), checkpoint, tiny_basis, other, fresh)


@pytest.mark.gpu
def test_cuda_parity(exported: Path) -> None:
    try:
        report = verify(open_bundle(exported), "cuda")
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    assert report.passed, report
    assert len(read_reference(exported / "reference.safetensors")) == report.cases
