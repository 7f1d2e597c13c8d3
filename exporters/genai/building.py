"""Both ways to a graph: from the description of a family, or by tracing transformers' own model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.genai.options import GenaiOptions
from exporters.genai.record import WEIGHTS
from exporters.onnx.decoder.export import open_tokenizer, padding_of
from exporters.onnx.decoder.graph import Plan, write_decoder
from exporters.onnx.decoder.precision import PRECISIONS
from exporters.onnx.decoder.shape import Shape, read_shape
from exporters.onnx.decoder.tensors import Tensors
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.models.capacity import max_tokens
from qrlora_deploy.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Base:
    """What is known of a base before an export begins.

    Attributes:
        tokenizer: of it.
        padding: id of the token that fills rows up.
        positions: tokens of the longest text.
        shape: by the description of its family; None: the model is traced.
    """

    tokenizer: Any
    padding: int
    positions: int
    shape: Shape | None


@dataclass(frozen=True)
class Sizes:
    """What clients must know of a graph.

    Attributes:
        head_size: numbers of a head in the cache.
        kv_heads: heads in the cache.
        vocabulary: logits of a token.
        positions: tokens of the longest text.
        in_place: whether the cache may be one buffer, written in place.
    """

    head_size: int
    kv_heads: int
    vocabulary: int
    positions: int
    in_place: bool


def open_base(checkpoint: Checkpoint, options: GenaiOptions) -> Base:
    """The base, and the way that its graph is made.

    Raises:
        InputError: the base writes no text or is not whole, its tokenizer is none that serving can use, or its family
            is to have a description and has none.
    """
    tokenizer = open_tokenizer(checkpoint)
    positions = max_tokens(checkpoint.skeleton(), tokenizer)
    shape = None
    if options.builder != "torch":
        try:
            shape = read_shape(checkpoint.config, checkpoint.name, positions)
        except InputError:
            if options.builder == "family" or options.precision != "fp32":
                raise
    positions = positions if shape is None else shape.positions
    return Base(tokenizer, padding_of(tokenizer, checkpoint.config), positions, shape)


def write_graph(job: ExportJob, base: Base, options: GenaiOptions, variant: str, graph: Path) -> Sizes:
    """Write the graph and its weights.

    Args:
        job: base, basis and, where one is folded in, the customer.
        base: what is known of the base.
        options: of the exporter.
        variant: "rows", "drop-in" or "merged".
        graph: the file, in a folder that is there.

    Raises:
        InputError: the checkpoint is not as its family is, or a target is none that rows can have.
        QrloraError: the model cannot be traced.
    """
    data_file = Path(WEIGHTS).name
    if base.shape is None:
        # torch.onnx is not loaded where it is not needed.
        from exporters.genai.traced import write_traced

        cache, vocabulary = write_traced(job, variant, options.table_dtype, graph, data_file)
        return Sizes(cache.size, cache.heads, vocabulary, base.positions, in_place=False)
    precision, customer, shape = PRECISIONS[options.precision], job.coefficients, base.shape
    plan = Plan(
        shape,
        Tensors(job.checkpoint.stored, job.checkpoint.name),
        job.basis,
        None if customer is None else customer.values,
        precision.dtype,
        options.table_dtype,
        precision.bits,
        masked=True,
        one_customer=variant == "drop-in",
    )
    write_decoder(plan, graph.parent, graph.name, data_file)
    return Sizes(shape.head_size, shape.kv_heads, shape.vocabulary, shape.positions, in_place=True)
