"""int8 with scales found on texts: they are the ranges of those texts, and a row does not see its batch."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.calibrating import MAX_ROWS, calibration_inputs, calibration_record, choose_rows
from exporters.onnx.options import OnnxOptions
from exporters.onnx.prepared import prepare
from qrlora_deploy.data.examples import Examples, TextRows
from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE
from qrlora_deploy.runtime.verification.parity import read_reference
from tests.cli.running import run_here, succeed_here
from tests.forging import reseal
from tests.tiny import SENTENCES
from tests.tolerances import CALIBRATED_ROWS

LAYERS = 12
"""Six linear layers in each of the two blocks."""

TEXTS = TextRows(list(SENTENCES), None, "made up")


@pytest.fixture(scope="module")
def bundles(
    tiny_base: Path,
    tiny_basis: Basis,
    tiny_customer: Coefficients,
    texts: Examples,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """A calibrated bundle of each kind."""
    folder, checkpoint = tmp_path_factory.mktemp("calibrated"), open_checkpoint(str(tiny_base))
    common = {"data": texts, "precision": "int8", "calibration": TEXTS}
    export_merged(ExportJob(checkpoint, tiny_basis, folder / "merged", tiny_customer), OnnxOptions(**common))
    export_switchable(ExportJob(checkpoint, tiny_basis, folder / "switchable"), OnnxOptions(head_labels=6, **common))
    return {kind: folder / kind for kind in ("merged", "switchable")}


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_base_layers_and_factors_have_constant_scales_and_nothing_else(
    kind: str, bundles: dict[str, Path], exported: Path, switchable: Path
) -> None:
    graph = onnx.load(bundles[kind] / "model.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    whole = 0
    for node in (node for node in graph.node if node.op_type == "MatMul"):
        made = [makers.get(name) for name in node.input]
        if not all(maker is not None and maker.op_type == "DequantizeLinear" for maker in made):
            continue
        whole += 1
        activation, weight = (maker.input for maker in made if maker is not None)
        assert weights[weight[0]].data_type == onnx.TensorProto.INT8
        assert list(weights[weight[1]].dims) == [weights[weight[0]].dims[1]]
        assert not weights[activation[1]].dims and weights[activation[2]].data_type == onnx.TensorProto.UINT8
    # R and Q of every target beside them.
    expected = LAYERS + (2 * len(open_bundle(bundles[kind]).manifest.targets) if kind == "switchable" else 0)
    assert whole == expected == sum(len(tensor.dims) == 2 and tensor.data_type == 3 for tensor in weights.values())
    full = exported if kind == "merged" else switchable
    sizes = [sum(path.stat().st_size for path in folder.glob("model.onnx*")) for folder in (bundles[kind], full)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_calibrated_bundle_is_true_to_its_customers(kind: str, bundles: dict[str, Path]) -> None:
    bundle = open_bundle(bundles[kind])
    assert bundle.manifest.precision == "int8" and verify(bundle).passed
    assert bundle.manifest.parity.effect_correlation is not None
    assert bundle.manifest.parity.effect_correlation >= 0.95


@pytest.mark.parametrize("kind", ["merged", "switchable"])
def test_manifest_says_what_was_calibrated_on(kind: str, bundles: dict[str, Path], exported: Path) -> None:
    rows = b"".join(json.dumps([sentence, None]).encode() for sentence in SENTENCES)
    expected = {"method": "minmax", "rows": len(SENTENCES), "texts_digest": hashlib.sha256(rows).hexdigest()}
    assert json.loads((bundles[kind] / "manifest.json").read_text())["calibration"] == expected
    found = open_bundle(bundles[kind]).manifest.calibration
    assert found is not None and found.model_dump() == expected
    assert open_bundle(exported).manifest.calibration is None


def test_record_is_of_the_rows_that_run() -> None:
    many = TextRows([f"text {row}" for row in range(1000)], [f"pair {row}" for row in range(1000)], "many")
    record = calibration_record(many)
    assert record.rows == MAX_ROWS and record == calibration_record(choose_rows(many))
    assert record == calibration_record(TextRows(many.texts, many.pairs, "another name"))
    for other in (TextRows(many.texts, None, "many"), TextRows(many.texts, many.pairs[::-1], "many")):  # type: ignore[index]
        assert calibration_record(other).texts_digest != record.texts_digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 0}, "calibration.rows"),
        ({"rows": -1}, "calibration.rows"),
        ({"rows": 1.5}, "calibration.rows"),
        ({"method": "entropy"}, "calibration.method"),
        ({"texts_digest": "short"}, "calibration.texts_digest"),
        ({"texts_digest": None}, "calibration.texts_digest"),
        ({"surprise": 1}, "calibration.surprise"),
    ],
)
def test_wrong_calibration_in_a_manifest_is_refused(
    bundles: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = Path(shutil.copytree(bundles["merged"], tmp_path / "bundle"))
    record = json.loads((folder / "manifest.json").read_text())
    reseal(folder, calibration=record["calibration"] | changes)
    with pytest.raises(FileFormatError, match=message) as caught:
        open_bundle(folder)
    assert str(caught.value).isprintable()


def test_scale_is_the_range_of_the_texts(bundles: dict[str, Path], tiny_base: Path) -> None:
    """The first product reads what the embeddings give, which no customer changes."""
    checkpoint = open_checkpoint(str(tiny_base))
    model, tokenizer = checkpoint.load_model(), checkpoint.tokenizer()
    with torch.no_grad():
        found = [model.bert.embeddings(tokenizer(text, return_tensors="pt")["input_ids"]) for text in SENTENCES]
    low, high = min(float(each.min()) for each in found), max(float(each.max()) for each in found)
    graph = onnx.load(bundles["switchable"] / "model.onnx").graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    first = next(node for node in graph.node if node.op_type == "QuantizeLinear")
    np.testing.assert_allclose(numpy_helper.to_array(weights[first.input[1]]), (high - low) / 255, rtol=1e-4, atol=0)


def test_row_does_not_depend_on_its_batch(bundles: dict[str, Path], tiny_customer: Coefficients) -> None:
    session = SwitchableSession(open_bundle(bundles["switchable"]))
    session.load("acme", tiny_customer)
    case = read_reference(bundles["switchable"] / "reference.safetensors")[1]
    inputs = {name: case.inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    customers = [("acme", None)[row % 2] for row in range(len(case.logits))]
    mixed, _labels = session.predict(inputs, customers)
    for row, customer in enumerate(customers):
        alone, _labels = session.predict({name: array[row : row + 1] for name, array in inputs.items()}, [customer])
        np.testing.assert_allclose(alone[0], mixed[row], **CALIBRATED_ROWS)


def test_texts_are_bounded_spread_unpadded_and_given_to_customers_in_turn(tiny_base: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    rows = TextRows([" ".join(["rice"] * (1 + row % 7)) for row in range(1000)], None, "many")
    table = np.zeros((4, 8), dtype=np.float32)
    steps: list[tuple[str, int, int]] = []
    found = list(
        calibration_inputs(
            prepare(checkpoint, None),
            rows,
            {TABLE: table, SLOT: np.zeros(2, dtype=np.int64), "input_ids": np.zeros((2, 3), dtype=np.int64)},
            lambda *step: steps.append(step),
        )
    )
    assert len(found) == MAX_ROWS and steps[-1] == ("calibration", MAX_ROWS, MAX_ROWS)
    assert all(inputs["attention_mask"].all() and len(inputs["input_ids"]) == 1 for inputs in found)
    assert [int(inputs[SLOT][0]) for inputs in found[:6]] == [0, 1, 2, 3, 0, 1]
    lengths = [inputs["input_ids"].shape[1] for inputs in found]
    chosen = np.linspace(0, 999, MAX_ROWS).round().astype(int)
    # One piece a word, and one before and one behind the text.
    assert lengths == [3 + row % 7 for row in chosen]


def test_calibration_belongs_to_int8() -> None:
    with pytest.raises(InputError, match="calibration belongs to precision='int8'; fp16 has no scales to find"):
        OnnxOptions(precision="fp16", calibration=TEXTS)


def test_calibration_on_the_command_line(tiny_base: Path, tiny_basis_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "texts.tsv"
    data.write_text("text\n" + "\n".join(SENTENCES) + "\n")
    arguments = ["export", tiny_base, "--basis", tiny_basis_file, "-o", tmp_path / "bundle", "--calibration"]
    shown = run_here(*arguments, data, "--precision", "int8", cwd=tmp_path)
    assert shown.code == 0 and f"calibration      method minmax, rows {len(SENTENCES)}, texts_digest " in shown.out
    record = succeed_here(["inspect", tmp_path / "bundle"], tmp_path)
    assert record["precision"] == "int8"
    assert record["calibration"] == calibration_record(TEXTS).model_dump()
    operators = {
        node.op_type for node in onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph.node
    }
    assert "DequantizeLinear" in operators and "MatMulInteger" not in operators
    refused = run_here(*arguments, data, cwd=tmp_path)
    assert refused.code == 2 and "--calibration belongs to --precision int8" in refused.err
    arguments[5] = tmp_path / "another"
    missing = run_here(*arguments, tmp_path / "none.tsv", "--precision", "int8", cwd=tmp_path)
    assert missing.code == 2 and "none.tsv: no such file" in missing.err
