"""A customer as a `.onnx_adapter` file, which ONNX Runtime lays over the inputs of a switchable graph by itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.onnx.synthetic_customers import read_base_head
from exporters.onnx_adapter.options import AdapterOptions
from qrlora_deploy.errors import CheckFailed, InputError, QrloraError, argument, first_line
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.io.files import atomic_file
from qrlora_deploy.io.outputs import check_replaceable
from qrlora_deploy.merging.arithmetic import check_head, plan_folds
from qrlora_deploy.runtime.bundle.row_layout import HEAD_TABLE, TABLE, HeadLayout, TableLayout, head_arrays

DEFAULTS = AdapterOptions()

IDENTIFIER = b"TORT"
"""Of ONNX Runtime's adapters, behind the first four bytes of the flatbuffer."""

ADAPTER_VERSION = 1
"""Version of the tables' layout; ONNX Runtime stores it and does not interpret it."""

MODEL_VERSION = 1
"""Version of the switchable graph's inputs; likewise."""


def export_adapter(job: ExportJob, options: AdapterOptions = DEFAULTS) -> Mapping[str, Any]:
    """The exporter "onnx-adapter": tables of two rows, the base in row 0 and the customer in row 1.

    The file holds `coefficient_table [2, width]` fp32, and with `options.head_labels` also
    `head_table [2, head width]` fp32, under the names of the switchable graph's inputs. Of a decoder it holds
    `coefficient_table [1, width]`, the customer alone, as the exporter "genai" wants it in its variant "drop-in". It
    is read back and compared before it takes the place of `job.output`.

    Raises:
        InputError: there is no customer, it has a head of its own but the graph no room for one, the
            room is too small, or `job.output` cannot be written.
        BasisMismatchError: base, basis and customer do not belong together.
        CheckFailed: the file does not hold what was written. QrloraError: ONNX Runtime or the disk
            refuses to write it.
    """
    customer = job.coefficients
    if customer is None:
        raise InputError(
            f"{argument('format', 'onnx-adapter')} writes one customer; give it by {argument('coefficients')}"
        )
    check_replaceable(job.output, "ONNX adapter", _is_adapter)
    checkpoint, basis = job.checkpoint.taken_for(customer.task), job.basis
    checkpoint.require_task_head()
    plan_folds(checkpoint, basis, customer, checkpoint.skeleton())
    check_head(checkpoint, customer)
    tables = _tables(job, customer, options.head_labels)
    with atomic_file(job.output) as temporary:
        _write(tables, temporary)
        _check_written(tables, temporary)
    return {
        "kind": "onnx-adapter",
        "task": customer.task,
        "labels": list(customer.labels or checkpoint.labels),
        **({"thresholds": list(customer.thresholds)} if customer.thresholds else {}),
        "head_labels": options.head_labels,
        "parameters": {name: list(table.shape) for name, table in tables.items()},
        "base_digest": checkpoint.digest,
        "basis_digest": basis.digest,
        "coefficients_digest": customer.digest,
    }


def _tables(job: ExportJob, customer: Coefficients, head_labels: int) -> dict[str, np.ndarray]:
    layout = TableLayout(list(job.basis.ranks.values()))
    if job.checkpoint.writes_text:
        if head_labels:
            raise InputError(f"{argument('head_labels')} is not for decoders, which write text; leave it out")
        return {TABLE: layout.row(customer.values)[None]}
    tables = {TABLE: np.stack([np.zeros(layout.width, dtype=np.float32), layout.row(customer.values)])}
    if not head_labels:
        if customer.head:
            raise InputError(
                f"the customer has a head of its own; give {argument('head_labels')}, the number the "
                "switchable bundle was exported with"
            )
        return tables
    base_weight, base_bias = head_arrays(read_base_head(job.checkpoint))
    own_weight, own_bias = head_arrays(customer.head) if customer.head else (base_weight, base_bias)
    most = max(len(base_weight), len(own_weight))
    if head_labels < most:
        whose = "customer" if len(own_weight) == most else "base"
        raise InputError(f"{argument('head_labels', head_labels)} is less than the {whose}'s {most} labels")
    head = HeadLayout(head_labels, base_weight.shape[1])
    rows = [head.row(base_weight, base_bias), head.row(own_weight, own_bias)]
    return tables | {HEAD_TABLE: np.stack(rows)}


def _is_adapter(path: Path) -> bool:
    """Whether a file is an adapter of ONNX Runtime: its flatbuffer has their identifier behind four bytes."""
    with path.open("rb") as file:
        return file.read(8)[4:] == IDENTIFIER


def _write(tables: Mapping[str, np.ndarray], path: Path) -> None:
    # An OrtValue made from an array uses the array's memory without holding it, so all three stay
    # in variables until the file is written: a temporary gives a damaged file without any error.
    arrays = {name: np.ascontiguousarray(table) for name, table in tables.items()}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(MODEL_VERSION)
    adapter.set_parameters(values)
    try:
        adapter.export_adapter(str(path))
    # ONNX Runtime's exceptions share no base class of their own.
    except Exception as error:
        raise QrloraError(f"ONNX Runtime cannot write the adapter: {first_line(error)}") from error


def _check_written(tables: Mapping[str, np.ndarray], path: Path) -> None:
    try:
        # Held in a variable: what it hands out are views of its memory.
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
        parameters = adapter.get_parameters()
        found = {name: value.numpy().copy() for name, value in parameters.items()}
    except Exception as error:
        raise CheckFailed(f"the adapter that was written cannot be read back: {first_line(error)}") from error
    same = found.keys() == tables.keys() and all(
        found[name].dtype == table.dtype
        and found[name].shape == table.shape
        and found[name].tobytes() == table.tobytes()
        for name, table in tables.items()
    )
    if not same:
        raise CheckFailed("the adapter that was written holds other numbers than the customer; please report this")
