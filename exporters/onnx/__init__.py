"""ONNX bundles, merged or switchable, checked against PyTorch before they are left on the disk.

What is offered here is imported when it is first used: `export --help` needs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.onnx.export import export_merged, export_per_row, export_switchable
    from exporters.onnx.options import OnnxOptions
    from exporters.onnx.verifying import verify_against

__all__ = ["OnnxOptions", "export_merged", "export_per_row", "export_switchable", "verify_against"]

PLACES = {
    "OnnxOptions": "exporters.onnx.options",
    "export_merged": "exporters.onnx.export",
    "export_per_row": "exporters.onnx.export",
    "export_switchable": "exporters.onnx.export",
    "verify_against": "exporters.onnx.verifying",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)
