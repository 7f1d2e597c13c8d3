"""From a PyTorch model to an ONNX file with named dynamic axes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnx_ir
import torch
from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

from exporters.onnx.attention import HEADS, use_onnx_attention
from exporters.onnx.bias_folding import fold_attention_biases
from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.merged_graphs import Merging, merged_rows
from exporters.onnx.padding_free import Packing, pack_blocks
from exporters.onnx.quantizing import block_products
from exporters.onnx.shared_weights import write_beside
from exporters.onnx.tracing import Example, export_program, strip_traces
from exporters.onnx.varlen import PackedAnswers, VarlenPacking
from qrlora_deploy.errors import InputError, QrloraError, argument
from qrlora_deploy.runtime.bundle.bundle import ALONE_FILE, MERGE_FILE, MODEL_FILE, PACKED_FILE, TensorRecord
from qrlora_deploy.runtime.bundle.row_layout import CUSTOMER_INPUTS
from qrlora_deploy.runtime.sessions.token_index import TOKEN_INDEX
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.classification import Classification

OPSET = 23
"""The first opset with the `Attention` operator."""

CLASSES = Classification()

ATTENTION = ("Attention", "PackedMultiHeadAttention")

SMALLEST_EXTERNAL_BYTES = 16 * 2**10
"""Smaller tensors stay in the graph. ONNX Runtime reads some of them while it still loads the graph,
such as the sizes of the Split that has one for each target, and refuses to find those elsewhere."""

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Graph:
    """What was written.

    Attributes:
        inputs: name, type and axes of each input, the text inputs first.
        attention_nodes: number of `Attention` operators; 0 for a model with an attention of its own.
        opset: that its operators are of.
        products: names of the products of the base's linear layers, which int8 quantises.
        traced: the wrapper that was traced; runs in PyTorch, on the graph's inputs by position.
        packed: whether there is a second graph, whose attention is packed.
        alone: whether there are graphs for one customer.
    """

    inputs: tuple[TensorRecord, ...]
    attention_nodes: int
    opset: int = OPSET
    products: tuple[str, ...] = ()
    traced: Any = None
    packed: bool = False
    alone: bool = False


class RowInputs(Protocol):
    """Inputs beside the text, which the model's layers read while it runs.

    Attributes:
        packing: of a padding-free model, set before it runs.
    """

    packing: Packing | None

    def examples(self, batch: int) -> dict[str, Example]:
        """Examples for a batch of `batch` rows, by the name of the input."""

    def fill(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take the inputs of the run that begins."""


