"""The graph that ONNX Runtime's own transformer optimiser makes, for comparison on a CPU."""

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import torch


class _Logits(torch.nn.Module):
    def __init__(self, model: Any, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, labels]` for inputs by position."""
        logits: torch.Tensor = self.model(**dict(zip(self.names, inputs, strict=True))).logits
        return logits


def optimizer_graph(model: Any, names: tuple[str, ...], folder: Path) -> Path:
    """Export the TorchScript way, whose patterns the optimiser knows best, and optimise.

    Raises:
        SystemExit: no attention was fused, so that there is nothing to compare with.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    plain, optimized = folder / "exported.onnx", folder / "optimized.onnx"
    model.set_attn_implementation("eager")
    ids = torch.ones(2, 9, dtype=torch.int64) * 7
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = tuple({"input_ids": ids, "attention_mask": mask}.get(name, torch.zeros_like(ids)) for name in names)
    logging.getLogger().setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(model, names).eval(),
            inputs,
            plain,
            dynamo=False,
            opset_version=17,
            input_names=list(names),
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "sequence"} for name in names},
        )
        options = FusionOptions("bert")
        config = model.config
        made = optimize_model(
            str(plain),
            "bert",
            config.num_attention_heads,
            config.hidden_size,
            opt_level=1,
            optimization_options=options,
        )
        made.save_model_to_file(str(optimized))
    counts = made.get_fused_operator_statistics()
    print(f"transformers.optimizer fused {counts}", flush=True)
    return optimized
