"""ONNX bundles, merged or switchable, checked against PyTorch before they are left on the disk."""

from exporters.onnx.export import export_bundle, export_merged, export_switchable
from exporters.onnx.verifying import verify_against

__all__ = ["export_bundle", "export_merged", "export_switchable", "verify_against"]
