"""From a PyTorch model to an ONNX file with named dynamic axes."""

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig

from exporters.onnx.attention import use_onnx_attention
from qrlora_deploy.errors import QrloraError

OPSET = 23
"""The first opset with the `Attention` operator."""

MODEL_FILE = "model.onnx"
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Graph:
    """What was written.

    Attributes:
        inputs: names of the inputs, int64 `[batch, sequence]` each.
        attention_nodes: number of `Attention` operators; 0 for a model with an attention of its own.
    """

    inputs: tuple[str, ...]
    attention_nodes: int


def input_names(model: Any, tokenizer: Any) -> tuple[str, ...]:
    """The inputs that the tokenizer gives and the model takes, in a fixed order."""
    taken = inspect.signature(model.forward).parameters
    given = {"input_ids", "attention_mask", *tokenizer.model_input_names}
    return tuple(name for name in TEXT_INPUTS if name in taken and name in given)


def longest_input(model: Any, tokenizer: Any) -> int:
    """How many tokens the model can take.

    RoBERTa and its kin begin counting positions behind the padding index, so their tables hold
    fewer positions than their size says.
    """
    limits = [limit for limit in (tokenizer.model_max_length,) if limit and limit < 2**20]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions:
        tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
        used = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
        limits.append(positions - max(used, default=0))
    return int(min(limits, default=512))


def write_graph(model: Any, names: tuple[str, ...], folder: Path) -> Graph:
    """Export `model` to `folder/model.onnx`, weights in `model.onnx.data`.

    The model's attention implementation is switched in place.

    Raises:
        QrloraError: the model cannot be traced, or the attention operator did not reach the graph.
    """
    model.config.use_cache = False
    emitted = use_onnx_attention(model)
    program = _trace(_LogitsOnly(model, names).eval(), names, _example(model, names))
    attention_nodes = sum(node.op_type == "Attention" for node in program.model.graph.all_nodes())
    if emitted and not attention_nodes:
        raise QrloraError(f"{type(model).__name__}: no Attention operator reached the graph; please report this model")
    _strip(program.model)
    # Weights always go to their own file: a model of more than 2 GB has no other form.
    program.save(folder / MODEL_FILE, external_data=True)
    return Graph(names, attention_nodes)


class _LogitsOnly(torch.nn.Module):
    """Takes tensors by position and gives logits `[batch, outputs]`."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, inputs, strict=True))
        logits: torch.Tensor = self.model(**named, return_dict=True).logits
        return logits


def _example(model: Any, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
    # No axis has size 1 or the size of another one: the exporter would take them for constants.
    generator = DummyTextInputGenerator(
        "text-classification", NormalizedTextConfig(model.config), batch_size=3, sequence_length=11
    )
    inputs = {name: generator.generate(name, framework="pt") for name in names}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 7:] = 0
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return tuple(inputs[name] for name in names)


def _trace(wrapper: torch.nn.Module, names: tuple[str, ...], example: tuple[torch.Tensor, ...]) -> Any:
    axes = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("sequence", min=1, max=2**20)}
    try:
        with warnings.catch_warnings(), _quiet(), torch.no_grad():
            # Deprecations inside torch and transformers, nothing a user can act on.
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                wrapper,
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(names),
                output_names=["logits"],
                dynamic_shapes=(tuple(axes for _ in names),),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise QrloraError(f"the model cannot be exported to ONNX: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks that torchvision, which nothing here needs, is not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _strip(model: Any) -> None:
    """Remove the source lines and stack traces that the exporter notes on every node: they name
    folders of the machine that exported and are most of the file."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for holder in (model, model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        holder.metadata_props.clear()
