"""A decoder as an ONNX bundle: one customer folded in, or any customer in any row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from exporters.onnx.decoder.bundle_files import Made, seal, write_side_files
from exporters.onnx.decoder.graph import Plan, write_decoder
from exporters.onnx.decoder.options import check_options
from exporters.onnx.decoder.precision import PRECISIONS
from exporters.onnx.decoder.reference import SLOTS, choose_rows, customers_of, lend, make_case
from exporters.onnx.decoder.shape import Shape, read_shape
from exporters.onnx.decoder.tensors import Tensors
from exporters.onnx.options import OnnxOptions
from exporters.onnx.prepared import BATCH, choose_texts
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.io.files import atomic_folder
from qrlora_deploy.io.outputs import check_free_folder
from qrlora_deploy.merging.arithmetic import plan_folds
from qrlora_deploy.models.basis_fit import check_basis_fits
from qrlora_deploy.models.capacity import check_ids, max_tokens
from qrlora_deploy.models.checkpoint import Checkpoint
from qrlora_deploy.runtime.bundle.bundle import MODEL_FILE, Manifest
from qrlora_deploy.runtime.bundle.row_layout import TableLayout
from qrlora_deploy.runtime.verification.alone import check_decoder
from qrlora_deploy.runtime.verification.parity import Case, open_for_check

STEPS = ("reference logits in PyTorch", "export", "parity check", "seal the bundle")


@dataclass(frozen=True)
class Decoder:
    """A base that writes text, and all that is known of it before an export begins.

    Attributes:
        tokenizer: of the base.
        shape: sizes and settings.
        padding: id of the token that fills rows up.
    """

    tokenizer: Any
    shape: Shape
    padding: int


def export_decoder(job: ExportJob, options: OnnxOptions) -> Manifest:
    """Write the bundle of a decoder to the new folder `job.output`: switchable, or of the customer `job.coefficients`.

    The graph is built from the description of the family, its weights go from the checkpoint's files straight to those
    of the bundle. It is held against PyTorch on prompts of different lengths, a customer in each row, behind the
    prompts and behind 64 tokens that each row is made to say, and every row of a mixed batch against its greedy answer
    alone (`runtime.verification.alone`); on any failure nothing is left.

    Raises:
        InputError: the output exists, the family or a setting of the base is not supported, an option is not for
            decoders, or the tokenizer is none that serving can use.
        BasisMismatchError: base, basis and coefficients do not belong together.
        CheckFailed: the logits differ, or the customers' effect does.
        ProviderError: the provider does not load, or cannot compute in the precision.
        QrloraError: the disk is full.
    """
    progress = _progress(job)
    check_options(options)
    check_free_folder(job.output)
    decoder = open_decoder(job.checkpoint)
    customer = job.coefficients
    check_fits(job)
    progress(0)
    case = _reference(job, decoder, texts_of(options.data), options.table_dtype)
    progress(1)
    with atomic_folder(job.output) as folder:
        tensors = Tensors(job.checkpoint.stored, job.checkpoint.name)
        values = None if customer is None else customer.values
        precision = PRECISIONS[options.precision]
        plan = Plan(decoder.shape, tensors, job.basis, values, precision.dtype, options.table_dtype, precision.bits)
        model = write_decoder(plan, folder, MODEL_FILE)
        progress(2)
        session = open_for_check(folder / MODEL_FILE, options.precision, options.provider)
        positions = decoder.shape.positions
        report = check_decoder(session, [case], options.precision, folder / MODEL_FILE, positions, job.progress)
        report.raise_if_failed()
        progress(3)
        made = Made(model, case, report, options.provider)
        write_side_files(folder, job, decoder.tokenizer, made)
        manifest = seal(folder, job, decoder.tokenizer, decoder.padding, decoder.shape, made)
    progress(4)
    return manifest


def _progress(job: ExportJob) -> Callable[[int], None]:
    def step(done: int) -> None:
        if job.progress is not None:
            job.progress(STEPS[min(done, len(STEPS) - 1)], done, len(STEPS))

    return step


def open_decoder(checkpoint: Checkpoint) -> Decoder:
    """A base that can be exported; what can be refused is refused before a weight is read.

    Raises:
        InputError: the base writes no text or is not whole, its family or a setting of it is not supported, or its
            tokenizer is none that serving can use.
    """
    tokenizer = open_tokenizer(checkpoint)
    shape = read_shape(checkpoint.config, checkpoint.name, max_tokens(checkpoint.skeleton(), tokenizer))
    return Decoder(tokenizer, shape, padding_of(tokenizer, checkpoint.config))


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a base that writes text.

    Raises:
        InputError: the base writes no text or is not whole, or its tokenizer is none that serving can use.
    """
    checkpoint.require_task_head()
    checkpoint.check_usable()
    tokenizer = checkpoint.tokenizer()
    check_ids(checkpoint.name, checkpoint.skeleton(), tokenizer, pairs=False)
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(f"{checkpoint.name} has no fast tokenizer (tokenizer.json), which serving needs")
    return tokenizer


def texts_of(data: Examples | None) -> Sequence[str]:
    """Texts of the check; prompts, answers and chats are read as one text each."""
    rows = data.turns if data is not None else None
    if rows is None:
        return choose_texts(data).texts
    return ["\n".join(turn.content for turn in turns) for turns in rows[:BATCH]]


def padding_of(tokenizer: Any, config: Any) -> int:
    """A token to fill rows up with, which nobody reads."""
    ends = config.eos_token_id
    ends = ends[0] if isinstance(ends, (list, tuple)) and ends else ends
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, ends)
    return int(next((token for token in known if token is not None), 0))


def check_fits(job: ExportJob) -> None:
    """Make sure that base, basis and customer belong together.

    Raises:
        BasisMismatchError: they do not.
    """
    customer = job.coefficients
    if customer is None:
        check_basis_fits(job.checkpoint, job.basis)
    else:
        plan_folds(job.checkpoint, job.basis, customer, job.checkpoint.skeleton())


def _reference(job: ExportJob, decoder: Decoder, texts: Sequence[str], table_dtype: str) -> Case:
    rows = choose_rows(decoder.tokenizer, texts, decoder.shape.positions, decoder.padding)
    model = job.checkpoint.load_model(attn_implementation="eager")
    customer = job.coefficients
    with lend(model, job.basis) as forward:
        if customer is not None:
            return make_case(forward, rows, customer.values[None], None, (0,) * len(SLOTS))
        customers = customers_of(forward, rows, job.basis.total_rank)
        return make_case(forward, rows, customers, TableLayout(list(job.basis.ranks.values()), table_dtype))
