"""Adapter files: ONNX Runtime lays them over a switchable graph, and the logits are those of our side branch."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from exporters.onnx_adapter.adapter_file import export_adapter
from exporters.onnx_adapter.exporter import EXPORTER
from exporters.onnx_adapter.options import AdapterOptions
from qrlora_deploy.errors import BasisMismatchError, CheckFailed, InputError, QrloraError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.exporting.registry import find_exporter
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, write_coefficients
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from tests.cli.running import run_here, succeed_here
from tests.tiny import SENTENCES
from tests.tolerances import EXACT, FP32_ONNX

WITH_HEADS = AdapterOptions(head_labels=6)
"""As the fixture `switchable` has it."""

TABLES = ("coefficient_table", "head_table")


@pytest.fixture
def job(tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path) -> ExportJob:
    """The tiny customer."""
    return ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "acme.onnx_adapter", tiny_customer)


def with_head(customer: Coefficients, labels: int) -> Coefficients:
    random = np.random.default_rng(5)
    weight = random.normal(scale=0.5, size=(labels, 32)).astype(np.float32)
    head = {"classifier.weight": weight, "classifier.bias": random.normal(size=labels).astype(np.float32)}
    return replace(customer, head=head, labels=tuple(f"label {index}" for index in range(labels)))


def session_with_defaults(bundle: Path) -> Any:
    """The bundle's graph with the tables as inputs that need not be fed, as docs/interop.md opens it.

    ONNX Runtime's Python `run` refuses a feed without a required input, even where an adapter gives it.
    """
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    have = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in TABLES and value.name not in have:
            width = value.type.tensor_type.shape.dim[1].dim_value
            model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, width), np.float32), value.name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that a default may be replaced, which is what it is for
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def adapter_logits(bundle: Path, file: Path, checkpoint: Checkpoint, row: int = 1) -> np.ndarray:
    """What plain ONNX Runtime answers with the adapter active."""
    session = session_with_defaults(bundle)
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(file))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    both = checkpoint.tokenizer()(list(SENTENCES), padding=True, return_tensors="np")
    inputs = {name: array.astype(np.int64) for name, array in both.items()}
    slot = np.full(len(SENTENCES), row, dtype=np.int64)
    return session.run(["logits"], inputs | {"slot": slot}, options)[0]


def side_branch_logits(checkpoint: Checkpoint, basis: Basis, customer: Coefficients) -> np.ndarray:
    model = checkpoint.load_model()
    for name, values in customer.head.items():
        setattr(model.classifier, name.removeprefix("classifier."), torch.nn.Parameter(torch.from_numpy(values)))
    set_coefficients(attach(model, basis), basis, customer.values)
    both = checkpoint.tokenizer()(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**both).logits.numpy()


def read_tables(file: Path) -> dict[str, np.ndarray]:
    adapter = onnxruntime.AdapterFormat.read_adapter(str(file))
    parameters = adapter.get_parameters()
    return {name: value.numpy().copy() for name, value in parameters.items()}


@pytest.mark.parametrize("labels", [0, 6, 3], ids=lambda labels: f"own head of {labels}" if labels else "base's head")
def test_onnx_runtime_answers_as_our_side_branch(labels: int, switchable: Path, job: ExportJob) -> None:
    customer = job.coefficients
    assert customer is not None
    if labels:
        customer = with_head(customer, labels)
    export_adapter(replace(job, coefficients=customer), WITH_HEADS)
    expected = side_branch_logits(job.checkpoint, job.basis, customer)
    base = side_branch_logits(job.checkpoint, job.basis, replace(customer, values=customer.values * 0))
    assert np.abs(expected - base).max() > 0.05, "a customer that changes nothing would hide every mistake"
    found = adapter_logits(switchable, job.output, job.checkpoint)
    np.testing.assert_allclose(found[:, : len(customer.labels)], expected, **FP32_ONNX)
    assert (found[:, len(customer.labels) :] == -np.inf).all()


def test_code_of_the_documentation_runs(switchable: Path, job: ExportJob, monkeypatch: pytest.MonkeyPatch) -> None:
    export_adapter(job, WITH_HEADS)
    page = (Path(__file__).parents[2] / "docs" / "interop.md").read_text("utf-8")
    code = next(part for part in page.split("```python\n") if "add_active_adapter" in part).split("```")[0]
    (job.output.parent / "bundle").symlink_to(switchable)
    monkeypatch.chdir(job.output.parent)
    names: dict[str, Any] = {}
    exec(code.replace('["turn the lights off", "add milk to my shopping list"]', repr(list(SENTENCES))), names)
    found = adapter_logits(switchable, job.output, job.checkpoint)
    np.testing.assert_allclose(names["logits"], found, **EXACT)


def test_row_0_is_the_base(switchable: Path, job: ExportJob) -> None:
    assert job.coefficients is not None
    export_adapter(replace(job, coefficients=with_head(job.coefficients, 6)), WITH_HEADS)
    nobody = replace(job.coefficients, values=job.coefficients.values * 0)
    found = adapter_logits(switchable, job.output, job.checkpoint, row=0)
    np.testing.assert_allclose(found[:, :4], side_branch_logits(job.checkpoint, job.basis, nobody), **FP32_ONNX)


def test_file_holds_the_tables_of_the_contract(job: ExportJob) -> None:
    written = export_adapter(job, WITH_HEADS)
    json.dumps(written)
    width = sum(-(-rank // 8) * 8 for rank in job.basis.ranks.values())
    shapes = {"coefficient_table": [2, width], "head_table": [2, 6 * 33]}
    assert written["kind"] == "onnx-adapter" and written["parameters"] == shapes
    tables = read_tables(job.output)
    assert {name: list(table.shape) for name, table in tables.items()} == shapes
    assert all(table.dtype == np.float32 for table in tables.values())
    assert job.coefficients is not None and not tables["coefficient_table"][0].any()
    row = tables["coefficient_table"][1]
    np.testing.assert_allclose(row[row != 0], job.coefficients.values, **EXACT)
    # Both rows of the head are the base's: the customer has none of its own.
    np.testing.assert_allclose(tables["head_table"][1], tables["head_table"][0], **EXACT)


def test_without_head_labels_there_is_no_head_table(job: ExportJob) -> None:
    export_adapter(job)
    assert read_tables(job.output).keys() == {"coefficient_table"}


OLD = b"....TORT the old one"
"""What the file of an adapter begins like."""


def test_file_is_replaced_whole_or_not_at_all(job: ExportJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job.output.write_bytes(OLD)

    class Damaging(onnxruntime.AdapterFormat):
        def set_parameters(self, params: dict[str, Any]) -> None:
            wrong = {name: value.numpy() * 2 for name, value in params.items()}
            self.held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in wrong.items()}
            super().set_parameters(self.held)

    class Refusing(onnxruntime.AdapterFormat):
        def export_adapter(self, file_path: Any) -> None:
            raise RuntimeError("no space left\nsomewhere")

    class Cutting(onnxruntime.AdapterFormat):
        def export_adapter(self, file_path: Any) -> None:
            super().export_adapter(file_path)
            Path(file_path).write_bytes(Path(file_path).read_bytes()[:100])

    cases: list[tuple[type, type[QrloraError], str]] = [
        (Damaging, CheckFailed, "holds other numbers"),
        (Refusing, QrloraError, "cannot write the adapter: no space left$"),
        (Cutting, CheckFailed, "cannot be read back"),
    ]
    for wrong, error, message in cases:
        with monkeypatch.context() as patched:
            patched.setattr(onnxruntime, "AdapterFormat", wrong)
            with pytest.raises(error, match=message):
                export_adapter(job, WITH_HEADS)
        assert job.output.read_bytes() == OLD
        assert list(job.output.parent.iterdir()) == [job.output]
    export_adapter(job, WITH_HEADS)
    assert read_tables(job.output).keys() == set(TABLES)


Change = Callable[[ExportJob], ExportJob]
HEAD_LABELS = {"an own head without room": 0, "too little room for the base": 3}
"""Room for heads in the cases below, where it is not 6."""

REFUSED: dict[str, tuple[Change, type[InputError], str]] = {
    "no customer": (lambda job: replace(job, coefficients=None), InputError, "coefficients"),
    "an own head without room": (
        lambda job: replace(job, coefficients=with_head(job.coefficients, 6)),  # type: ignore[arg-type]
        InputError,
        "give head_labels",
    ),
    "an own head with too little room": (
        lambda job: replace(job, coefficients=with_head(job.coefficients, 7)),  # type: ignore[arg-type]
        InputError,
        "head_labels=6 is less than the customer's 7 labels",
    ),
    "too little room for the base": (
        lambda job: job,
        InputError,
        "head_labels=3 is less than the .* 4 labels",
    ),
    "another basis": (
        lambda job: replace(job, coefficients=replace(job.coefficients, basis_digest="0" * 64)),  # type: ignore[type-var]
        BasisMismatchError,
        "trained on basis 000000000000",
    ),
    "another base": (
        lambda job: replace(job, coefficients=replace(job.coefficients, base_digest="0" * 64)),  # type: ignore[type-var]
        BasisMismatchError,
        "trained on base 000000000000",
    ),
    "a place that is not there": (
        lambda job: replace(job, output=job.output.parent / "no" / "file"),
        InputError,
        "no does not exist",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(why: str, job: ExportJob) -> None:
    change, error, message = REFUSED[why]
    with pytest.raises(error, match=message) as caught:
        export_adapter(change(job), AdapterOptions(HEAD_LABELS.get(why, 6)))
    assert "\n" not in str(caught.value)
    assert list(job.output.parent.iterdir()) == []


def test_command_line_writes_a_file(switchable: Path, job: ExportJob, tmp_path: Path) -> None:
    assert find_exporter("onnx-adapter") is EXPORTER
    assert job.coefficients is not None
    customer = with_head(job.coefficients, 5)
    write_coefficients(customer, tmp_path / "acme.safetensors")
    options = ["export", "--format", "onnx-adapter", "--coefficients", "acme.safetensors", "-o", job.output.name]
    ran = run_here(*options, cwd=tmp_path)
    assert ran.code == 2 and ran.err.startswith("Error: the customer has a head") and ran.err.count("\n") == 1
    assert succeed_here([*options, "--head-labels", 6], tmp_path)["head_labels"] == 6
    found = adapter_logits(switchable, job.output, job.checkpoint)
    np.testing.assert_allclose(found[:, :5], side_branch_logits(job.checkpoint, job.basis, customer), **FP32_ONNX)


def test_a_file_that_is_no_adapter_stays(job: ExportJob) -> None:
    job.output.write_bytes(b"text\tlabel\n")
    with pytest.raises(InputError, match="already exists and is no ONNX adapter"):
        export_adapter(job)
    assert job.output.read_bytes() == b"text\tlabel\n"
