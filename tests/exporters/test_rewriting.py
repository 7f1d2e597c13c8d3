"""Programs that are rewritten in place of a second trace compute what PyTorch does; others take torch's own way."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch

from exporters.onnx import rewriting
from exporters.onnx.tracing import export_program


class Rewritten(torch.nn.Module):
    """Everything that is rewritten, an output that is no more than a cast of its own dtype among it."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        both = (x > 0) & (x < 1)
        y = torch.nn.functional.dropout(torch.min(x, x * x), 0.1, False).contiguous()
        total = y * 2
        total += both.to(torch.float32)
        return (total + y).float()


class Promotes(torch.nn.Module):
    """Numbers of two dtypes, of which ONNX has no sum, and a whole one where a root is."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        counted = (x > 0).to(torch.int64).cumsum(1)
        return torch.sqrt(counted) + counted * x


class WritesToView(torch.nn.Module):
    """A sum that is seen through another name of the same memory."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        (x,) = inputs
        y = x * 2
        view = y[:, 1:]
        y += 1
        return view * x[:, 1:]


@pytest.mark.parametrize(("module", "short"), [(Rewritten(), True), (Promotes(), True), (WritesToView(), False)])
def test_rewritten_programs_compute_the_same(
    module: torch.nn.Module, short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[bool] = []

    def ask(*arguments: Any) -> bool:
        found.append(can_be_rewritten(*arguments))
        return found[-1]

    can_be_rewritten = rewriting.can_be_rewritten
    monkeypatch.setattr(rewriting, "can_be_rewritten", ask)
    x = torch.linspace(-2, 2, 15).reshape(3, 5)
    example = {"x": (x, ("batch", 5))}
    batch = torch.export.Dim("batch", min=1)
    program = export_program(module.eval(), example, ({0: batch},), 23, ["y"], "the module")
    assert found == [short]
    onnx_ir.save(program.model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(answer, module(x.clone()).numpy(), rtol=1e-6, atol=1e-6)
