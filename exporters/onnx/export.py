"""A model as an ONNX bundle: one customer folded in, or any customer in any row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporters.onnx.ablation import not_shown
from exporters.onnx.accuracy import Labelled, answer_in_pytorch, choose_labelled, measure_accuracy
from exporters.onnx.branch_fusion import fuse_branches, fuses
from exporters.onnx.bundle_files import Checked, Content, seal, write_side_files
from exporters.onnx.calibrating import calibration_inputs, calibration_record, texts_to_calibrate
from exporters.onnx.customer_rows import BroughtRows, CustomerRows
from exporters.onnx.graph import SMALLEST_EXTERNAL_BYTES, Graph, write_graph
from exporters.onnx.joint_projections import join_projections
from exporters.onnx.options import OnnxOptions
from exporters.onnx.padding_free import Packing
from exporters.onnx.precision import cast_inside
from exporters.onnx.prepared import Prepared, prepare
from exporters.onnx.quantizing import quantize_graph
from exporters.onnx.reference import build_reference
from exporters.onnx.side_branches import side_branches
from exporters.onnx.switchable import make_switchable, plan_head
from exporters.onnx.synthetic_customers import (
    base_tables,
    brought,
    mixed_reference,
    read_base_head,
    synthetic_customers,
)
from exporters.onnx.varlen import VarlenPacking
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.io.files import atomic_folder
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.bundle import ALONE_FILE, MERGE_FILE, MODEL_FILE, PACKED_FILE, Manifest
from qrlora_deploy.runtime.bundle.row_layout import SLOT, head_arrays
from qrlora_deploy.runtime.sessions.token_index import check_runtime
from qrlora_deploy.runtime.verification.parity import (
    Case,
    check_one_customer,
    check_parity,
    check_right_padded,
    open_for_check,
)
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.registry import BY_OPTION, task_named

DEFAULTS = OnnxOptions()

KINDS = {CustomerRows: "switchable", BroughtRows: "per-row"}
"""Of a bundle of many customers, by how their numbers come in."""

STEPS = ("reference logits in PyTorch", "export", "parity check", "seal the bundle")


@dataclass(frozen=True)
class _Plan:
    """What differs between the kinds of bundles.

    Attributes:
        content: what the graph answers, and for whom.
        reference: what PyTorch answers.
        rows: who takes the further inputs of a switchable model.
        tables: of a switchable model; they hold the base alone.
        labelled: rows to measure accuracy on, answered by PyTorch; None: there are none.
    """

    content: Content
    reference: list[Case]
    rows: CustomerRows | None = None
    tables: dict[str, np.ndarray] | None = None
    labelled: Labelled | None = None


def export_merged(job: ExportJob, options: OnnxOptions = DEFAULTS) -> Manifest:
    """Write the bundle of the one customer `job.coefficients` to the new folder `job.output`.

    The bundle is built in a temporary folder and takes its place only after its logits, on
    `options.provider`, agree with PyTorch's on real text; on any failure nothing is left. Where all
    labels of `options.data` are the customer's, the accuracy on up to 512 of its rows is recorded too.
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
    if options.head_labels:
        raise InputError(
            f"{argument('head_labels')} belongs to a switchable bundle; a merged one has its customer's own head"
        )
    if options.table_dtype != "fp32":
        raise InputError(f"{argument('table_dtype')} belongs to a switchable bundle; a merged one has no table")
    if options.merged_cache:
        raise InputError(f"{argument('merged_cache')} belongs to a switchable bundle; a merged one is merged")
    if options.task is not None:
        raise InputError(f"{argument('task')} belongs to a switchable bundle; a merged one has its customer's task")

    job = replace(job, checkpoint=checkpoint.taken_for(customer.task))
    checkpoint = job.checkpoint

    def plan(prepared: Prepared) -> _Plan:
        labels = customer.labels or checkpoint.labels
        task = task_named(customer.task).deciding_at(customer.thresholds)
        labelled = choose_labelled(options.data, task, labels, strict=True)
        reference = build_reference(prepared, job.basis, customer)
        merge_model(prepared.model, checkpoint, job.basis, customer)
        outputs = reference[0].logits.shape[-1]
        content = Content("merged", customer.task, labels, outputs, customer.digest, thresholds=customer.thresholds)
        return _Plan(content, reference, labelled=_answer(job, prepared, labelled, task, labels))

    return _export(job, options, plan)


def export_switchable(job: ExportJob, options: OnnxOptions = DEFAULTS) -> Manifest:
    """Write a bundle that serves every customer of `job.basis` to the new folder `job.output`.

    The graph has the further inputs `coefficient_table [slots, width]` of `options.table_dtype` and `slot [batch]`
    int64, and with `options.head_labels` also `head_table`. It is checked like a merged one, with
    different customers in neighbouring rows; the accuracy is the base's.

    Raises:
        As `export_merged`; InputError: a layer cannot have a customer per row, or the base has more
        labels than `options.head_labels`.
    """
    return _export_for_all(job, options, CustomerRows)


def export_per_row(job: ExportJob, options: OnnxOptions = DEFAULTS) -> Manifest:
    """As `export_switchable`, but each row of a batch brings its customer's numbers: no table and no slot.

    The further inputs are `coefficients [batch, width]`, with `options.head_labels` also `head [batch, head width]`.

    Raises:
        As `export_switchable`.
    """
    return _export_for_all(job, options, BroughtRows)


