"""A model repository: what Triton reads of it, and its graph against PyTorch and against a switchable session."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors
import safetensors.numpy
import torch

from exporters.triton.config_text import Word, config_text
from exporters.triton.configs import lengths_of
from exporters.triton.exporter import EXPORTER
from exporters.triton.options import TritonOptions
from exporters.triton.repository import export_repository
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import CheckFailed, FileFormatError, InputError
from qrlora_deploy.exporting.job import ExportJob, Original
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.runtime import open_bundle
from qrlora_deploy.runtime.bundle.row_layout import HeadLayout, TableLayout
from qrlora_deploy.runtime.bundle.sealed_facts import read_reference_facts
from qrlora_deploy.runtime.sessions.switchable import SwitchableSession
from tests.cli.running import run_here, succeed_here
from tests.decoders import make_basis, save_tiny
from tests.tiny import SENTENCES
from tests.tolerances import FP16_ROWS, FP32_ONNX

TRITON = os.environ.get("QRLORA_TRITON", "")

FRONT = """\
name: "intents"
backend: "python"
max_batch_size: 4
input {
  name: "text"
  data_type: TYPE_STRING
  dims: [ 1 ]
}
input {
  name: "text_pair"
  data_type: TYPE_STRING
  dims: [ 1 ]
  optional: true
}
input {
  name: "customer"
  data_type: TYPE_STRING
  dims: [ 1 ]
  optional: true
}
output {
  name: "logits"
  data_type: TYPE_FP32
  dims: [ -1 ]
}
"""

GRAPH = """\
name: "intents_graph"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: 4
input {
  name: "input_ids"
  data_type: TYPE_INT64
  dims: [ -1 ]
}
input {
  name: "attention_mask"
  data_type: TYPE_INT64
  dims: [ -1 ]
}
input {
  name: "token_type_ids"
  data_type: TYPE_INT64
  dims: [ -1 ]
}
input {
  name: "coefficients"
  data_type: TYPE_FP32
  dims: [ 56 ]
}
input {
  name: "head"
  data_type: TYPE_FP32
  dims: [ 198 ]
}
output {
  name: "logits"
  data_type: TYPE_FP32
  dims: [ 6 ]
}
version_policy {
  latest {
    num_versions: 1
  }
}
dynamic_batching {
  default_queue_policy {
    max_queue_size: 1024
  }
}
instance_group {
  count: 1
  kind: KIND_CPU
}
model_warmup {
  name: "1 rows"
  batch_size: 1
  inputs {
    key: "input_ids"
"""

PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2

read = [text_format.Parse(open(path).read(), model_config_pb2.ModelConfig()) for path in sys.argv[1:]]
print(json.dumps([json_format.MessageToDict(one, preserving_proto_field_name=True) for one in read]))
"""


def test_the_configurations_are_what_triton_reads(repository: Path) -> None:
    assert (repository / "intents" / "config.pbtxt").read_text().startswith(FRONT)
    assert (repository / "intents_graph" / "config.pbtxt").read_text().startswith(GRAPH)


def test_every_input_and_output_of_the_graph_has_a_batch_axis_first(repository: Path) -> None:
    session = onnxruntime.InferenceSession(
        repository / "intents_graph" / "1" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    assert {value.shape[0] for value in (*session.get_inputs(), *session.get_outputs())} == {"batch"}


def test_the_warm_up_runs(repository: Path) -> None:
    """Triton repeats the row of the files as often as a batch has rows."""
    graph = repository / "intents_graph"
    session = onnxruntime.InferenceSession(graph / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    types = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
    inputs = {
        value.name: np.tile(np.fromfile(graph / "warmup" / value.name, dtype=types[value.type]), (4, 1))
        for value in session.get_inputs()
    }
    logits = session.run(None, inputs)[0]
    assert logits.shape == (4, 6) and np.isfinite(logits).any()


def test_text_of_a_configuration() -> None:
    message = {
        "kind": Word("A"),
        "yes": True,
        "n": [1, -1],
        "text": 'a "b"\n',
        "empty": {},
        "many": [{"x": 1}, {"x": 2}],
    }
    lines = ["kind: A", "yes: true", "n: [ 1, -1 ]", r'text: "a \"b\"\n"', "empty { }"]
    assert config_text(message) == "\n".join([*lines, "many {", "  x: 1", "}", "many {", "  x: 2", "}", ""])


def test_lengths_double_up_to_what_the_model_takes() -> None:
    assert lengths_of(512) == (16, 32, 64, 128, 256, 512)
    assert lengths_of(10) == (10,) and lengths_of(70)[-2:] == (64, 70)


@pytest.mark.skipif(not TRITON, reason="QRLORA_TRITON names no Python with tritonclient[grpc], which has the schema")
def test_the_configurations_are_of_tritons_schema(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path
) -> None:
    options = TritonOptions(
        head_labels=6, data=texts, queue_delay_us=200, queue_timeout_ms=500, instances=2, fronts=3, provider="cpu"
    )
    export_repository(ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "models"), options)
    files = [tmp_path / "models" / name / "config.pbtxt" for name in ("qrlora", "qrlora_graph")]
    ran = subprocess.run(
        [TRITON, "-c", PARSE, *map(str, files)], capture_output=True, text=True, check=True, timeout=60
    )
    front, graph = json.loads(ran.stdout)
    assert [(one["backend"], one["max_batch_size"]) for one in (front, graph)] == [("python", 64), ("onnxruntime", 64)]
    assert [one["instance_group"] for one in (front, graph)] == [
        [{"count": count, "kind": "KIND_CPU"}] for count in (3, 2)
    ]
    # REJECT is the first value of its enumeration, and so is left out.
    policy = {"default_timeout_microseconds": "500000", "allow_timeout_override": True, "max_queue_size": 1024}
    batching = {"max_queue_delay_microseconds": "200", "default_queue_policy": policy}
    assert front["dynamic_batching"] == graph["dynamic_batching"] == batching
    assert {entry["batch_size"] for entry in graph["model_warmup"]} == {1, 64}
    assert all(set(entry["inputs"]) == {one["name"] for one in graph["input"]} for entry in graph["model_warmup"])
    assert front["parameters"]["graph"] == {"string_value": "qrlora_graph"}


def rows_of(bundle: Path, customers: list[Coefficients | None]) -> dict[str, np.ndarray]:
    """What each row brings, made by the layouts alone."""
    manifest = open_bundle(bundle).manifest
    layout = TableLayout([target.rank for target in manifest.targets])
    nobody = np.zeros(layout.total_rank, dtype=np.float32)
    return {"coefficients": np.stack([layout.row(one.values if one else nobody) for one in customers])}


def encoded(base: Path, kind: str) -> Any:
    return open_checkpoint(str(base)).tokenizer()(list(SENTENCES), padding=True, return_tensors=kind)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_batch_of_different_customers_against_pytorch_and_a_session(
    precision: str,
    tiny_base: Path,
    tiny_basis: Basis,
    texts: Examples,
    switchable: Path,
    customers: dict[str, Coefficients],
    tmp_path: Path,
) -> None:
    job = ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "models")
    export_repository(job, TritonOptions(data=texts, precision=precision))
    version = tmp_path / "models" / "qrlora_graph" / "1"
    names = ["acme", "beta", None, "acme", None, "beta"]
    owners = [customers[name] if name else None for name in names]
    inputs = {name: array.astype(np.int64) for name, array in encoded(tiny_base, "np").items()}
    graph = onnxruntime.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])
    found = graph.run(["logits"], inputs | rows_of(version, owners))[0]

    model = job.checkpoint.load_model()
    adapters = attach(model, tiny_basis)
    both, expected = encoded(tiny_base, "pt"), []
    for row, owner in enumerate(owners):
        set_coefficients(adapters, tiny_basis, owner.values if owner else np.zeros_like(customers["acme"].values))
        with torch.no_grad():
            expected.append(model(**both).logits[row].numpy())
    tolerance = FP32_ONNX if precision == "fp32" else FP16_ROWS
    np.testing.assert_allclose(found, np.stack(expected), **tolerance)
    session = SwitchableSession(open_bundle(switchable), threads=1)
    for name in ("acme", "beta"):
        session.load(name, customers[name])
    np.testing.assert_allclose(found, session.predict(inputs, names)[0][:, :4], **tolerance)
    base = graph.run(["logits"], inputs | rows_of(version, [None] * 6))[0]
    assert np.abs(found[0] - base[0]).max() > 0.05, "a customer that changes nothing would hide every mistake"


def test_rows_with_heads_of_their_own(repository: Path, customers: dict[str, Coefficients], tiny_base: Path) -> None:
    """`head` holds weights, then biases; labels that a customer does not have are -inf."""
    version = repository / "intents_graph" / "1"
    manifest = open_bundle(version).manifest
    layout, head = TableLayout([target.rank for target in manifest.targets]), HeadLayout(6, 32)
    gamma = customers["gamma"]
    row = head.row(gamma.head["classifier.weight"], gamma.head["classifier.bias"])
    inputs = {name: array.astype(np.int64) for name, array in encoded(tiny_base, "np").items()}
    inputs |= {"coefficients": np.stack([layout.row(gamma.values)] * 6), "head": np.stack([row] * 6)}
    graph = onnxruntime.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])
    found = graph.run(["logits"], inputs)[0]
    assert (found[:, 2:] == -np.inf).all() and np.isfinite(found[:, :2]).all()


def test_verify_says_whether_it_is_right(
    repository: Path, tiny_base: Path, tiny_basis: Basis, customers: dict[str, Coefficients], texts: Examples
) -> None:
    verdict = EXPORTER.verify(repository, None, "cpu")
    assert verdict.failure is None and verdict.facts["max_abs_error"] <= verdict.facts["bound"]
    original = Original(open_checkpoint(str(tiny_base)), tiny_basis, customers["beta"], texts)
    assert EXPORTER.verify(repository, original, "cpu").failure is None


def damage_front(folder: Path) -> None:
    (folder / "intents" / "1" / "tokenizer.json").write_text("{}")


