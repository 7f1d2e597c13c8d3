"""What a decoder's bundle holds beside its graph, and the manifest that seals it."""

import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.helper import tensor_dtype_to_np_dtype
from transformers import GenerationConfig

from exporters.onnx.bundle_files import write_tokenizer
from exporters.onnx.decoder.blockwise import accuracy_level
from exporters.onnx.decoder.graph import OPSET
from exporters.onnx.decoder.shape import Shape
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.provenance import tool_versions
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.bundle import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    Manifest,
    ParityRecord,
    TargetRecord,
    TensorRecord,
    digest_files,
)
from qrlora_deploy.runtime.bundle.row_layout import padded_rank
from qrlora_deploy.runtime.verification.parity import Case, ParityReport, write_reference
from qrlora_deploy.tasks.causal_lm import CausalLM

GENERATION_FILE = "generation_config.json"

README = """# {task}

A {kind} bundle in {precision}, written by qrlora-deploy: {what}

    qrlora-deploy verify .

`manifest.json` says what it was made from and seals every file. `model.onnx` keeps its weights in `model.onnx.data`;
it takes prompts padded on the right, with the length of each row in `seqlens_k`, and a cache whose buffers are bound
as inputs and outputs. There is no attention mask: rows padded on the left cannot be expressed. It runs in ONNX Runtime
1.23 or newer (opset {opset}, with operators of the domain com.microsoft).
"""

WHAT = {
    "merged": "one customer folded into its base.",
    "switchable": "any customer of its base in any row of a batch.",
}


@dataclass(frozen=True)
class Made:
    """A graph that was written and agrees with PyTorch.

    Attributes:
        model: without its weights.
        case: PyTorch's logits.
        report: the comparison with them.
        provider: execution provider of the comparison.
    """

    model: onnx.ModelProto
    case: Case
    report: ParityReport
    provider: str


def kind_of(job: ExportJob) -> str:
    """What a bundle is: "merged" or "switchable"."""
    return "switchable" if job.coefficients is None else "merged"


def write_side_files(folder: Path, job: ExportJob, tokenizer: Any, made: Made) -> None:
    """Config, how text is generated, tokenizer with its chat template, and a README."""
    checkpoint = job.checkpoint
    checkpoint.config.to_json_file(folder / "config.json")
    write_tokenizer(folder, tokenizer)
    write_generation(folder, checkpoint)
    kind = kind_of(job)
    readme = README.format(task=CausalLM.name, kind=kind, precision=made.report.precision, what=WHAT[kind], opset=OPSET)
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_generation(folder: Path, checkpoint: Checkpoint) -> None:
    """How text is generated: the base's own file, or what its config says."""
    given = checkpoint.folder / GENERATION_FILE
    if given.is_file():
        shutil.copyfile(given, folder / GENERATION_FILE)
    else:
        GenerationConfig.from_model_config(checkpoint.config).to_json_file(folder / GENERATION_FILE)


def seal(folder: Path, job: ExportJob, tokenizer: Any, padding: int, shape: Shape, made: Made) -> Manifest:
    """Write the reference logits and the manifest, last of all: it holds the digests of the other files."""
    basis, report, graph = job.basis, made.report, made.model.graph
    manifest = Manifest(
        kind=kind_of(job),  # type: ignore[arg-type]  # pydantic checks both
        task=CausalLM.name,
        labels=(),
        precision=report.precision,  # type: ignore[arg-type]
        accuracy_level=accuracy_level(graph),
        opset=OPSET,
        basis_digest=basis.digest,
        coefficients_digest=job.coefficients.digest if job.coefficients else None,
        base_name=job.checkpoint.name,
        base_digest=job.checkpoint.digest,
        total_rank=basis.total_rank,
        targets=tuple(
            TargetRecord(name=name, rank=rank, padded_rank=padded_rank(rank)) for name, rank in basis.ranks.items()
        ),
        inputs=tuple(map(_record, graph.input)),
        outputs=tuple(map(_record, graph.output)),
        files={},
        parity=_parity_record(made),
        customer_effect=float(np.abs(made.case.logits - made.case.base_logits).max()),
        attention_nodes=shape.layers,
        max_length=shape.positions,
        pad_token_id=padding,
        padding_side="right",
        pad_token_type_id=tokenizer.pad_token_type_id,
        truncation_side=tokenizer.truncation_side,
        versions=tool_versions()
        | {name: version(name) for name in ("transformers", "onnx")}
        | {"onnxruntime": onnxruntime.__version__},
    )
    # What decides an answer is in a file that is sealed, too.
    write_reference([made.case], folder / REFERENCE_FILE, manifest.sealed_fields())
    manifest = manifest.model_copy(update={"files": digest_files(folder)})
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _record(value: onnx.ValueInfoProto) -> TensorRecord:
    kind = value.type.tensor_type
    axes = tuple(axis.dim_param or axis.dim_value for axis in kind.shape.dim)
    return TensorRecord(name=value.name, dtype=str(tensor_dtype_to_np_dtype(kind.elem_type)), shape=axes)


def _parity_record(made: Made) -> ParityRecord:
    report = made.report
    return ParityRecord(
        max_abs_error=report.max_abs_error,
        bound=report.bound,
        label_agreement=report.label_agreement,
        cases=report.cases,
        worst=report.worst,
        provider=made.provider,
        effect_correlation=report.effect_correlation,
        effect_error=report.effect_error,
    )
