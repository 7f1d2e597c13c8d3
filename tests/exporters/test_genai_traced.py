"""Decoders whose family has no description: transformers' own model is traced, and answers as it does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.genai.exporter import EXPORTER
from exporters.genai.options import GenaiOptions
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from tests.decoders import force, make_basis, make_customers, save_tiny
from tests.exporters.test_genai import padded, run, session_of, tables
from tests.tiny_decoder import save_decoder
from tests.tolerances import DECODER_FP32

TARGETS = ("q_proj", "v_proj", "query_key_value", "dense")


def opened(folder: Path, family: str) -> tuple[Checkpoint, Basis]:
    """A tiny decoder with a sliding window where its family has one."""
    if family == "Mistral":
        checkpoint = save_tiny(folder, family, sliding_window=6)
    else:
        checkpoint = open_checkpoint(str(save_decoder(folder, family)))
    return checkpoint, make_basis(checkpoint, TARGETS)


@pytest.mark.parametrize(
    "family",
    [
        "GPTNeoX",
        pytest.param("Mistral", marks=pytest.mark.slow),
        pytest.param("OPT", marks=pytest.mark.slow),
        pytest.param("Olmo2", marks=pytest.mark.slow),
        pytest.param("Granite", marks=pytest.mark.slow),
    ],
)
def test_rows_answer_as_transformers_does_whichever_side_is_padded(family: str, tmp_path: Path) -> None:
    checkpoint, basis = opened(tmp_path / "base", family)
    forced = force(checkpoint, basis, make_customers(basis), lengths=(13, 4, 9))
    record = EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "rows"), GenaiOptions(builder="torch"))
    assert (record["builder"], record["variant"]) == ("torch", "rows")
    session = session_of(tmp_path / "rows")
    customers = {"coefficient_table": tables(basis), "slot": np.arange(3)}
    for left in (False, True):
        found = run(session, padded(forced.prompts, left) | customers, forced.following)
        np.testing.assert_allclose(found, forced.logits, **DECODER_FP32)
    assert EXPORTER.verify(tmp_path / "rows", None, "cpu").failure is None
    graph = onnx.load(tmp_path / "rows/onnx/model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "Attention" and not node.domain for node in graph.node) == session_layers(checkpoint)
    axes: dict[str, Any] = {
        value.name: [axis.dim_param for axis in value.type.tensor_type.shape.dim] for value in graph.input
    }
    assert axes["past_key_values.0.key"][::2] == ["batch_size", "past_sequence_length"]


def session_layers(checkpoint: Checkpoint) -> int:
    return int(checkpoint.config.num_hidden_layers)


@pytest.mark.slow
def test_adapters_and_one_customer(tmp_path: Path) -> None:
    checkpoint, basis = opened(tmp_path / "base", "GPTNeoX")
    values = make_customers(basis)
    forced = force(checkpoint, basis, values[[1, 1, 1]])
    customer = Coefficients(values[1], basis.digest, checkpoint.name, checkpoint.digest, "text-generation", ())
    EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "drop-in"), GenaiOptions(variant="drop-in"))
    EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "merged", customer), GenaiOptions())
    feeds = padded(forced.prompts, left=True)
    dropped = session_of(tmp_path / "drop-in")
    found = run(dropped, feeds | {"coefficient_table": tables(basis)[1:2]}, forced.following)
    np.testing.assert_allclose(found, forced.logits, **DECODER_FP32)
    found = run(session_of(tmp_path / "merged"), feeds, forced.following)
    np.testing.assert_allclose(found, forced.logits, **DECODER_FP32)
    base = force(checkpoint, basis, values[[0, 0, 0]])
    np.testing.assert_allclose(run(dropped, feeds, base.following), base.logits, **DECODER_FP32)


def test_what_cannot_be_traced_ends_in_one_line(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_decoder(tmp_path / "base", "Bloom", hidden_size=32, n_head=4, n_layer=2)))
    basis = make_basis(checkpoint, ("dense",))
    with pytest.raises(InputError, match="its attention is its own"):
        EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "model"), GenaiOptions())
    with pytest.raises(InputError, match="'bloom' cannot be exported this way"):
        EXPORTER.export(ExportJob(checkpoint, basis, tmp_path / "model"), GenaiOptions(builder="family"))
    with pytest.raises(InputError, match="builder='torch' is for fp32"):
        GenaiOptions(builder="torch", precision="int4")
    assert not (tmp_path / "model").exists()
