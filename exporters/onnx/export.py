"""A model as an ONNX bundle: one customer folded in, or any customer in any row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from exporters.onnx.accuracy import Labelled, answer_in_pytorch, choose_labelled, measure_accuracy
from exporters.onnx.calibrating import calibration_inputs, calibration_record
from exporters.onnx.customers import base_tables, made_up_customers, mixed_reference, read_base_head
from exporters.onnx.graph import SMALLEST_EXTERNAL_BYTES, Graph, input_names, write_graph
from exporters.onnx.joining import join_branches, joins
from exporters.onnx.padding_free import Packing
from exporters.onnx.precision import cast_inside, check_precision
from exporters.onnx.quantizing import quantize_graph
from exporters.onnx.reference import SideBranches, build_reference, choose_texts
from exporters.onnx.sealing import Checked, Content, seal, write_side_files
from exporters.onnx.showing import not_shown
from exporters.onnx.switchable import CustomerRows, make_switchable
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.registry import ExportJob
from qrlora_deploy.io.files import atomic_folder
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.models.capacity import check_ids
from qrlora_deploy.models.checkpoint import Checkpoint, check_basis_fits
from qrlora_deploy.models.support import check_padding
from qrlora_deploy.runtime.bundle.bundle import MODEL_FILE, Manifest
from qrlora_deploy.runtime.bundle.row_layout import TABLE_DTYPES, head_arrays
from qrlora_deploy.runtime.sessions.token_index import check_runtime
from qrlora_deploy.runtime.verification.parity import Case, check_parity, open_for_check
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import task_named

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


def export_bundle(job: ExportJob) -> Mapping[str, Any]:
    """The exporter "onnx": a merged bundle of `job.coefficients`, or a switchable one without them.

    Raises:
        As the two functions below.
    """
    export = export_switchable if job.coefficients is None else export_merged
    return export(job).model_dump(mode="json")


def export_merged(job: ExportJob) -> Manifest:
    """Write the bundle of the one customer `job.coefficients` to the new folder `job.output`.

    The bundle is built in a temporary folder and takes its place only after its logits, on
    `job.provider`, agree with PyTorch's on real text; on any failure nothing is left. Where all
    labels of `job.texts` are the customer's, the accuracy on up to 512 of its rows is recorded too.
    Inputs and logits are the same in every precision. The merge is rounded once.

    Raises:
        InputError: there is no customer, or a head table was asked for; the output exists, the
            checkpoint has no task head or no fast tokenizer, or cannot be padding-free; the precision
            is unknown or not for the provider, or some labels of the texts are the customer's and some are not.
        BasisMismatchError: base, basis and coefficients do not belong together.
        CheckFailed: the logits differ, or the customer's effect does.
        ProviderError: the provider does not load, or cannot compute in the precision.
        QrloraError: the model cannot be exported, or the disk is full.
    """
    checkpoint, customer = job.checkpoint, job.coefficients
    if customer is None:
        raise InputError("a merged bundle needs the coefficients of its customer; without them it is a switchable one")
    if job.head_labels:
        raise InputError("--head-labels belongs to a switchable bundle; a merged one has its customer's own head")
    if job.table_dtype != "fp32":
        raise InputError("--table-dtype belongs to a switchable bundle; a merged one has no table")

    def plan() -> _Plan:
        labels, task = customer.labels or checkpoint.labels, task_named(customer.task)
        labelled = choose_labelled(job.texts, task, labels, strict=True)
        reference = build_reference(checkpoint, job.basis, customer, choose_texts(job.texts))
        model = checkpoint.load_model()
        merge_model(model, checkpoint, job.basis, customer)
        content = Content("merged", customer.task, labels, len(labels), customer.digest)
        return _Plan(content, reference, model, labelled=_answer(job, model, labelled, task, labels))

    return _export(job, plan)


def export_switchable(job: ExportJob) -> Manifest:
    """Write a bundle that serves every customer of `job.basis` to the new folder `job.output`.

    The graph has the further inputs `coefficient_table [slots, width]` of `job.table_dtype` and `slot [batch]`
    int64, and with `job.head_labels` also `head_table`. It is checked like a merged one, with
    different customers in neighbouring rows; the accuracy is the base's.

    Raises:
        As `export_merged`; InputError: a layer cannot have a customer per row, or the base has more
        labels than `job.head_labels`.
    """
    checkpoint, basis, head_labels = job.checkpoint, job.basis, job.head_labels
    if job.coefficients is not None:
        raise InputError("a switchable bundle serves all customers; coefficients belong to a merged one")
    if job.table_dtype not in TABLE_DTYPES:
        raise InputError(f"unknown --table-dtype {job.table_dtype!r}; choose from {', '.join(TABLE_DTYPES)}")
    if head_labels and head_labels < len(checkpoint.labels):
        raise InputError(f"--head-labels {head_labels} is less than the base's {len(checkpoint.labels)} labels")

    def plan() -> _Plan:
        check_basis_fits(checkpoint, basis)
        model = checkpoint.load_model()
        labels, task = checkpoint.labels, task_named(checkpoint.task)
        labelled = choose_labelled(job.texts, task, labels, strict=False)
        answered = _answer(job, model, labelled, task, labels)
        rows = make_switchable(model, basis, head_labels, job.table_dtype)
        side = SideBranches(checkpoint, basis, choose_texts(job.texts))
        customers = made_up_customers(side, rows.head)
        reference = mixed_reference(side, customers, rows.head, job.table_dtype)
        base_head = head_arrays(read_base_head(checkpoint)) if rows.head else None
        outputs = head_labels or len(labels)
        content = Content("switchable", checkpoint.task, labels, outputs, head=rows.head, base_head=base_head)
        tables = base_tables(checkpoint, basis, rows.head, job.table_dtype)
        return _Plan(content, reference, model, rows, tables, answered)

    return _export(job, plan)


def _answer(
    job: ExportJob, model: Any, labelled: Examples | None, task: Task, labels: Sequence[str]
) -> Labelled | None:
    if labelled is None:
        return None
    return answer_in_pytorch(model, job.checkpoint.tokenizer(), labelled, task, labels, job.progress)


def _export(job: ExportJob, make_plan: Callable[[], _Plan]) -> Manifest:
    def step(done: int) -> None:
        if job.progress is not None:
            job.progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))

    check_precision(job.precision, job.provider, job.calibration is not None)
    if job.padding_free and job.calibration is not None:
        raise InputError("--calibration runs padded batches, which a padding-free graph does not take; leave one out")
    if job.padding_free:
        check_runtime()
    check_free_folder(job.output)
    tokenizer = _check_exportable(job.checkpoint, job.texts is not None and job.texts.pairs is not None)
    step(0)
    plan = make_plan()
    step(1)
    with atomic_folder(job.output) as folder:
        graph = _write_graph(job, plan, tokenizer, folder)
        step(2)
        session = open_for_check(folder / MODEL_FILE, job.precision, job.provider)
        report = check_parity(session, plan.reference, task_named(plan.content.task), job.precision)
        report.raise_if_failed()
        labelled = plan.labelled
        accuracy = measure_accuracy(session, labelled, plan.tables, job.progress) if labelled else None
        step(3)
        calibration = calibration_record(job.calibration) if job.calibration is not None else None
        unseen = not_shown(graph.traced, plan.reference, report.bound)
        checked = Checked(
            plan.model, tokenizer, graph, plan.reference, report, job.provider, accuracy, calibration, unseen
        )
        write_side_files(folder, plan.content, checked)
        manifest = seal(folder, job.checkpoint, job.basis, plan.content, checked)
    step(4)
    return manifest


def _write_graph(job: ExportJob, plan: _Plan, tokenizer: Any, folder: Path) -> Graph:
    """The graph in its precision; the model is cast in place."""
    cast_inside(plan.model, plan.rows, job.precision)
    packing = Packing() if job.padding_free else None
    rows, finish = plan.rows, None
    if rows is not None and joins(job.precision, job.provider):
        finish = partial(join_branches, plan.model, rows)
    graph = write_graph(plan.model, input_names(plan.model, tokenizer), folder, rows, packing, finish)
    if job.precision == "int8":
        calibration = _calibration(job, plan, tokenizer)
        quantize_graph(folder / MODEL_FILE, graph.products, SMALLEST_EXTERNAL_BYTES, calibration)
    return graph


def _calibration(job: ExportJob, plan: _Plan, tokenizer: Any) -> Iterator[dict[str, np.ndarray]] | None:
    if job.calibration is None:
        return None
    return calibration_inputs(plan.model, tokenizer, job.calibration, plan.reference[0].inputs, job.progress)


def _check_exportable(checkpoint: Checkpoint, pairs: bool) -> Any:
    """The tokenizer; refuses what could only fail later, in words of the exporter."""
    checkpoint.require_task_head()
    tokenizer = checkpoint.tokenizer()
    check_padding(checkpoint.name, checkpoint.skeleton(), tokenizer)
    check_ids(checkpoint.name, checkpoint.skeleton(), tokenizer, pairs)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{checkpoint.name} has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer
