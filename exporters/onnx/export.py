"""A model as an ONNX bundle: one customer folded in, or any customer in any row."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx.accuracy import Labelled, answer_in_pytorch, choose_labelled, measure_accuracy
from exporters.onnx.customers import base_tables, made_up_customers, mixed_reference, read_base_head
from exporters.onnx.graph import SMALLEST_EXTERNAL_BYTES, input_names, write_graph
from exporters.onnx.precision import cast_inside, check_precision
from exporters.onnx.quantizing import quantize_graph
from exporters.onnx.reference import build_reference, choose_texts
from exporters.onnx.sealing import Checked, Content, seal, write_side_files
from exporters.onnx.switchable import CustomerRows, make_switchable
from qrlora_deploy.basis import Basis
from qrlora_deploy.checkpoint import Checkpoint, check_basis_fits
from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting import ExportJob
from qrlora_deploy.files import atomic_folder, check_free_folder
from qrlora_deploy.merging import merge_model
from qrlora_deploy.runtime.bundle import MODEL_FILE, Manifest
from qrlora_deploy.runtime.layout import head_arrays
from qrlora_deploy.runtime.parity import Case, check_parity, open_for_check
from qrlora_deploy.training.data import Examples

Progress = Callable[[str, int, int], None]
STEPS = ("reference logits in PyTorch", "export", "parity check", "seal the bundle")


@dataclass(frozen=True)
class _Plan:
    """What differs between the kinds of bundles.

    Attributes:
        rows, tables: of a switchable model; the tables hold the base alone.
        labelled: rows to measure accuracy on, answered by PyTorch; None: there are none.
    """

    content: Content
    reference: list[Case]
    model: Any
    rows: CustomerRows | None = None
    tables: dict[str, np.ndarray] | None = None
    labelled: Labelled | None = None


@dataclass(frozen=True)
class _Settings:
    """What does not differ between them: where the bundle goes, and how it is written and checked."""

    output: Path
    provider: str
    precision: str
    progress: Progress | None


def export_bundle(job: ExportJob) -> Mapping[str, Any]:
    """The exporter "onnx": a merged bundle of `job.coefficients`, or a switchable one without them.

    Raises:
        InputError: a head table was asked for with a merged bundle. Else as the two functions below.
    """
    if job.coefficients is None:
        manifest = export_switchable(
            job.checkpoint,
            job.basis,
            job.output,
            job.texts,
            job.provider,
            job.progress,
            job.head_labels,
            job.precision,
        )
    elif job.head_labels:
        raise InputError("--head-labels belongs to a switchable bundle; a merged one has its customer's own head")
    else:
        manifest = export_merged(
            job.checkpoint,
            job.basis,
            job.coefficients,
            job.output,
            job.texts,
            job.provider,
            job.progress,
            job.precision,
        )
    return manifest.model_dump(mode="json")


def export_merged(
    checkpoint: Checkpoint,
    basis: Basis,
    coefficients: Coefficients,
    output: Path,
    texts: Examples | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
    precision: str = "fp32",
) -> Manifest:
    """Write the bundle of one customer to the new folder `output`.

    The bundle is built in a temporary folder and takes its place only after its logits, on
    `provider`, agree with PyTorch's on real text; on any failure nothing is left.

    Args:
        texts: text to check with; what comes with the project if None. Where all its labels are the
            customer's, the accuracy on up to 512 of its rows is recorded too.
        provider: where the check runs, "cpu", "cuda" or "tensorrt".
        progress: called with a description, the steps done and all steps.
        precision: of weights and activations, "fp32", "fp16", "bf16" or "int8" (the linear layers
            of the base alone); inputs and logits are the same in all of them. The merge is rounded once.

    Raises:
        InputError: `output` exists, the checkpoint has no task head or no fast tokenizer, the
            precision is unknown or not for `provider`, or some labels of `texts` are the customer's and some are not.
        BasisMismatchError: base, basis and coefficients do not belong together.
        CheckFailed: the logits differ, or the customer's effect does.
        ProviderError: the provider does not load, or cannot compute in `precision`.
        QrloraError: the model cannot be exported, or the disk is full.
    """

    def plan() -> _Plan:
        labels = coefficients.labels or checkpoint.labels
        labelled = choose_labelled(texts, coefficients.task, labels, strict=True)
        reference = build_reference(checkpoint, basis, coefficients, choose_texts(texts))
        model = checkpoint.load_model()
        merge_model(model, checkpoint, basis, coefficients)
        content = Content("merged", coefficients.task, labels, len(labels), coefficients.digest)
        answered = answer_in_pytorch(model, checkpoint.tokenizer(), labelled, labels, progress) if labelled else None
        return _Plan(content, reference, model, labelled=answered)

    return _export(checkpoint, basis, plan, _Settings(output, provider, precision, progress))


def export_switchable(
    checkpoint: Checkpoint,
    basis: Basis,
    output: Path,
    texts: Examples | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
    head_labels: int = 0,
    precision: str = "fp32",
) -> Manifest:
    """Write a bundle that serves every customer of `basis` to the new folder `output`.

    The graph has the further inputs `coefficient_table [slots, width]` fp32 and `slot [batch]`
    int64, and with `head_labels` also `head_table`. It is checked like a merged one, with
    different customers in neighbouring rows.

    Args:
        texts: as for `export_merged`; the accuracy is the base's.
        head_labels: most labels that a customer's own head may have; 0: all use the base's head.

    Raises:
        As `export_merged`; InputError: a layer cannot have a customer per row, or the base has more
        labels than `head_labels`.
    """
    if head_labels and head_labels < len(checkpoint.labels):
        raise InputError(f"--head-labels {head_labels} is less than the base's {len(checkpoint.labels)} labels")

    def plan() -> _Plan:
        check_basis_fits(checkpoint, basis)
        model = checkpoint.load_model()
        labels = checkpoint.labels
        labelled = choose_labelled(texts, checkpoint.task, labels, strict=False)
        answered = answer_in_pytorch(model, checkpoint.tokenizer(), labelled, labels, progress) if labelled else None
        rows = make_switchable(model, basis, head_labels)
        customers = made_up_customers(checkpoint, basis, rows.head)
        reference = mixed_reference(checkpoint, basis, customers, rows.head, choose_texts(texts))
        base_head = head_arrays(read_base_head(checkpoint)) if rows.head else None
        outputs = head_labels or len(labels)
        content = Content("switchable", checkpoint.task, labels, outputs, head=rows.head, base_head=base_head)
        return _Plan(content, reference, model, rows, base_tables(checkpoint, basis, rows.head), answered)

    return _export(checkpoint, basis, plan, _Settings(output, provider, precision, progress))


def _export(checkpoint: Checkpoint, basis: Basis, make_plan: Callable[[], _Plan], settings: _Settings) -> Manifest:
    def step(done: int) -> None:
        if settings.progress is not None:
            settings.progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))

    check_precision(settings.precision, settings.provider)
    check_free_folder(settings.output)
    tokenizer = _check_exportable(checkpoint)
    step(0)
    plan = make_plan()
    step(1)
    with atomic_folder(settings.output) as folder:
        cast_inside(plan.model, plan.rows, settings.precision)
        graph = write_graph(plan.model, input_names(plan.model, tokenizer), folder, plan.rows)
        if settings.precision == "int8":
            quantize_graph(folder / MODEL_FILE, graph.products, SMALLEST_EXTERNAL_BYTES)
        step(2)
        session = open_for_check(folder / MODEL_FILE, settings.precision, settings.provider)
        report = check_parity(session, plan.reference, settings.precision)
        report.raise_if_failed()
        labelled = plan.labelled
        accuracy = measure_accuracy(session, labelled, plan.tables, settings.progress) if labelled else None
        step(3)
        checked = Checked(plan.model, tokenizer, graph, plan.reference, report, settings.provider, accuracy)
        write_side_files(folder, plan.content, checked)
        manifest = seal(folder, checkpoint, basis, plan.content, checked)
    step(4)
    return manifest


def _check_exportable(checkpoint: Checkpoint) -> Any:
    checkpoint.require_task_head()
    tokenizer = checkpoint.tokenizer()
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{checkpoint.name} has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer
