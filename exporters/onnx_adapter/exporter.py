"""The exporter "onnx-adapter": a customer for a switchable graph in plain ONNX Runtime."""

from collections.abc import Mapping
from typing import Any, Literal

from exporters.onnx_adapter.options import AdapterOptions
from qrlora_deploy.exporting.job import ExportJob


class AdapterExporter:
    """A customer as a `.onnx_adapter` file."""

    name = "onnx-adapter"
    options = AdapterOptions
    output: Literal["file", "folder"] = "file"
    needs_customer: bool | None = True
    shown = ("kind", "task", "labels", "head_labels")

    def export(self, job: ExportJob, options: AdapterOptions) -> Mapping[str, Any]:
        """See `export_adapter`."""
        from exporters.onnx_adapter.adapter_file import export_adapter

        return export_adapter(job, options)


EXPORTER = AdapterExporter()
