"""The second way: transformers' own model, traced, for families without a description, with standard Attention.

The graph has the inputs and outputs of the first way, and a cache that grows.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from exporters.onnx.attention import onnx_attention, use_onnx_attention
from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.decoder.masked import ALL, BATCH, MASK, PAST, TOKENS
from exporters.onnx.graph import OPSET, SMALLEST_EXTERNAL_BYTES
from exporters.onnx.switchable import make_switchable
from exporters.onnx.tracing import Example, export_program, strip_traces
from qrlora_deploy.errors import InputError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.runtime.bundle.row_layout import SLOT, TABLE

NAME = "qrlora_onnx_cached"

ROWS, NEW, OLD = 3, 4, 5
"""Of the example: rows, tokens of a step and of the cache. None is 1 or another axis: those become constants."""


@dataclass(frozen=True)
class Cache:
    """The cache of a model.

    Attributes:
        layers: how many.
        heads: of the keys of a layer.
        size: of a head.
    """

    layers: int
    heads: int
    size: int


class OneCustomer(CustomerRows):
    """All rows of a batch have the one row of the table."""

    def by_row(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `CustomerRows.by_row`, of `[1, width]`."""
        return inputs[TABLE].expand(inputs["input_ids"].shape[0], -1), None


class Stepping(torch.nn.Module):
    """A model with its cache by position: ids, mask, what customers bring, then keys and values of each layer.

    Args:
        model: transformers' own.
        rows: takes what customers bring; None: one is folded in.
        names: of the inputs before the cache.
    """

    def __init__(self, model: Any, rows: CustomerRows | None, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.rows, self.names = model, rows, names
        self._last = torch.empty(0)
        model.get_output_embeddings().register_forward_pre_hook(self._pick_last)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`logits [batch, 1, vocabulary]` fp32 of each row's last token, and the cache behind the step."""
        named = dict(zip(self.names, inputs, strict=False))
        past = inputs[len(self.names) :]
        ids, mask = named["input_ids"], named[MASK]
        if self.rows is not None:
            self.rows.fill(named)
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        own = mask[:, -ids.shape[1] :]
        # Of a row that is padded behind, the last token is not the last place.
        self._last = (own * torch.arange(1, ids.shape[1] + 1)).argmax(1)
        found = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
        )
        layers: list[Any] = cache.layers
        states = [state for layer in layers for state in (layer.keys, layer.values)]
        return found.logits.float(), *states

    def _pick_last(self, head: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden = inputs[0]
        return (hidden.gather(1, self._last[:, None, None].expand(-1, 1, hidden.shape[-1])),)


def mask_by_places(*_args: Any, **options: Any) -> torch.Tensor:
    """The boolean mask `[batch, 1, query, key]`, by the place of each token in its row.

    Padding counts for nothing, wherever it stands: transformers' own mask counts what lies in the cache, so that a
    window would be shorter in a row that was padded behind its prompt.
    """
    taking = options["attention_mask"].bool()
    places = taking.long().cumsum(1) - 1
    # transformers 4 gives the places in the cache, version 5 their number.
    tokens = options["q_length"] if "q_length" in options else options["cache_position"].shape[0]
    ahead = places[:, -tokens:, None] - places[:, None, :]
    mask = taking[:, None, :] & (ahead >= 0)
    if options.get("local_size") is not None:
        mask = mask & (ahead < options["local_size"])
    # The softmax of nothing is NaN, which spreads.
    return (mask | ~mask.any(dim=-1, keepdim=True))[:, None]


AttentionInterface.register(NAME, onnx_attention)
AttentionMaskInterface.register(NAME, mask_by_places)


def cache_of(model: Any, name: str) -> Cache:
    """What the cache of a model is, from a run.

    Raises:
        InputError: it is not of keys and values of one shape for each layer: clients know no other one.
    """
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True)
    states = [getattr(layer, part, torch.empty(0)) for layer in cache.layers for part in ("keys", "values")]
    shapes = {tuple(state.shape) for state in states}
    layers = model.config.num_hidden_layers
    if len(states) != 2 * layers or len(shapes) != 1 or states[0].dim() != 4:
        raise InputError(
            f"{name}: its layers do not have keys and values of one shape, so it cannot be exported as a decoder"
        )
    return Cache(layers, states[0].shape[1], states[0].shape[3])


