"""Graphs of low precision: close to PyTorch in fp32, small, the same at the door, and true to the customer."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from exporters.onnx import export as export_module
from exporters.onnx import export_merged, export_switchable, verify_against
from exporters.onnx.options import OnnxOptions
from exporters.onnx.precision import cast_inside
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import CheckFailed, InputError, ProviderError, QrloraError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import SwitchableSession, open_bundle, open_session, verify
from qrlora_deploy.runtime.verification.parity import BOUNDS, Case, check_parity, read_reference
from qrlora_deploy.tasks.classification import Classification
from tests.cli.running import run_here, succeed_here
from tests.exporters.conftest import InPrecision
from tests.exporters.test_switchable import save_encoder
from tests.tolerances import FP16_ROWS

FLOAT, FLOAT16, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64


@pytest.fixture(scope="module")
def merged_fp16(in_precision: InPrecision) -> Path:
    return in_precision("merged", "fp16")


@pytest.fixture(scope="module")
def switchable_fp16(in_precision: InPrecision) -> Path:
    return in_precision("switchable", "fp16")


def weights_of(folder: Path) -> dict[str, onnx.TensorProto]:
    """Initializers with axes: single numbers such as an epsilon are no weights."""
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.dims}


def value_types(values: Any) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values}


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_fp16_is_half_as_large_and_the_same_at_the_door(
    kind: str, exported: Path, switchable: Path, merged_fp16: Path, switchable_fp16: Path
) -> None:
    full, half = (exported, merged_fp16) if kind == "merged" else (switchable, switchable_fp16)
    weights = [tensor for tensor in weights_of(half).values() if tensor.data_type != INT64]
    assert len(weights) >= 30 and {tensor.data_type for tensor in weights} == {FLOAT16}
    before, after = onnx.load(full / "model.onnx"), onnx.load(half / "model.onnx")
    assert value_types(before.graph.input) == value_types(after.graph.input)
    assert value_types(after.graph.output) == {"logits": FLOAT}
    sizes = [(folder / "model.onnx.data").stat().st_size for folder in (full, half)]
    assert sizes[1] <= 0.55 * sizes[0]
    records = [open_bundle(folder).manifest for folder in (full, half)]
    assert [record.precision for record in records] == ["fp32", "fp16"]
    assert records[0].inputs == records[1].inputs and records[0].outputs == records[1].outputs


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_fp16_keeps_the_logits_and_the_effect(kind: str, merged_fp16: Path, switchable_fp16: Path) -> None:
    folder = merged_fp16 if kind == "merged" else switchable_fp16
    parity = open_bundle(folder).manifest.parity
    # Not exactly zero either: then it would be the fp32 graph.
    assert 1e-5 < parity.max_abs_error <= parity.bound
    assert parity.effect_correlation is not None and parity.effect_error is not None
    assert parity.effect_correlation >= 0.999 and 0 < parity.effect_error <= 0.05
    assert verify(open_bundle(folder)).passed
    assert "fp16" in (folder / "README.md").read_text()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    "name", ["mpnet", "deberta-v2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("roberta", "distilbert"))]
)
def test_encoders_in_fp16(name: str, tmp_path: Path, texts: Examples) -> None:
    checkpoint = open_checkpoint(str(save_encoder(name, tmp_path / "base")))
    # Projections of DeBERTa's positions have no customers.
    patterns = {
        "deberta-v2": ("query_proj", "value_proj", "dense"),
        "distilbert": ("q_lin", "v_lin", "lin1", "lin2"),
        "mpnet": ("attn.q", "attn.v", "dense"),
    }.get(name, ("query", "value", "dense"))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), patterns), EnergyShare(0.5))
    parity = export_switchable(
        ExportJob(checkpoint, basis, tmp_path / "bundle"), OnnxOptions(data=texts, head_labels=6, precision="fp16")
    ).parity
    assert parity.max_abs_error <= parity.bound
    assert parity.effect_correlation is not None and parity.effect_correlation >= 0.999
    floats = {tensor.data_type for tensor in weights_of(tmp_path / "bundle").values()} & {FLOAT, FLOAT16}
    assert floats == {FLOAT16}


def test_merged_weights_are_rounded_once(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients) -> None:
    from qrlora_deploy.merging.checkpoints import merge_model

    checkpoint = open_checkpoint(str(tiny_base))
    exact, rounded = checkpoint.load_model(), checkpoint.load_model()
    for model in (exact, rounded):
        merge_model(model, checkpoint, tiny_basis, tiny_customer)
    cast_inside(rounded, None, "fp16")
    for (name, weight), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(weight.half(), other), name


def test_labels_that_a_customer_does_not_have_stay_out(switchable_fp16: Path) -> None:
    bundle = open_bundle(switchable_fp16)
    session = open_session(bundle.model)
    for case in read_reference(switchable_fp16 / "reference.safetensors"):
        found = session.run(["logits"], case.inputs)[0]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(case.logits))
        assert np.isneginf(found).any(axis=1)[case.inputs["slot"] == 2].all()


def test_rows_of_a_mixed_batch_in_fp16_are_those_of_single_runs(
    switchable_fp16: Path, tiny_customer: Coefficients
) -> None:
    session = SwitchableSession(open_bundle(switchable_fp16))
    session.load("acme", tiny_customer)
    session.load("opposite", replace(tiny_customer, values=-tiny_customer.values))
    case = read_reference(switchable_fp16 / "reference.safetensors")[1]
    inputs = {name: case.inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    customers = [("acme", None, "opposite")[row % 3] for row in range(len(case.logits))]
    mixed, _labels = session.predict(inputs, customers)
    for row, customer in enumerate(customers):
        alone, _labels = session.predict({name: array[row : row + 1] for name, array in inputs.items()}, [customer])
        np.testing.assert_allclose(alone[0], mixed[row], **FP16_ROWS)
    assert np.abs(mixed[0, :4] - mixed[1, :4]).max() > 10 * FP16_ROWS["atol"]


def test_verify_against_knows_the_precision(
    switchable_fp16: Path,
    merged_fp16: Path,
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    for folder in (merged_fp16, switchable_fp16):
        report = verify_against(open_bundle(folder), checkpoint, tiny_basis, tiny_customer, texts)
        assert report.passed and report.precision == "fp16"
        assert not check_parity(
            open_session(folder / "model.onnx"), read_reference(folder / "reference.safetensors"), Classification()
        ).passed


def test_graph_without_the_customers_is_refused_by_its_effect(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The bound of the logits is made too wide to see anything, as it is for a small effect.
    monkeypatch.setitem(BOUNDS, "fp16", replace(BOUNDS["fp16"], relative=1e3))
    cast = export_module.cast_inside

    def forget(model: Any, rows: Any, precision: str) -> None:
        cast(model, rows, precision)
        for name, buffer in model.named_buffers():
            if name.endswith(".q"):
                buffer.zero_()

    monkeypatch.setattr(export_module, "cast_inside", forget)
    with pytest.raises(CheckFailed, match=r"effect is not PyTorch's: correlation 0\.0000 < 0\.99 \(fp16, .*worst: row"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"),
            OnnxOptions(data=texts, precision="fp16"),
        )
    assert list(tmp_path.iterdir()) == []


def test_merged_graph_without_the_customer_is_refused_by_its_effect(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BOUNDS, "fp16", replace(BOUNDS["fp16"], relative=1e3))
    monkeypatch.setattr(export_module, "merge_model", lambda *_: None)
    checkpoint = open_checkpoint(str(tiny_base))
    with pytest.raises(CheckFailed, match="the customers' effect is not PyTorch's"):
        export_merged(
            ExportJob(checkpoint, tiny_basis, tmp_path / "acme", tiny_customer),
            OnnxOptions(data=texts, precision="fp16"),
        )
    assert list(tmp_path.iterdir()) == []


class Fixed:
    """A session that gives the same logits for everything."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def get_inputs(self) -> list[object]:
        return []

    def run(self, _names: list[str], _inputs: dict[str, np.ndarray], _options: object) -> list[np.ndarray]:
        return [self.logits]


