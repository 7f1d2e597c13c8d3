"""The exporter "onnx-adapter": a customer for a switchable graph in plain ONNX Runtime."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from exporters.head_labels import check_head_labels, head_labels_option
from qrlora_deploy.exporting.job import ExportJob


@dataclass(frozen=True)
class AdapterOptions:
    """Options of the exporter "onnx-adapter".

    Attributes:
        head_labels: the number that the switchable bundle was exported with; 0: none.
    """

    head_labels: int = head_labels_option("The number that the switchable bundle was exported with.")

    def __post_init__(self) -> None:
        """Refuse a table that no memory holds, by an InputError."""
        check_head_labels(self.head_labels)


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