def write_traced(job: ExportJob, variant: str, table_dtype: str, graph: Path, data_file: str) -> tuple[Cache, int]:
    """Write the graph of `job`, and its weights to `data_file` beside it; returns its cache and its vocabulary.

    Args:
        job: base, basis and, where one is folded in, the customer.
        variant: "rows", "drop-in" or "merged".
        table_dtype: of the coefficient table.
        graph: the file.
        data_file: a name.

    Raises:
        InputError: the model has no cache of keys and values, or a target is none that rows can have.
        QrloraError: the model cannot be traced.
    """
    checkpoint = job.checkpoint
    model = checkpoint.load_model()
    cache = cache_of(model, checkpoint.name)
    rows: CustomerRows | None = None
    if job.coefficients is not None:
        merge_model(model, checkpoint, job.basis, job.coefficients)
    else:
        layout = OneCustomer if variant == "drop-in" else CustomerRows
        rows = make_switchable(model, job.basis, 0, table_dtype, layout=layout)
    if not use_onnx_attention(model) or getattr(model.config, "attention_chunk_size", None):
        raise InputError(f"{checkpoint.name}: its attention is its own, not one that can be exported with a cache")
    model.set_attn_implementation(NAME)
    examples = _examples(rows, variant, cache)
    names = tuple(examples)[: -2 * cache.layers]
    stepping = Stepping(model, rows, names).eval()
    with torch.no_grad():
        vocabulary = stepping(*(tensor for tensor, _axes in examples.values()))[0].shape[-1]
    traced = _trace(stepping, examples, checkpoint.name)
    _name_axes(traced, examples, vocabulary)
    onnx_ir.save(traced, graph, external_data=data_file, size_threshold_bytes=SMALLEST_EXTERNAL_BYTES)
    if variant == "drop-in":
        _give_default(graph)
    return cache, int(vocabulary)


def _examples(rows: CustomerRows | None, variant: str, cache: Cache) -> dict[str, Example]:
    mask = torch.ones(ROWS, OLD + NEW, dtype=torch.int64)
    mask[0, :2] = 0
    ids = torch.arange(ROWS * NEW).reshape(ROWS, NEW) % 7
    found: dict[str, Example] = {"input_ids": (ids, (BATCH, TOKENS)), MASK: (mask, (BATCH, ALL))}
    if rows is not None:
        brought = rows.examples(ROWS)
        table, axes = brought[TABLE]
        found[TABLE] = (table[:1], (1, axes[1])) if variant == "drop-in" else (table, axes)
        if variant == "rows":
            found[SLOT] = (brought[SLOT][0], (BATCH,))
    for layer in range(cache.layers):
        for part in ("key", "value"):
            state = torch.randn(ROWS, cache.heads, OLD, cache.size)
            found[f"past_key_values.{layer}.{part}"] = (state, (BATCH, cache.heads, PAST, cache.size))
    return found


def _trace(stepping: Stepping, examples: dict[str, Example], name: str) -> Any:
    dynamic = tuple(
        {index: torch.export.Dim.DYNAMIC for index, axis in enumerate(axes) if isinstance(axis, str)}
        for _tensor, axes in examples.values()
    )
    past = [one for one in examples if one.startswith("past_key_values")]
    names = ["logits", *(one.replace("past_key_values", "present") for one in past)]
    program = export_program(stepping, examples, dynamic, OPSET, names, name)
    strip_traces(program.model)
    return program.model


def _name_axes(model: Any, examples: dict[str, Example], vocabulary: int) -> None:
    """The names of axes that clients know, in the place of the tracer's."""
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape(examples[value.name][1])
    logits, *present = model.graph.outputs
    logits.shape = onnx_ir.Shape((BATCH, 1, vocabulary))
    for value in present:
        _, heads, _, size = examples[value.name.replace("present", "past_key_values")][1]
        value.shape = onnx_ir.Shape((BATCH, heads, ALL, size))


def _give_default(graph: Path) -> None:
    """The base's table, where none is given."""
    model = onnx.load(graph, load_external_data=False)
    table = next(value for value in model.graph.input if value.name == TABLE)
    kind = table.type.tensor_type
    zeros = np.zeros([axis.dim_value for axis in kind.shape.dim], onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    model.graph.initializer.append(numpy_helper.from_array(zeros, TABLE))
    onnx.save(model, graph)