def test_effect_is_compared_by_direction_and_size() -> None:
    base = np.array([[1.0, 2.0, -np.inf]], dtype=np.float32)
    case = Case("one", {}, base + np.array([[3.0, 4.0, 0.0]], dtype=np.float32), base)
    half = check_parity(Fixed(base + np.array([[1.5, 2.0, 0.0]], dtype=np.float32)), [case], Classification())
    assert half.effect_correlation == pytest.approx(1.0) and half.effect_error == pytest.approx(0.5)
    turned = check_parity(Fixed(base + np.array([[4.0, -3.0, 0.0]], dtype=np.float32)), [case], Classification())
    assert turned.effect_correlation == pytest.approx(0.0, abs=1e-12)
    lost = check_parity(Fixed(base), [case], Classification(), "fp16")
    assert lost.effect_correlation == 0.0 and lost.effect_error == 1.0 and not lost.passed
    broken = check_parity(Fixed(np.full_like(base, np.nan)), [case], Classification(), "fp16")
    assert broken.effect_correlation == 0.0 and not broken.passed
    # A customer of zeros moves nothing, which is no fault of the graph.
    still = check_parity(Fixed(base), [replace(case, logits=base)], Classification(), "fp16")
    assert still.effect_correlation is None and still.passed


def test_weights_out_of_range_are_named(tiny_base: Path) -> None:
    model = open_checkpoint(str(tiny_base)).load_model()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e5
    with pytest.raises(
        QrloraError, match=r"1 weights are larger than fp16 can hold \(6\.55e\+04\): classifier\.weight"
    ):
        cast_inside(model, None, "fp16")
    assert model.classifier.weight.dtype == torch.float32


