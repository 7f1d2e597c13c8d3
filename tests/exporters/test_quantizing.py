"""int8: whole numbers in the base's layers and the factors and nowhere else, and a bad graph is refused."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from exporters.onnx import export as export_module
from exporters.onnx import export_switchable, quantizing, verify_against
from exporters.onnx.graph import write_graph
from exporters.onnx.options import OnnxOptions
from exporters.onnx.quantizing import quantize_graph
from exporters.onnx.switchable import scaled_by_token
from exporters.onnx.vnni_check import products_saturate
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import CheckFailed, InputError, QrloraError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.verification.parity import BOUNDS, Case, check_parity, read_reference
from qrlora_deploy.tasks.classification import Classification
from tests.cli.running import succeed_here
from tests.exporters.conftest import InPrecision
from tests.tolerances import INT8_ROWS

FLOAT, INT8 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8
LAYERS = 12
"""Six linear layers in each of the two blocks."""


@pytest.fixture(scope="module")
def merged(in_precision: InPrecision) -> Path:
    return in_precision("merged", "int8")


@pytest.fixture(scope="module")
def switchable_int8(in_precision: InPrecision) -> Path:
    return in_precision("switchable", "int8")


def test_saturation_is_seen_where_it_is() -> None:
    """Against sums of products by numpy, on other large numbers than the ones that are tried."""
    random = np.random.default_rng(0)
    left, right = random.integers(200, 256, (4, 96), np.uint8), random.integers(100, 128, (96, 32), np.int8)
    product = onnx.helper.make_node("MatMulInteger", ["left", "right"], ["sums"])
    graph = onnx.helper.make_graph(
        [product],
        "product",
        [onnx.helper.make_tensor_value_info("left", onnx.TensorProto.UINT8, (4, 96))],
        [onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, (4, 32))],
        [numpy_helper.from_array(right, "right")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"left": left})
    right_sums = np.array_equal(found, left.astype(np.int32) @ right.astype(np.int32))
    assert products_saturate() is not right_sums


@pytest.mark.parametrize("saturates", [True, False])
def test_weights_have_seven_bits_where_sums_saturate(
    saturates: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing, "products_saturate", lambda: saturates)
    model = open_checkpoint(str(tiny_base)).load_model()
    graph = write_graph(model, ("input_ids", "attention_mask"), tmp_path)
    quantize_graph(tmp_path / "model.onnx", graph.products, 2**14)
    weights = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if tensor.data_type == INT8 and len(tensor.dims) == 2
    ]
    assert len(weights) == LAYERS
    largest = max(int(np.abs(weight.astype(int)).max()) for weight in weights)
    assert largest == (64 if saturates else 127)


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_base_layers_and_factors_are_whole_numbers_and_nothing_else(
    kind: str, merged: Path, switchable_int8: Path, tiny_basis: Basis
) -> None:
    folder = merged if kind == "merged" else switchable_int8
    model = onnx.load(folder / "model.onnx")
    types = {tensor.name: tensor for tensor in model.graph.initializer}
    operators = Counter(node.op_type for node in model.graph.node)
    expected = LAYERS + (2 * len(tiny_basis.targets) if kind == "switchable" else 0)
    assert operators["MatMulInteger"] == expected and operators["Attention"] == 2
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            assert types[node.input[1]].data_type == INT8
            # One zero point and one scale for each output channel.
            assert len(types[node.input[3]].dims) == 1 and types[node.input[3]].dims[0] == types[node.input[1]].dims[1]
    if kind == "switchable":
        for target in tiny_basis.targets:
            ends = tuple(f"{target.name}.{factor}_quantized" for factor in "qr")
            factors = [name for name in types if name.endswith(ends)]
            assert len(factors) == 2 and {types[name].data_type for name in factors} == {INT8}
    eight_bits = [tensor for tensor in types.values() if tensor.data_type == INT8 and len(tensor.dims) == 2]
    assert len(eight_bits) == expected


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_int8_is_small_and_true_to_the_customer(
    kind: str, merged: Path, switchable_int8: Path, exported: Path, switchable: Path
) -> None:
    small, full = (merged, exported) if kind == "merged" else (switchable_int8, switchable)
    sizes = [sum(path.stat().st_size for path in folder.glob("model.onnx*")) for folder in (small, full)]
    assert sizes[0] < sizes[1]
    manifest = open_bundle(small).manifest
    assert manifest.precision == "int8" and manifest.inputs == open_bundle(full).manifest.inputs
    assert 1e-4 < manifest.parity.max_abs_error <= manifest.parity.bound
    assert manifest.parity.effect_correlation is not None and manifest.parity.effect_correlation >= 0.9
    assert verify(open_bundle(small)).passed
    assert sorted(path.name for path in small.iterdir()) == sorted(path.name for path in full.iterdir())


def test_mixed_batch_in_int8_is_close_to_single_runs(switchable_int8: Path, tiny_customer: Coefficients) -> None:
    session = SwitchableSession(open_bundle(switchable_int8))
    session.load("acme", tiny_customer)
    session.load("opposite", replace(tiny_customer, values=-tiny_customer.values))
    case = read_reference(switchable_int8 / "reference.safetensors")[1]
    inputs = {name: case.inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    customers = [("acme", None, "opposite")[row % 3] for row in range(len(case.logits))]
    mixed, _labels = session.predict(inputs, customers)
    again, _labels = session.predict(inputs, customers)
    np.testing.assert_array_equal(mixed, again)
    for row, customer in enumerate(customers):
        alone, _labels = session.predict({name: array[row : row + 1] for name, array in inputs.items()}, [customer])
        np.testing.assert_allclose(alone[0], mixed[row], **INT8_ROWS)
    assert np.abs(mixed[0, :4] - mixed[1, :4]).max() > 5 * INT8_ROWS["atol"]


def test_verify_against_in_int8(
    merged: Path,
    switchable_int8: Path,
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
) -> None:
    for folder in (merged, switchable_int8):
        report = verify_against(open_bundle(folder), open_checkpoint(str(tiny_base)), tiny_basis, tiny_customer, texts)
        assert report.passed and report.precision == "int8"


def change(path: Path, names: tuple[str, str], factor: float) -> None:
    """Multiply the first float tensor whose name has both parts in it."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if all(name in tensor.name for name in names))
    assert tensor.data_type == FLOAT
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    # Another file for the weights: saving to the same one would append.
    path.with_name("model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=2**14)


def test_wrong_scale_of_a_weight_is_refused(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(path: Path, *arguments: Any) -> None:
        quantize_graph(path, *arguments)
        change(path, ("_scale", ""), 4.0)

    monkeypatch.setattr(export_module, "quantize_graph", wrong)
    with pytest.raises(CheckFailed, match=r"max abs error .* > .*int8"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"),
            OnnxOptions(data=texts, precision="int8"),
        )
    assert list(tmp_path.iterdir()) == []


def test_lost_customers_are_refused_by_their_effect(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "int8", replace(BOUNDS["int8"], relative=1e3, label_agreement=None))

    def coarse(path: Path, *arguments: Any) -> None:
        """Side branches in so few bits that every factor becomes zero."""
        quantize_graph(path, *arguments)
        for target in tiny_basis.targets:
            change(path, (target.name, ".q"), 0.0)

    monkeypatch.setattr(export_module, "quantize_graph", coarse)
    with pytest.raises(CheckFailed, match=r"effect is not PyTorch's: correlation -?0\.\d+ < 0\.95 \(int8"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"),
            OnnxOptions(data=texts, precision="int8"),
        )
    assert list(tmp_path.iterdir()) == []


def test_labels_are_judged_by_themselves() -> None:
    base = np.eye(4, dtype=np.float32) * 0.01
    case = Case("one", {}, base, base)

    class Turned:
        def get_inputs(self) -> list[object]:
            return []

        def run(self, *_arguments: object) -> list[np.ndarray]:
            return [base[::-1].copy()]

    report = check_parity(Turned(), [case], Classification(), "int8")
    assert report.max_abs_error < report.bound and not report.passed
    with pytest.raises(CheckFailed, match=r"labels are not PyTorch's: agreement 0\.0000 < 0\.75 \(int8, 4 inputs"):
        report.raise_if_failed()


def test_nothing_to_quantise_and_a_gpu_are_errors(
    exported: Path, tiny_base: Path, tiny_basis: Basis, tmp_path: Path
) -> None:
    with pytest.raises(QrloraError, match="int8 has nothing to quantise"):
        quantize_graph(exported / "model.onnx", (), 2**14)
    with pytest.raises(InputError, match="int8 is for the CPU, not provider='cuda'"):
        export_switchable(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "bundle"),
            OnnxOptions(provider="cuda", precision="int8"),
        )
    assert list(tmp_path.iterdir()) == []


def test_int8_on_the_command_line(tiny_base: Path, tiny_basis_file: Path, tmp_path: Path) -> None:
    arguments = ["export", tiny_base, "--basis", tiny_basis_file, "-o", tmp_path / "bundle", "--precision", "int8"]
    assert succeed_here(arguments, tmp_path)["precision"] == "int8"
    assert succeed_here(["inspect", tmp_path / "bundle"], tmp_path)["precision"] == "int8"
    assert succeed_here(["verify", tmp_path / "bundle"], tmp_path)["precision"] == "int8"


def test_tokens_that_are_scaled_by_themselves_lose_no_digits_to_others() -> None:
    """What goes into a product is rounded to 8 bits of one range for all, as int8 does it; sizes differ a lot."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(24, 32, generator=generator)
    h = torch.randn(4, 5, 24, generator=generator) * torch.tensor([1.0, 1e3, 1e-40, 0.0])[:, None, None]

    def product(part: torch.Tensor) -> torch.Tensor:
        step = (part.max().clamp_min(0) - part.min().clamp_max(0)) / 255
        return torch.round(part / step) * step @ q

    errors = [
        float((found[0] - h[0] @ q).norm() / (h[0] @ q).norm()) for found in (product(h), scaled_by_token(h, product))
    ]
    assert errors[0] > 0.5 and errors[1] < 0.02
    found = scaled_by_token(h, product)
    assert (found[3] == 0).all() and found.isfinite().all()