def _export_for_all(job: ExportJob, options: OnnxOptions, layout: type[CustomerRows]) -> Manifest:
    """A bundle that serves every customer; `layout` is how their numbers come in."""
    checkpoint, basis, head_labels = job.checkpoint, job.basis, options.head_labels
    if options.merged_cache and layout is BroughtRows:
        raise InputError(f"{argument('merged_cache')} belongs to a switchable bundle; a per-row one has no table")
    if options.task is not None:
        checkpoint = _taken_for(checkpoint, options.task)
        job = replace(job, checkpoint=checkpoint)
    if job.coefficients is not None:
        raise InputError(f"a {KINDS[layout]} bundle serves all customers; coefficients belong to a merged one")
    if head_labels and not task_named(checkpoint.task).has_labels:
        raise InputError(f"{argument('head_labels')} belongs to bases with an output layer; {checkpoint.task} has none")
    if head_labels and head_labels < len(checkpoint.labels):
        raise InputError(
            f"{argument('head_labels', head_labels)} is less than the base's {len(checkpoint.labels)} labels; "
            f"give {len(checkpoint.labels)}, or more where a customer has more"
        )

    def plan(prepared: Prepared) -> _Plan:
        check_basis_fits(checkpoint, basis)
        labels, task = checkpoint.labels, task_named(checkpoint.task)
        head = plan_head(prepared.model, basis, head_labels)
        labelled = choose_labelled(options.data, task, labels, strict=False)
        answered = _answer(job, prepared, labelled, task, labels)
        with side_branches(prepared, basis) as side:
            reference = mixed_reference(side, synthetic_customers(side, head), head, options.table_dtype)
        rows = make_switchable(prepared.model, basis, head_labels, options.table_dtype, task.answers_words, layout)
        base_head = head_arrays(read_base_head(checkpoint)) if head else None
        outputs = reference[0].logits.shape[-1]
        content = Content(KINDS[layout], task.name, labels, outputs, head=head, base_head=base_head)
        tables = base_tables(checkpoint, basis, head, options.table_dtype)
        if layout is BroughtRows:
            reference = [replace(case, inputs=brought(case.inputs)) for case in reference]
            tables = brought(tables | {SLOT: np.zeros(1, dtype=np.int64)})
        return _Plan(content, reference, rows, tables, answered)

    return _export(job, options, plan)


def _taken_for(checkpoint: Checkpoint, option: str) -> Checkpoint:
    """The base taken for a task.

    Raises:
        InputError: its config says that it is for another one.
    """
    taken, task = checkpoint.taken_for(BY_OPTION[option].name), BY_OPTION[option]
    if taken.task != task.name:
        raise InputError(f"{argument('task', option)}: the head of {checkpoint.name} is for {taken.task}")
    return taken


def _answer(
    job: ExportJob, prepared: Prepared, labelled: Examples | None, task: Task, labels: Sequence[str]
) -> Labelled | None:
    if labelled is None:
        return None
    return answer_in_pytorch(prepared, labelled, task, labels, job.progress)


def _export(job: ExportJob, options: OnnxOptions, make_plan: Callable[[Prepared], _Plan]) -> Manifest:
    def step(done: int) -> None:
        if job.progress is not None:
            job.progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))

    if options.precision == "int4":
        raise InputError(f"int4 is for decoders, which write text; choose {argument('precision', 'int8')}")
    if options.padding_free:
        check_runtime()
    check_free_folder(job.output)
    prepared = prepare(job.checkpoint, options.data)
    step(0)
    plan = make_plan(prepared)
    step(1)
    with atomic_folder(job.output) as folder:
        graph = _write_graph(job, options, prepared, plan, folder)
        step(2)
        session = open_for_check(folder / MODEL_FILE, options.precision, options.provider)
        task = plan.content.deciding_task
        report = check_parity(session, plan.reference, task, options.precision)
        if graph.packed:
            packed = open_for_check(folder / PACKED_FILE, options.precision, options.provider)
            report = check_right_padded(packed, plan.reference, task, report)
        if graph.alone:
            merge, alone = (
                open_for_check(folder / name, options.precision, options.provider) for name in (MERGE_FILE, ALONE_FILE)
            )
            report = check_one_customer(merge, alone, plan.reference, task, report)
        report.raise_if_failed()
        labelled = plan.labelled
        accuracy = measure_accuracy(session, labelled, plan.tables, job.progress) if labelled else None
        step(3)
        texts = texts_to_calibrate(options.calibration, prepared.task)
        calibration = calibration_record(texts) if texts is not None else None
        unseen = not_shown(graph.traced, plan.reference, report.bound, prepared.task.least_size)
        checked = Checked(graph, plan.reference, report, options.provider, accuracy, calibration, unseen)
        write_side_files(folder, prepared, plan.content, checked)
        manifest = seal(folder, prepared, job.basis, plan.content, checked)
    step(4)
    return manifest


def _write_graph(job: ExportJob, options: OnnxOptions, prepared: Prepared, plan: _Plan, folder: Path) -> Graph:
    """The graph in its precision; the model is cast in place."""
    model, rows = prepared.model, plan.rows
    cast_inside(model, rows, options.precision)
    packing = _make_packing(options)

    def finish() -> None:
        if rows is not None and fuses(options.precision, options.provider):
            fuse_branches(model, rows)
        if isinstance(packing, VarlenPacking) and packing.joint:
            join_projections(model, packing)

    graph = write_graph(model, prepared.input_names, folder, rows, packing, finish, prepared.task, options.merged_cache)
    if options.precision == "int8":
        texts, customers = texts_to_calibrate(options.calibration, prepared.task), plan.reference[0].inputs
        calibration = calibration_inputs(prepared, texts, customers, job.progress) if texts is not None else None
        quantize_graph(folder / MODEL_FILE, graph.products, SMALLEST_EXTERNAL_BYTES, calibration)
    return graph


def _make_packing(options: OnnxOptions) -> Packing | None:
    """How tokens are packed; None: they are not."""
    if options.packs:
        return VarlenPacking(options.attention == "packed", options.small_batches)
    return Packing() if options.padding_free else None
