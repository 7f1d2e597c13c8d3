"""Accuracy that an export records: of PyTorch in fp32 and of the graph, where the data has the model's labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporters.onnx import export_merged, export_switchable
from exporters.onnx.accuracy import MAX_ROWS, Labelled, choose_labelled, measure_accuracy
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import CheckFailed, InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.tasks.classification import Classification
from qrlora_deploy.tasks.regression import Regression
from tests.cli.running import run_here, succeed_here
from tests.tiny import LABELS, SENTENCES

TASK = Classification()
ROWS = 40
"""More than a batch, and not a multiple of one."""


def labelled_by(checkpoint: Checkpoint, model: Any, wrong: int) -> Examples:
    """Rows whose labels are the model's own answers to single texts, but for the first `wrong` ones."""
    tokenizer = checkpoint.tokenizer()
    texts = [" ".join([SENTENCES[row % len(SENTENCES)], *["again"] * (row // len(SENTENCES))]) for row in range(ROWS)]
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    labels = [LABELS[(answer + (row < wrong)) % len(LABELS)] for row, answer in enumerate(answers)]
    assert set(labels) <= set(LABELS)
    return Examples(texts, None, labels, "made up")


def test_accuracy_of_a_merged_customer(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    model = checkpoint.load_model()
    merge_model(model, checkpoint, tiny_basis, tiny_customer)
    examples = labelled_by(checkpoint, model, wrong=10)
    steps: list[tuple[str, int, int]] = []
    parity = export_merged(
        ExportJob(checkpoint, tiny_basis, tmp_path / "acme", tiny_customer, progress=lambda *step: steps.append(step)),
        OnnxOptions(data=examples),
    ).parity
    assert (parity.accuracy, parity.accuracy_reference, parity.accuracy_rows) == (0.75, 0.75, ROWS)
    for description in ("accuracy in PyTorch", "accuracy of the graph"):
        assert [step[1:] for step in steps if step[0] == description] == [(32, ROWS), (ROWS, ROWS)]


def test_accuracy_of_a_switchable_bundle_is_the_bases(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_base))
    examples = labelled_by(checkpoint, checkpoint.load_model(), wrong=4)
    parity = export_switchable(
        ExportJob(checkpoint, tiny_basis, tmp_path / "bundle"), OnnxOptions(data=examples, head_labels=6)
    ).parity
    assert (parity.accuracy, parity.accuracy_reference, parity.accuracy_rows) == (0.9, 0.9, ROWS)


class Always:
    """A session that answers with one label."""

    def get_inputs(self) -> list[object]:
        return []

    def run(self, _names: list[str], inputs: dict[str, np.ndarray], _options: object) -> list[np.ndarray]:
        return [np.eye(4, dtype=np.float32)[np.full(len(inputs["input_ids"]), 2)]]


def test_graph_and_pytorch_are_counted_apart() -> None:
    batches = [{"input_ids": np.zeros((rows, 3), dtype=np.int64)} for rows in (3, 2)]
    labelled = Labelled(TASK, batches, [np.array([2, 1, 2]), np.array([0, 2])], right=4)
    found = measure_accuracy(Always(), labelled)
    assert (found.graph, found.reference, found.rows) == (0.6, 0.8, 5)


def test_graph_that_cannot_run_a_batch_is_one_line() -> None:
    class Broken:
        def get_inputs(self) -> list[object]:
            return []

        def run(self, *_arguments: object) -> None:
            raise RuntimeError("no kernel\nand a trace")

    labelled = Labelled(TASK, [{"input_ids": np.zeros((2, 3), dtype=np.int64)}], [np.array([0, 1])], 2)
    with pytest.raises(CheckFailed, match="does not run on a batch of 2 labelled rows: no kernel$"):
        measure_accuracy(Broken(), labelled)


def test_rows_are_spread_over_data_that_is_sorted_by_label() -> None:
    labels = [LABELS[row // 500] for row in range(2000)]
    examples = Examples([str(row) for row in range(2000)], [f"p{row}" for row in range(2000)], labels, "sorted")
    chosen = choose_labelled(examples, TASK, LABELS, strict=True)
    assert chosen is not None and chosen.pairs is not None
    assert len(chosen) == len(set(chosen.texts)) == MAX_ROWS
    assert {label: chosen.labels.count(label) for label in LABELS} == dict.fromkeys(LABELS, 128)
    for text, pair, label in zip(chosen.texts, chosen.pairs, chosen.labels, strict=True):
        assert pair == f"p{text}" and label == labels[int(text)]


def test_labels_that_are_not_the_models() -> None:
    examples = Examples(["a", "b", "c"], None, ["travel", "other", "home"], "data.tsv")
    foreign = replace(examples, labels=["0", "1", "0"])
    assert choose_labelled(None, TASK, LABELS, strict=True) is None
    assert choose_labelled(foreign, TASK, LABELS, strict=True) is None
    assert choose_labelled(examples, TASK, LABELS, strict=False) is None
    assert choose_labelled(examples, Regression(), LABELS, strict=True) is None
    with pytest.raises(InputError, match=r"data\.tsv: 1 of its labels are not the customer's: other; give data"):
        choose_labelled(examples, TASK, LABELS, strict=True)


def test_accuracy_on_the_command_line(
    tiny_base: Path, tiny_basis_file: Path, tiny_customer_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.tsv"
    data.write_text("text\tlabel\n" + "".join(f"{text}\ttravel\n" for text in SENTENCES))
    merged = ["export", "--merge", "--coefficients", tiny_customer_file, "--basis", tiny_basis_file, tiny_base]
    record = succeed_here([*merged, "--data", data, "-o", tmp_path / "a"], tmp_path)
    assert record["parity"]["accuracy_rows"] == len(SENTENCES)
    assert record["parity"]["accuracy"] == record["parity"]["accuracy_reference"]
    shown = run_here(*merged, "--data", data, "-o", tmp_path / "b", cwd=tmp_path)
    assert f"accuracy_rows {len(SENTENCES)}" in shown.out
    assert "accuracy_r" not in run_here(*merged, "-o", tmp_path / "c", cwd=tmp_path).out
    data.write_text("text\tlabel\nbook a flight\ttravel\npay a bill\tmoney\n")
    refused = run_here(*merged, "--data", data, "-o", tmp_path / "d", cwd=tmp_path)
    assert refused.code != 0 and "not the customer's: money" in refused.err
    assert not (tmp_path / "d").exists()
