"""The exporter "triton": a model repository, checked against PyTorch when it is written, and again when one asks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from exporters.triton.options import TritonOptions
from qrlora_deploy.exporting.exporter import Verdict
from qrlora_deploy.exporting.job import ExportJob, Original


class TritonExporter:
    """A repository that serves every customer."""

    name = "triton"
    options = TritonOptions
    output: Literal["file", "folder"] = "folder"
    needs_customer: bool | None = False
    shown = ("kind", "models", "task", "labels", "precision", "parity", "customer_effect")

    def export(self, job: ExportJob, options: TritonOptions) -> Mapping[str, Any]:
        """See `export_repository`."""
        from exporters.triton.repository import export_repository

        return export_repository(job, options)

    def verify(self, output: Path, original: Original | None, provider: str) -> Verdict:
        """The graph's bundle as the exporter "onnx" verifies it, and what the front has of it.

        Raises:
            InputError: it is no such repository. FileFormatError: it is damaged.
            BasisMismatchError: it was made from something else. ProviderError: the provider does not load.
        """
        from exporters.onnx.exporter import EXPORTER as ONNX
        from exporters.triton.repository import open_repository

        return ONNX.verify(open_repository(output), original, provider)


EXPORTER = TritonExporter()