def change_weights(folder: Path) -> None:
    data = folder / "intents_graph" / "1" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\0\1")


def take_the_front(folder: Path) -> None:
    (folder / "intents").rename(folder / "elsewhere")


def take_the_graph(folder: Path) -> None:
    (folder / "intents_graph" / "1" / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (damage_front, FileFormatError, "tokenizer.json was changed"),
        (change_weights, FileFormatError, "model.onnx.data was changed"),
        (take_the_front, InputError, "is not the front of its graph"),
        (take_the_graph, InputError, "holds 0 graphs, not one"),
    ],
)
def test_a_damaged_repository_is_refused(
    damage: Callable[[Path], None], error: type[Exception], message: str, repository: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "models"
    subprocess.run(["cp", "-r", str(repository), str(copied)], check=True)
    damage(copied)
    with pytest.raises(error, match=message):
        EXPORTER.verify(copied, None, "cpu")


def test_a_graph_that_mixes_customers_up_is_not_left(
    tiny_base: Path, tiny_basis: Basis, texts: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporters.onnx.customer_rows import BroughtRows

    by_row = BroughtRows.by_row

    def wrong(self: BroughtRows, inputs: dict[str, torch.Tensor]) -> Any:
        coefficients, heads = by_row(self, inputs)
        return coefficients.flip(0), heads

    monkeypatch.setattr(BroughtRows, "by_row", wrong)
    with pytest.raises(CheckFailed, match="logits differ from PyTorch"):
        export_repository(
            ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "models"), TritonOptions(data=texts)
        )
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path) -> None:
    arguments = ["export", tiny_base, "--basis", tiny_basis_file, "--format", "triton", "-o", "models"]
    options = ["--name", "intents", "--max-batch", "8", "--precision", "fp16"]
    shown = succeed_here([*arguments, *options], tmp_path)
    assert shown["kind"] == "triton" and shown["models"] == ["intents", "intents_graph"]
    assert succeed_here(["verify", "models", "--format", "triton"], tmp_path)["bound"] > 0
    graph = tmp_path / "models" / "intents_graph" / "1"
    assert succeed_here(["inspect", graph], tmp_path)
    for wrong, message in (
        (["--name", "a/b"], "--name must be of letters"),
        (["--precision", "int8"], "int8"),
        (["--calibration", tiny_base], "--calibration is no option of --format triton"),
        (["--coefficients", tiny_customer_file], "leave --coefficients out"),
    ):
        failed = run_here(*arguments[:-1], "other", *wrong, cwd=tmp_path)
        assert failed.code == 2 and message in failed.err, failed.err
    with pytest.raises(InputError, match="is a per-row bundle; export a switchable one"):
        SwitchableSession(open_bundle(graph))


def test_a_front_can_be_opened_without_its_graph_alone(repository: Path) -> None:
    front = repository / "intents" / "1"
    assert open_bundle(front, graph=False).manifest.kind == "per-row"
    with pytest.raises(FileFormatError, match="model.onnx is missing"):
        open_bundle(front)


def test_more_labels_than_the_base_needs_head_labels(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    job = ExportJob(open_checkpoint(str(tiny_base)), tiny_basis, tmp_path / "models")
    with pytest.raises(InputError, match="head_labels=2 is less than the base's 4 labels"):
        export_repository(job, TritonOptions(head_labels=2))
    with pytest.raises(InputError, match="a per-row bundle serves all customers"):
        export_repository(replace(job, coefficients=object()), TritonOptions())  # type: ignore[arg-type]


def drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["1.coefficients"]


def shorten(tensors: dict[str, np.ndarray]) -> None:
    tensors["1.coefficients"] = tensors["1.coefficients"][:-1]


def narrow(tensors: dict[str, np.ndarray]) -> None:
    tensors["1.head"] = tensors["1.head"][:, :-1]


def flatten(tensors: dict[str, np.ndarray]) -> None:
    tensors["0.head"] = tensors["0.head"].reshape(-1)


@pytest.mark.parametrize("spoil", [drop, shorten, narrow, flatten])
def test_a_reference_whose_rows_bring_too_little_is_refused(
    spoil: Callable[[dict[str, np.ndarray]], None], repository: Path, tmp_path: Path
) -> None:
    source = repository / "intents_graph" / "1" / "reference.safetensors"
    with safetensors.safe_open(source, framework="np") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(source)
    facts = read_reference_facts(source)
    layout = TableLayout([target.rank for target in open_bundle(source.parent).manifest.targets])
    np.testing.assert_array_equal(facts.columns, layout.columns)
    spoil(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "reference.safetensors", metadata)
    with pytest.raises(FileFormatError, match=r"its (coefficients|head) have another shape"):
        read_reference_facts(tmp_path / "reference.safetensors")


def test_a_decoder_is_refused_before_any_work(tmp_path: Path) -> None:
    checkpoint = save_tiny(tmp_path / "base")
    job = ExportJob(checkpoint, make_basis(checkpoint), tmp_path / "models")
    with pytest.raises(InputError, match="is a decoder, which writes text"):
        export_repository(job, TritonOptions())
    assert not job.output.exists()
