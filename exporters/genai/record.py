"""What was exported, beside it, and the check of it later."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from qrlora_deploy.errors import CheckFailed, FileFormatError, InputError, argument
from qrlora_deploy.exporting.exporter import Verdict
from qrlora_deploy.exporting.job import Original
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.io.reading import is_file, read_text
from qrlora_deploy.io.strict import Record, from_json
from qrlora_deploy.runtime.host.devices import Device
from qrlora_deploy.runtime.verification.forced import check_forced
from qrlora_deploy.runtime.verification.parity import open_for_check
from qrlora_deploy.runtime.verification.reference import read_reference

RECORD_FILE, REFERENCE_FILE = "export.json", "reference.safetensors"
GRAPH, WEIGHTS = "onnx/model.onnx", "onnx/model.onnx_data"
"""Where transformers.js looks for them; genai_config.json names the first."""

ERRORS_ALONE = 3
"""ONNX Runtime's severity."""


class GenaiRecord(Record):
    """`export.json`.

    Attributes:
        kind: what wrote it.
        variant: "rows", "drop-in" or "merged".
        builder: how the graph was made: "family" or "torch".
        task: of the base.
        precision: of weights and activations.
        width: columns of the coefficient table; 0: there is none.
        parity: of the comparison with PyTorch.
        customer_effect: largest difference that a customer made to a logit there.
        files: SHA-256 of every other file, by its path with forward slashes.
    """

    kind: Literal["genai"] = "genai"
    variant: Literal["rows", "drop-in", "merged"]
    builder: Literal["family", "torch"]
    task: str
    precision: Literal["fp32", "fp16", "int8", "int4"]
    width: int
    base_name: str
    base_digest: str
    basis_digest: str
    coefficients_digest: str | None = None
    parity: dict[str, Any]
    customer_effect: float
    versions: dict[str, str]
    files: dict[str, str]


def open_record(folder: Path) -> GenaiRecord:
    """The record of a folder whose files are those that were written.

    Raises:
        InputError: this exporter did not write it. FileFormatError: a file is missing or was changed.
    """
    path = folder / RECORD_FILE
    if not is_file(path):
        raise InputError(f"{folder} is nothing that {argument('format', 'genai')} wrote: it holds no {RECORD_FILE}")
    record = from_json(GenaiRecord, read_text(path), f"{path} is no record of an export")
    wrong = [name for name, digest in record.files.items() if not _is_whole(folder / name, digest)]
    missing = {GRAPH, WEIGHTS, REFERENCE_FILE} - record.files.keys()
    if wrong or missing:
        raise FileFormatError(f"{folder} is not what was exported: {', '.join(sorted({*wrong, *missing})[:5])}")
    return record


def verify_genai(folder: Path, original: Original | None, provider: str) -> Verdict:
    """Every file's digest, and the model's logits against those that the folder carries.

    Raises:
        InputError: this exporter did not write it, or a customer is given to compare with. FileFormatError: a file
            is missing or was changed. ProviderError: the provider does not load.
    """
    if original is not None:
        raise InputError(
            f"{argument('format', 'genai')} compares with what the export carries; leave out {argument('coefficients')}"
        )
    record = open_record(folder)
    session = open_graph(folder / GRAPH, record.precision, provider)
    report = check_forced(session, read_reference(folder / REFERENCE_FILE), record.precision)
    try:
        report.raise_if_failed()
    except CheckFailed as error:
        return Verdict(dataclasses.asdict(report), error)
    return Verdict(dataclasses.asdict(report))


def open_graph(graph: Path, precision: str, provider: str) -> Any:
    """A session for the check, which does not warn that the base's table is no constant: it is meant so.

    Raises:
        ProviderError: the provider does not load, or cannot compute in the precision.
    """

    def be_quiet(options: Any) -> None:
        options.log_severity_level = ERRORS_ALONE

    return open_for_check(graph, precision, replace(Device.of(provider), configure=be_quiet))


def _is_whole(path: Path, digest: str) -> bool:
    return is_file(path) and not path.is_symlink() and digest_file(path) == digest
