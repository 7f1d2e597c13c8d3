"""One customer as a plain ONNX bundle."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxruntime
import tokenizers

from exporters.onnx.graph import OPSET, Graph, input_names, longest_input, write_graph
from exporters.onnx.reference import build_reference, choose_texts
from qrlora_deploy.basis import Basis
from qrlora_deploy.checkpoint import Checkpoint
from qrlora_deploy.coefficients import Coefficients
from qrlora_deploy.errors import InputError
from qrlora_deploy.files import atomic_folder, check_free_folder
from qrlora_deploy.merging import merge_model
from qrlora_deploy.provenance import tool_versions
from qrlora_deploy.runtime.bundle import (
    MANIFEST_FILE,
    MODEL_FILE,
    REFERENCE_FILE,
    TOKENIZER_FILE,
    Manifest,
    ParityRecord,
    TargetRecord,
    TensorRecord,
    digest_files,
)
from qrlora_deploy.runtime.layout import padded_rank
from qrlora_deploy.runtime.parity import Case, ParityReport, check_parity, customer_effect, write_reference
from qrlora_deploy.runtime.session import open_session
from qrlora_deploy.training.data import Examples

Progress = Callable[[str, int, int], None]
STEPS = ("reference logits in PyTorch", "merge and export", "parity check", "seal the bundle")

README = """# {task}, {labels} labels

A merged bundle written by qrlora-deploy: one customer folded into its base, as plain ONNX.

    qrlora-deploy verify .
    qrlora-deploy predict . --text "..."

`manifest.json` says what it was made from and seals every file. `model.onnx` takes int64 inputs
`[batch, sequence]` and gives `logits [batch, labels]`; it runs in any ONNX Runtime with opset 23.
"""


def export_merged(
    checkpoint: Checkpoint,
    basis: Basis,
    coefficients: Coefficients,
    output: Path,
    texts: Examples | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Manifest:
    """Write the bundle of one customer to the new folder `output`.

    The bundle is built in a temporary folder and takes its place only after its logits, on
    `provider`, agree with PyTorch's on real text; on any failure nothing is left.

    Args:
        texts: text to check with; what comes with the project if None.
        provider: where the check runs, "cpu", "cuda" or "tensorrt".

    Raises:
        InputError: `output` exists, or the checkpoint has no task head or no fast tokenizer.
        BasisMismatchError: base, basis and coefficients do not belong together.
        CheckFailed: the logits differ. ProviderError: the provider does not load.
        QrloraError: the model cannot be exported, or the disk is full.
    """
    check_free_folder(output)
    tokenizer = _check_exportable(checkpoint)

    def step(done: int) -> None:
        if progress is not None:
            progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))

    step(0)
    reference = build_reference(checkpoint, basis, coefficients, choose_texts(texts))
    step(1)
    model = checkpoint.load_model()
    merge_model(model, checkpoint, basis, coefficients)
    with atomic_folder(output) as folder:
        graph = write_graph(model, input_names(model, tokenizer), folder)
        step(2)
        report = check_parity(open_session(folder / MODEL_FILE, provider), reference)
        report.raise_if_failed()
        step(3)
        _write_side_files(folder, model, tokenizer, coefficients, reference)
        manifest = Manifest(
            **_origin(checkpoint, basis, coefficients),
            **_interface(graph, len(_labels(checkpoint, coefficients))),
            **_tokenizer_facts(model, tokenizer),
            parity=_parity_record(report, provider),
            customer_effect=customer_effect(reference),
            files=digest_files(folder),
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    step(4)
    return manifest


def _check_exportable(checkpoint: Checkpoint) -> Any:
    if not checkpoint.has_task_head:
        raise InputError(
            f"{checkpoint.name} is a {checkpoint.architecture} without a task head; give it one with `warmup` first"
        )
    tokenizer = checkpoint.tokenizer()
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{checkpoint.name} has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer


def _labels(checkpoint: Checkpoint, coefficients: Coefficients) -> tuple[str, ...]:
    return coefficients.labels or checkpoint.labels


def _write_side_files(
    folder: Path, model: Any, tokenizer: Any, coefficients: Coefficients, reference: list[Case]
) -> None:
    """Config, tokenizer, reference logits and a README."""
    write_reference(reference, folder / REFERENCE_FILE)
    if coefficients.labels:
        model.config.id2label = dict(enumerate(coefficients.labels))
        model.config.label2id = {label: index for index, label in enumerate(coefficients.labels)}
    model.config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder)
    # What padding and truncation were left on by earlier calls is no part of the tokenizer.
    plain = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    plain.no_padding()
    plain.no_truncation()
    plain.save(str(folder / TOKENIZER_FILE))
    (folder / "README.md").write_text(README.format(task=coefficients.task, labels=len(coefficients.labels)), "utf-8")


def _origin(checkpoint: Checkpoint, basis: Basis, coefficients: Coefficients) -> dict[str, Any]:
    return {
        "kind": "merged",
        "task": coefficients.task,
        "labels": _labels(checkpoint, coefficients),
        "precision": "fp32",
        "basis_digest": basis.digest,
        "coefficients_digest": coefficients.digest,
        "base_name": checkpoint.name,
        "base_digest": checkpoint.digest,
        "total_rank": basis.total_rank,
        "targets": tuple(
            TargetRecord(name=name, rank=rank, padded_rank=padded_rank(rank)) for name, rank in basis.ranks.items()
        ),
        "versions": tool_versions()
        | {name: version(name) for name in ("transformers", "onnx", "onnxscript")}
        | {"onnxruntime": onnxruntime.__version__},
    }


def _interface(graph: Graph, outputs: int) -> dict[str, Any]:
    axes = ("batch", "sequence")
    return {
        "opset": OPSET,
        "attention_nodes": graph.attention_nodes,
        "inputs": tuple(TensorRecord(name=name, dtype="int64", shape=axes) for name in graph.inputs),
        "outputs": (TensorRecord(name="logits", dtype="float32", shape=("batch", outputs)),),
    }


def _tokenizer_facts(model: Any, tokenizer: Any) -> dict[str, Any]:
    return {
        "max_length": longest_input(model, tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "padding_side": tokenizer.padding_side,
        "pad_token_type_id": tokenizer.pad_token_type_id,
    }


def _parity_record(report: ParityReport, provider: str) -> ParityRecord:
    return ParityRecord(
        max_abs_error=report.max_abs_error,
        bound=report.bound,
        label_agreement=report.label_agreement,
        cases=report.cases,
        worst=report.worst,
        provider=provider,
    )
