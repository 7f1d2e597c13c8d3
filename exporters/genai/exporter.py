"""The exporter "genai": a decoder for onnxruntime-genai and transformers.js."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from exporters.genai.options import GenaiOptions
from qrlora_deploy.exporting.exporter import Verdict
from qrlora_deploy.exporting.job import ExportJob, Original


class GenaiExporter:
    """A model for all customers, or with one folded in."""

    name = "genai"
    options = GenaiOptions
    output: Literal["file", "folder"] = "folder"
    needs_customer: bool | None = None
    shown = ("kind", "variant", "builder", "task", "precision", "parity", "customer_effect")

    def export(self, job: ExportJob, options: GenaiOptions) -> Mapping[str, Any]:
        """See `export_genai`."""
        from exporters.genai.model_folder import export_genai

        return export_genai(job, options).model_dump(mode="json")

    def verify(self, output: Path, original: Original | None, provider: str) -> Verdict:
        """See `verify_genai`."""
        from exporters.genai.record import verify_genai

        return verify_genai(output, original, provider)


EXPORTER = GenaiExporter()
