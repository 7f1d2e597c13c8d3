"""Plain ONNX: one customer folded in, checked against PyTorch before it is left on the disk."""

from exporters.onnx.export import export_merged
from exporters.onnx.reference import verify_against

__all__ = ["export_merged", "verify_against"]
