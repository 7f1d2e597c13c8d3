"""What a bundle holds beside its graph, and the manifest that seals it."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import safetensors.numpy
import tokenizers

from exporters.onnx.accuracy import Accuracy
from exporters.onnx.graph import Graph
from exporters.onnx.prepared import Prepared
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.provenance import tool_versions
from qrlora_deploy.models.head import set_thresholds
from qrlora_deploy.runtime.bundle.bundle import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    TOKENIZER_FILE,
    Manifest,
    ParityRecord,
    TargetRecord,
    TensorRecord,
    digest_files,
)
from qrlora_deploy.runtime.bundle.manifest_parts import CalibrationRecord
from qrlora_deploy.runtime.bundle.row_layout import BASE_HEAD_FILE, HeadLayout, padded_rank
from qrlora_deploy.runtime.sessions.token_index import FIRST_RUNTIME
from qrlora_deploy.runtime.verification.parity import Case, ParityReport, customer_effect, write_reference
from qrlora_deploy.tasks.base import TASK_FIELD, Task
from qrlora_deploy.tasks.registry import task_named, task_of_config

README = """# {task}, {columns}

A {kind} bundle in {precision}, written by qrlora-deploy: {what}

    qrlora-deploy verify .
    {predict}

`manifest.json` says what it was made from and seals every file. `model.onnx` takes {inputs}
and gives `{answer}`; it runs in ONNX Runtime {runtime} or newer (opset {opset}).
"""
RUNTIMES = {23: "1.23", 24: FIRST_RUNTIME}
"""The first ONNX Runtime that computes the operators of each opset as they are used here."""

WHAT = {
    "merged": "one customer folded into its base, as plain ONNX.",
    "switchable": "any customer of its base in any row of a batch.",
    "per-row": "any customer of its base in any row of a batch, each row with its customer's numbers.",
}

PREDICT = {
    "merged": 'qrlora-deploy predict . --text "..."',
    "switchable": 'qrlora-deploy predict . --customers FOLDER --customer acme --text "..."',
    "per-row": "qrlora-deploy inspect .",
}


@dataclass(frozen=True)
class Content:
    """What the graph answers, and for whom.

    Attributes:
        kind: "merged", "switchable" or "per-row".
        labels: of the customer, or of the base.
        thresholds: of the labels; empty where there are none.
        outputs: size of the last axis of the logits.
        coefficients_digest: the customer of a merged bundle.
        head: columns of the head table, where customers may have a head of their own.
        base_head: weight `[labels, features]` and bias `[labels]` of the base, where there is `head`.
    """

    kind: str
    task: str
    labels: tuple[str, ...]
    outputs: int
    coefficients_digest: str | None = None
    head: HeadLayout | None = None
    base_head: tuple[np.ndarray, np.ndarray] | None = None
    thresholds: tuple[float, ...] = ()

    @property
    def deciding_task(self) -> Task:
        """The task, which decides by the thresholds."""
        return task_named(self.task).deciding_at(self.thresholds)


@dataclass(frozen=True)
class Checked:
    """A graph that was written and agrees with PyTorch.

    Attributes:
        graph: what was written.
        reference: PyTorch's logits.
        report: the comparison with them.
        provider: execution provider of the comparison.
        accuracy: on labelled rows, where there are any.
        calibration: what the constant scales of an int8 graph come from; None: it has none.
        not_shown: what the comparison would not have noticed the lack of.
    """

    graph: Graph
    reference: list[Case]
    report: ParityReport
    provider: str
    accuracy: Accuracy | None = None
    calibration: CalibrationRecord | None = None
    not_shown: tuple[str, ...] = ()


def write_side_files(folder: Path, prepared: Prepared, content: Content, checked: Checked) -> None:
    """Config, tokenizer, the base's head and a README."""
    model, tokenizer = prepared.model, prepared.tokenizer
    if content.labels:
        model.config.id2label = dict(enumerate(content.labels))
        model.config.label2id = {label: index for index, label in enumerate(content.labels)}
    _name_task(model.config, content)
    set_thresholds(model.config, content.thresholds)
    model.config.to_json_file(folder / "config.json")
    write_tokenizer(folder, tokenizer)
    if content.base_head is not None:
        weight, bias = content.base_head
        (folder / BASE_HEAD_FILE).write_bytes(safetensors.numpy.save({"weight": weight, "bias": bias}))
    readme = README.format(
        task=content.task,
        columns=f"{len(content.labels)} labels" if content.labels else f"{content.outputs} numbers a text",
        answer=_answer_text(content),
        kind=content.kind,
        precision=checked.report.precision,
        runtime=RUNTIMES[checked.graph.opset],
        opset=checked.graph.opset,
        what=WHAT[content.kind],
        predict=PREDICT[content.kind],
        inputs=", ".join(f"`{record.name}` {record.dtype} [{_axes(record)}]" for record in checked.graph.inputs),
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer's files, and its chat template where it has one."""
    tokenizer.save_pretrained(folder)
    # What padding and truncation were left on by earlier calls is no part of the tokenizer.
    plain = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    plain.no_padding()
    plain.no_truncation()
    plain.save(str(folder / TOKENIZER_FILE))


def _answer_text(content: Content) -> str:
    """The graph's output and its axes."""
    task = task_named(content.task)
    shape = task.output_shape if content.labels else task.axes(content.outputs)
    return f"{task.output_name} [{', '.join(map(str, shape))}]"


def _name_task(config: Any, content: Content) -> None:
    """Have a config say the task of the bundle, where it says another one or leaves it open."""
    task = task_named(content.task)
    said, architecture = getattr(config, TASK_FIELD, None), str((config.architectures or [""])[0])
    if task_of_config(config.problem_type, len(content.labels), architecture, said) != task:
        config.update(task.config_fields)


def _axes(record: TensorRecord) -> str:
    return ", ".join(map(str, record.shape))


def seal(folder: Path, prepared: Prepared, basis: Basis, content: Content, checked: Checked) -> Manifest:
    """Write the reference logits and the manifest, last of all: it holds the digests of the other files."""
    checkpoint, tokenizer, graph = prepared.checkpoint, prepared.tokenizer, checked.graph
    task = task_named(content.task)
    manifest = Manifest(
        kind=content.kind,  # type: ignore[arg-type]  # pydantic checks both
        task=content.task,
        labels=content.labels,
        thresholds=content.thresholds or None,
        precision=checked.report.precision,  # type: ignore[arg-type]
        calibration=checked.calibration,
        opset=graph.opset,
        basis_digest=basis.digest,
        coefficients_digest=content.coefficients_digest,
        base_name=checkpoint.name,
        base_digest=checkpoint.digest,
        total_rank=basis.total_rank,
        head_labels=content.head.labels if content.head else 0,
        head_features=content.head.features if content.head else 0,
        targets=tuple(
            TargetRecord(name=name, rank=rank, padded_rank=padded_rank(rank)) for name, rank in basis.ranks.items()
        ),
        inputs=graph.inputs,
        outputs=(TensorRecord(name=task.output_name, dtype="float32", shape=task.axes(content.outputs)),),
        files={},
        parity=_parity_record(checked),
        customer_effect=customer_effect(checked.reference),
        attention_nodes=graph.attention_nodes,
        max_length=prepared.max_tokens,
        pad_token_id=tokenizer.pad_token_id,
        padding_side=tokenizer.padding_side,
        pad_token_type_id=tokenizer.pad_token_type_id,
        truncation_side=tokenizer.truncation_side,
        versions=tool_versions()
        | {name: version(name) for name in ("transformers", "onnx", "onnxscript")}
        | {"onnxruntime": onnxruntime.__version__},
    )
    # What decides an answer is in a file that is sealed, too.
    write_reference(checked.reference, folder / REFERENCE_FILE, manifest.sealed_fields())
    manifest = manifest.model_copy(update={"files": digest_files(folder)})
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _parity_record(checked: Checked) -> ParityRecord:
    report, accuracy = checked.report, checked.accuracy
    return ParityRecord(
        max_abs_error=report.max_abs_error,
        bound=report.bound,
        label_agreement=report.label_agreement,
        cases=report.cases,
        worst=report.worst,
        provider=checked.provider,
        effect_correlation=report.effect_correlation,
        effect_error=report.effect_error,
        accuracy=accuracy.graph if accuracy else None,
        accuracy_reference=accuracy.reference if accuracy else None,
        accuracy_rows=accuracy.rows if accuracy else None,
        not_shown=checked.not_shown,
    )