def input_names(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in a fixed order."""
    taken = inspect.signature(model.forward).parameters
    given = {"input_ids", "attention_mask", *tokenizer.model_input_names}
    return tuple(name for name in TEXT_INPUTS if name in taken and name in given)


def write_graph(
    model: Any,
    names: tuple[str, ...],
    folder: Path,
    rows: RowInputs | None = None,
    packing: Packing | None = None,
    finish: Callable[[], None] | None = None,
    task: Task = CLASSES,
    alone: bool = False,
) -> Graph:
    """Export `model` to `folder/model.onnx`, weights in `model.onnx.data`.

    The model's attention implementation is switched in place, and biases that it does not need are folded.

    Args:
        model: gives `logits [batch, outputs]` or `[batch, sequence, outputs]`, or what `task` makes of it; the graph
            computes in its dtype.
        names: its text inputs, int64 `[batch, sequence]` each.
        folder: where the files go.
        rows: further inputs, and who takes them.
        packing: for a padding-free graph; the blocks of the model are made to use it, in place. A `VarlenPacking`
            also makes `folder/packed.onnx`, of the same weights.
        finish: changes the model's layers once more, after a run that shows what they read and before the trace.
        task: of the model; says what the graph answers and what that is called.
        alone: also write the graphs of `merged_graphs`, for one customer; `rows` are `CustomerRows` then.

    Raises:
        QrloraError: the model cannot be traced, or the attention operator did not reach the graph.
        InputError: a layer cannot work with `rows`, or the model cannot be made padding-free.
    """
    model.config.use_cache = False
    emitted = use_onnx_attention(model)
    if emitted:
        fold_attention_biases(model)
    blocks = 0
    if packing is not None:
        if not emitted:
            raise InputError(
                f"{type(model).__name__} cannot be made padding-free: its attention is its own, not one that is "
                f"exported as an ONNX operator; leave {argument('padding_free')} out"
            )
        blocks = pack_blocks(model, packing)
    if rows is not None:
        rows.packing = packing
    examples = _examples(model, names, rows, packing)
    wrapper = _AnswersOnly(model, task, tuple(examples), rows, packing).eval()
    # Errors of a layer come out of a plain run as they are, and out of a trace wrapped up.
    with torch.no_grad():
        wrapper(*(tensor for tensor, _axes in examples.values()))
    if packing is not None and packing.attended != blocks:
        raise InputError(
            f"{type(model).__name__} cannot be made padding-free: {packing.attended} of its {blocks} blocks attend "
            f"through the registered function; leave {argument('padding_free')} out"
        )
    if isinstance(packing, VarlenPacking):
        with torch.no_grad():
            packing.explore(wrapper, examples)
    if finish is not None:
        finish()
    opset = OPSET if packing is None else packing.opset
    program = _trace(wrapper, examples, opset, task.output_name)
    attention_nodes = sum(node.op_type in ATTENTION for node in program.model.graph.all_nodes())
    if emitted and not attention_nodes and not _all_capped(model):
        raise QrloraError(f"{type(model).__name__}: no Attention operator reached the graph; please report this model")
    products = block_products(program.model.graph.all_nodes(), wrapper)
    strip_traces(program.model)
    # Weights always go to their own file: a model of more than 2 GB has no other form.
    onnx_ir.save(
        program.model,
        folder / MODEL_FILE,
        external_data=f"{MODEL_FILE}.data",
        size_threshold_bytes=SMALLEST_EXTERNAL_BYTES,
    )
    varlen = packing if isinstance(packing, VarlenPacking) and packing.possible(model) else None
    if varlen is not None:
        _write_packed(wrapper, names, folder, varlen, rows)
    customers = rows if alone and isinstance(rows, CustomerRows) else None
    if customers is not None:
        _write_alone(wrapper, names, folder, varlen, customers, examples)
    inputs = tuple(_record(name, *example) for name, example in examples.items())
    return Graph(inputs, attention_nodes, opset, products, wrapper, varlen is not None, customers is not None)


def _write_packed(
    wrapper: Any,
    names: tuple[str, ...],
    folder: Path,
    packing: VarlenPacking,
    rows: RowInputs | None,
    file: str = PACKED_FILE,
) -> None:
    """The graph of tokens, on the weights of the one that was written before; it takes no more than it reads."""
    mask = _example_mask()
    examples = packing.packed_examples(names, mask) | ({} if rows is None else rows.examples(len(mask)))
    with packing.packed(wrapper.model):
        answers = PackedAnswers(wrapper, names, tuple(examples)).eval()
        program = _trace(answers, examples, packing.opset, wrapper.task.output_name)
    _write_second(program, folder, file)


def _write_second(program: Any, folder: Path, file: str) -> None:
    strip_traces(program.model)
    inputs = program.model.graph.inputs
    unread = [value for value in inputs if not value.uses()]
    for value in unread:
        inputs.remove(value)
    write_beside(program.model, folder / MODEL_FILE, folder / file)


def _write_alone(
    wrapper: Any,
    names: tuple[str, ...],
    folder: Path,
    varlen: VarlenPacking | None,
    rows: CustomerRows,
    examples: dict[str, Example],
) -> None:
    """The graphs for one customer; `varlen` where attention is packed, else they are of the form of the first graph."""
    merged = merged_rows(wrapper.model, rows)
    merging = Merging(wrapper.model, merged).eval()
    opset = OPSET if rows.packing is None else rows.packing.opset
    _write_second(_trace(merging, merging.examples(), opset, merging.outputs), folder, MERGE_FILE)
    text = {name: example for name, example in examples.items() if name not in CUSTOMER_INPUTS}
    whole = text | merged.examples(len(_example_mask()))
    alone = _AnswersOnly(wrapper.model, wrapper.task, tuple(whole), merged, rows.packing).eval()
    try:
        if varlen is None:
            _write_second(_trace(alone, whole, opset, wrapper.task.output_name), folder, ALONE_FILE)
        else:
            _write_packed(alone, names, folder, varlen, merged, ALONE_FILE)
    finally:
        rows.merged = {}


def _all_capped(model: Any) -> bool:
    """Whether every attention that ran has a soft cap, and so is no operator of its own."""
    heads = [getattr(module, HEADS) for module in model.modules() if hasattr(module, HEADS)]
    return bool(heads) and all(cut.softcap is not None for cut in heads)


def _record(name: str, tensor: torch.Tensor, axes: tuple[str | int, ...]) -> TensorRecord:
    return TensorRecord(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=axes)


class _AnswersOnly(torch.nn.Module):
    """Takes tensors by position and gives the answers of a task, fp32 whatever the model's dtype."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: Task,
        names: tuple[str, ...],
        rows: RowInputs | None,
        packing: Packing | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.names = names
        self.rows = rows
        self.packing = packing
        self.row_names = () if rows is None else tuple(rows.examples(1))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        if self.rows is not None:
            self.rows.fill({name: named.pop(name) for name in self.row_names})
        if self.packing is not None:
            self.packing.fill(named.pop(TOKEN_INDEX), named["attention_mask"])
        return self.task.forward(self.model, named).float()


def _examples(
    model: Any, names: tuple[str, ...], rows: RowInputs | None, packing: Packing | None
) -> dict[str, Example]:
    mask = _example_mask()
    batch, sequence = mask.shape
    generator = DummyTextInputGenerator(
        "text-classification", NormalizedTextConfig(model.config), batch_size=batch, sequence_length=sequence
    )
    inputs = {name: generator.generate(name, framework="pt") for name in names}
    inputs["attention_mask"] = mask
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    text: dict[str, Example] = {name: (inputs[name], ("batch", "sequence")) for name in names}
    tokens = {} if packing is None else packing.examples(inputs["attention_mask"])
    return text | tokens | ({} if rows is None else rows.examples(batch))


def _example_mask() -> torch.Tensor:
    """`[batch, sequence]`; its last row is full."""
    # No axis has size 1 or the size of another one: the exporter would take them for constants.
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[0, 7:] = 0
    return mask


def _trace(wrapper: torch.nn.Module, examples: dict[str, Example], opset: int, outputs: str | list[str]) -> Any:
    dims: dict[str, Any] = {
        "batch": torch.export.Dim("batch", min=1),
        "sequence": torch.export.Dim("sequence", min=1, max=2**20),
        "slots": torch.export.Dim("slots", min=1),
        "tokens": torch.export.Dim("tokens", min=1),
    }
    dims["batch + 1"] = dims["batch"] + 1
    shapes = tuple(
        {index: dims[axis] for index, axis in enumerate(axes) if isinstance(axis, str)}
        for _tensor, axes in examples.values()
    )
    return export_program(
        wrapper, examples, shapes, opset, [outputs] if isinstance(outputs, str) else outputs, "the model"
    )
