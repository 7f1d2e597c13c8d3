"""A decoder's model with the inputs that other runtimes feed, in the folder that they open."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from exporters.genai.building import Base, Sizes, open_base, write_graph
from exporters.genai.cases import make_cases
from exporters.genai.config import genai_config
from exporters.genai.options import GenaiOptions
from exporters.genai.readme import readme_of
from exporters.genai.record import GRAPH, RECORD_FILE, REFERENCE_FILE, GenaiRecord, open_graph
from exporters.onnx.bundle_files import write_tokenizer
from exporters.onnx.decoder.bundle_files import GENERATION_FILE, write_generation
from exporters.onnx.decoder.export import check_fits, texts_of
from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.formats.provenance import tool_versions
from qrlora_deploy.io.files import atomic_folder, write_json
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.runtime.bundle.bundle import digest_files
from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from qrlora_deploy.runtime.verification.forced import check_forced
from qrlora_deploy.runtime.verification.parity import Case, ParityReport, write_reference
from qrlora_deploy.tasks.causal_lm import CausalLM

STEPS = ("reference logits in PyTorch", "export", "parity check", "records")


def export_genai(job: ExportJob, options: GenaiOptions) -> GenaiRecord:
    """Write the folder `job.output`: of the customer `job.coefficients`, else for all customers in `options.variant`.

    The model is held against PyTorch on prompts of different lengths, padded on the right and on the left, behind the
    prompts and behind 64 tokens that each row is made to say; on any failure nothing is left.

    Raises:
        InputError: the base writes no text, its family or a setting is not supported, its tokenizer is none that
            serving can use, a variant is asked for beside a customer, or the output exists.
        BasisMismatchError: base, basis and coefficients do not belong together.
        CheckFailed: the logits differ.
        ProviderError: the provider does not load. QrloraError: the disk is full.
    """
    variant = _variant(job, options)
    check_free_folder(job.output)
    if not job.checkpoint.writes_text:
        raise InputError(f"{job.checkpoint.name} writes no text; {argument('format', 'genai')} is for decoders")
    base = open_base(job.checkpoint, options)
    check_fits(job)
    _progress(job, 0)
    cases = make_cases(job, base, texts_of(options.data), options.table_dtype, variant == "drop-in")
    with atomic_folder(job.output) as folder:
        _progress(job, 1)
        graph = folder / GRAPH
        graph.parent.mkdir()
        sizes = write_graph(job, base, options, variant, graph)
        _progress(job, 2)
        session = open_graph(graph, options.precision, options.provider)
        report = check_forced(session, cases, options.precision)
        report.raise_if_failed()
        _progress(job, 3)
        _write_side_files(job, base, sizes, options, variant, folder)
        record = _seal(job, base, options, variant, cases, report, folder)
    _progress(job, len(STEPS))
    return record


def _progress(job: ExportJob, done: int) -> None:
    if job.progress is not None:
        job.progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))


def _variant(job: ExportJob, options: GenaiOptions) -> Any:
    if job.coefficients is None:
        return options.variant or "rows"
    if options.variant:
        raise InputError(
            f"{argument('variant')} is for all customers; leave it out, or leave out {argument('coefficients')}"
        )
    return "merged"


def _write_side_files(
    job: ExportJob, base: Base, sizes: Sizes, options: GenaiOptions, variant: str, folder: Path
) -> None:
    """Configs, tokenizer with its chat template, and a README."""
    config = job.checkpoint.config
    write_tokenizer(folder, base.tokenizer)
    write_generation(folder, job.checkpoint)
    generation = json.loads((folder / GENERATION_FILE).read_text(encoding="utf-8"))
    own = genai_config(config, sizes, generation, GRAPH, base.padding, options.provider)
    write_json(folder / "genai_config.json", own)
    # transformers.js asks where weights beside the graph are.
    external = {"transformers.js_config": {"use_external_data_format": {Path(GRAPH).name: 1}}}
    write_json(folder / "config.json", config.to_dict() | external)
    (folder / "README.md").write_text(readme_of(variant, options.precision, _width(job, options)), encoding="utf-8")


def _width(job: ExportJob, options: GenaiOptions) -> int:
    return 0 if job.coefficients is not None else TableLayout(list(job.basis.ranks.values())).width


def _seal(
    job: ExportJob,
    base: Base,
    options: GenaiOptions,
    variant: Any,
    cases: list[Case],
    report: ParityReport,
    folder: Path,
) -> GenaiRecord:
    record = GenaiRecord(
        variant=variant,
        task=CausalLM.name,
        builder="torch" if base.shape is None else "family",
        precision=options.precision,  # type: ignore[arg-type]  # the options have checked it
        width=_width(job, options),
        base_name=job.checkpoint.name,
        base_digest=job.checkpoint.digest,
        basis_digest=job.basis.digest,
        coefficients_digest=job.coefficients.digest if job.coefficients else None,
        parity=dataclasses.asdict(report) | {"provider": options.provider},
        customer_effect=float(np.abs(cases[0].logits - cases[0].base_logits).max()),
        versions=tool_versions()
        | {name: version(name) for name in ("transformers", "onnx")}
        | {"onnxruntime": onnxruntime.__version__},
        files={},
    )
    write_reference(cases, folder / REFERENCE_FILE, record.model_dump(mode="json"))
    record = record.model_copy(update={"files": digest_files(folder)})
    write_json(folder / RECORD_FILE, record.model_dump(mode="json"))
    return record