def test_unknown_precision_lists_the_known(tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown precision 'fp8'; choose from fp32, fp16, bf16"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "b"),
            OnnxOptions(data=texts, precision="fp8"),
        )
    assert list(tmp_path.iterdir()) == []


def test_bundle_of_an_earlier_version_opens(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "acme"))
    record = json.loads((folder / "manifest.json").read_text())
    new = {"effect_correlation", "effect_error", "accuracy", "accuracy_reference", "accuracy_rows"}
    assert new <= set(record["parity"])
    for name in new:
        del record["parity"][name]
    (folder / "manifest.json").write_text(json.dumps(record))
    bundle = open_bundle(folder)
    assert bundle.manifest.parity.effect_correlation is None
    assert verify(bundle).passed


def test_bf16_says_which_provider_it_needs(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    with pytest.raises(ProviderError, match=r"cpu cannot run a graph in bf16: .*provider='cuda'$") as caught:
        export_merged(
            ExportJob(checkpoint, tiny_basis, tmp_path / "acme", tiny_customer),
            OnnxOptions(data=texts, precision="bf16"),
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_on_cuda(
    precision: str, tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, texts: Examples, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    try:
        merged = export_merged(
            ExportJob(checkpoint, tiny_basis, tmp_path / "acme", tiny_customer),
            OnnxOptions(data=texts, provider="cuda", precision=precision),
        )
        switchable = export_switchable(
            ExportJob(checkpoint, tiny_basis, tmp_path / "all"),
            OnnxOptions(data=texts, provider="cuda", head_labels=6, precision=precision),
        )
    except ProviderError as error:
        if "cannot run a graph" in str(error):
            raise
        pytest.skip(f"no CUDA execution provider here: {error}")
    for manifest in (merged, switchable):
        assert manifest.parity.max_abs_error <= manifest.parity.bound, manifest.parity
        assert manifest.precision == precision


def test_precision_on_the_command_line(
    tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path
) -> None:
    arguments = ["export", tiny_base, "--basis", tiny_basis_file, "-o", tmp_path / "bundle"]
    record = succeed_here([*arguments, "--precision", "fp16"], tmp_path)
    assert record["precision"] == "fp16" and record["parity"]["effect_correlation"] > 0.999
    assert succeed_here(["inspect", tmp_path / "bundle"], tmp_path)["precision"] == "fp16"
    assert succeed_here(["verify", tmp_path / "bundle"], tmp_path)["precision"] == "fp16"
    wrong = run_here(
        "export", tiny_base, "--basis", tiny_basis_file, "-o", tmp_path / "b", "--precision", "fp8", cwd=tmp_path
    )
    assert wrong.code == 2 and "--precision" in wrong.err and "fp16" in wrong.err
    adapter = ["export", "--coefficients", tiny_customer_file, "--format", "peft", "-o", tmp_path / "p"]
    refused = run_here(*adapter, "--precision", "fp16", cwd=tmp_path)
    assert refused.code == 2 and "--precision is no option of --format peft; it belongs to" in refused.err
    assert "--format onnx" in refused.err
